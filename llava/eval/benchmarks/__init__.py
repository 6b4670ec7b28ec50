"""The benchmarks, one per file; the directory is the registry."""

import pkgutil
from importlib import import_module

from llava.constants import InputError
from llava.eval.benchmarks.base import Benchmark

_PLUMBING = {"base"}


def available() -> list[str]:
    """Return the names of all benchmarks."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if m.name not in _PLUMBING and m.name[0] != "_")


def get(name: str) -> Benchmark:
    """Return a benchmark by name.

    Raises:
        InputError: there is none of that name.
    """
    if name not in available():
        raise InputError(f"unknown benchmark {name!r}; choose from {', '.join(available())}")
    found = vars(import_module(f"{__name__}.{name}")).values()
    classes = [c for c in found if isinstance(c, type) and issubclass(c, Benchmark) and vars(c).get("name") == name]
    if len(classes) != 1:
        raise TypeError(f"llava/eval/benchmarks/{name}.py must define exactly one Benchmark with name = {name!r}")
    return classes[0]()
