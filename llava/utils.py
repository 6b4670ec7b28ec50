"""Small helpers shared by the commands, and the one name of upstream's module that evaluation scripts import."""

import argparse
import sys
from collections.abc import Callable
from typing import NoReturn

from llava.constants import InputError


def disable_torch_init() -> None:
    """Skip the random initialisation of Linear and LayerNorm layers, process-wide.

    Kept because scripts written for LLaVA call it; `load_pretrained_model` does not need it, as transformers
    builds models on the meta device.
    """
    import torch

    for layer in (torch.nn.Linear, torch.nn.LayerNorm):
        layer.reset_parameters = lambda self: None  # type: ignore[method-assign]


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose complaint is one line, exit code 2."""

    def error(self, message: str) -> NoReturn:
        """Print `prog: error: message` without the usage block and exit with code 2."""
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")


def run_command(command: Callable[[], None]) -> None:
    """Run a command line's body; an `InputError` becomes one line on stderr and exit code 2."""
    try:
        command()
    except InputError as error:
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        raise SystemExit(2) from None
