"""Training-free visual-token compression for LLaVA-1.5 and LLaVA-NeXT: GlobalCom² and its companions.

Importing this package loads neither torch nor transformers; the model classes are resolved on first use.
"""

import sys

# `python -m llava.…` is starting, and what it imports takes seconds.
if sys.argv[:1] == ["-m"] and any(word.split(".")[0] == "llava" for word in sys.orig_argv):
    from llava.interrupts import end_while_importing

    end_while_importing()

from importlib import import_module
from importlib.metadata import packages_distributions
from typing import Any
from warnings import warn

__version__ = "0.1.0"

_LAZY = {
    "LlavaConfig": "llava.model",
    "LlavaLlamaForCausalLM": "llava.model",
    "LlavaMistralConfig": "llava.model",
    "LlavaMistralForCausalLM": "llava.model",
    "load_pretrained_model": "llava.model.builder",
}
__all__ = ["__version__", *_LAZY]


def __getattr__(name: str) -> Any:
    """Resolve a public name on first use, so that `import llava` stays light."""
    if name not in _LAZY:
        raise AttributeError(f"module 'llava' has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)


def _warn_about_a_second_owner() -> None:
    """Say so when another distribution also installed a package called `llava` (pip overwrites silently)."""
    owners = packages_distributions().get("llava", ())
    others = sorted({name for name in owners if name} - {"globalcom2"})  # a half-removed one has no name
    if others:
        warn(
            f"the import name 'llava' is also installed by {', '.join(others)}; the files of one overwrite the "
            f"other's: pip uninstall {' '.join(others)} globalcom2, then install globalcom2 again",
            stacklevel=3,
        )


_warn_about_a_second_owner()
