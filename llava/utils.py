"""Small helpers shared by the commands, and the one name of upstream's module that evaluation scripts import."""

import argparse
import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from llava.compress import available
from llava.constants import InputError
from llava.endings import run_command as run_command
from llava.output import check_output as check_output
from llava.output import write_whole as write_whole


def disable_torch_init() -> None:
    """Skip the random initialisation of Linear and LayerNorm layers, process-wide.

    Kept because scripts written for LLaVA call it; `load_pretrained_model` does not need it, as transformers
    builds models on the meta device.
    """
    import torch

    for layer in (torch.nn.Linear, torch.nn.LayerNorm):
        layer.reset_parameters = lambda self: None  # type: ignore[method-assign]


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose complaint is one line, exit code 2; `--top_p` is as good as `--top-p`."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse arguments, underscores in option names read as hyphens: upstream's flags come in both spellings."""
        words = (word.partition("=") for word in (sys.argv[1:] if args is None else args))
        spelt = [(n.replace("_", "-") if n.startswith("--") else n) + rest + value for n, rest, value in words]
        return super().parse_known_args(spelt, namespace)

    def error(self, message: str) -> NoReturn:
        """Print `prog: error: message` without the usage block and exit with code 2."""
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())} (see --help)\n")


def add_generation_arguments(parser: argparse.ArgumentParser, max_new_tokens: int) -> None:
    """Add the options of generation."""
    parser.add_argument("--temperature", type=_between(0, 100), default=0.0, help="0 (default): greedy")
    parser.add_argument("--top-p", type=_between(0, 1), help="with a temperature: nucleus sampling")
    parser.add_argument("--num-beams", type=at_least(1), default=1)
    parser.add_argument("--max-new-tokens", type=at_least(1), default=max_new_tokens)


def at_least(low: int) -> Callable[[str], int]:
    """Return argparse's parser of an integer with a lower bound."""

    def integer(text: str) -> int:
        if int(text) < low:
            raise argparse.ArgumentTypeError(f"must be at least {low}, got {text}")
        return int(text)

    return integer


def ratio_argument(text: str) -> float:
    """Read a retention ratio for argparse."""
    from llava.compress.base import parse_ratio  # loads torch, which --help does without

    try:
        return parse_ratio(text)
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def ratio_text(ratio: float | None) -> str:
    """Name a retention ratio, or that there is none."""
    return "no ratio" if ratio is None else f"ratio {ratio:g}"


def _between(low: float, high: float) -> Callable[[str], float]:
    def number(text: str) -> float:
        if not low <= float(text) <= high:
            raise argparse.ArgumentTypeError(f"must be in [{low}, {high}], got {text}")
        return float(text)

    return number


def add_method_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that choose and configure a compression method."""
    parser.add_argument("--method", help=f"globalcom2 (default), {', '.join(available())}, or a call with fields")
    parser.add_argument("--retention-ratio", help="kept / uncompressed visual tokens, in (0, 1]")
    parser.add_argument("--profile", help="corrected, released or paper")


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that say which checkpoint is loaded, and how."""
    parser.add_argument("--model-path", required=True, help="folder or hub id of a LLaVA checkpoint")
    parser.add_argument("--model-base", help="language model that a LoRA or projector belongs to")
    parser.add_argument("--vision-tower", help="folder of the CLIP model, instead of the config's")
    parser.add_argument("--device", help="cuda (default), cpu, …")
    parser.add_argument("--dtype", help="float16 (default on CUDA), bfloat16, float32 (default elsewhere)")
    parser.add_argument("--load-8bit", action="store_true")
    parser.add_argument("--load-4bit", action="store_true")


def load_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return what `add_model_arguments` was given as keywords of `load_pretrained_model`, paths left out.

    Raises:
        InputError: a GPU was asked for by name and there is none.
    """
    require_cuda(args.device)
    names = ("load_8bit", "load_4bit", "dtype", "vision_tower", "device")
    return {name: getattr(args, name) for name in names if getattr(args, name)}


def require_cuda(device: str | None) -> None:
    """Refuse the option --device where it names a GPU and there is none.

    Raises:
        InputError: so it is.
    """
    import torch

    if str(device).startswith("cuda") and not torch.cuda.is_available():
        raise InputError(f"--device {device}: no CUDA device is available; leave the option out to run on the CPU")


def new_figure(width: float, height: float) -> Any:
    """Return an empty matplotlib figure, sizes in inches.

    Raises:
        InputError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError(
            "drawing needs matplotlib, which is not installed; pip install 'globalcom2[pocket]'"
        ) from error
    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: Any, output: Path) -> None:
    """Write a figure into a file, whose suffix says the format.

    Raises:
        InputError: the file cannot be written.
    """
    drawn = io.BytesIO()
    try:
        figure.savefig(drawn, dpi=150, format=output.suffix[1:] or "png")
    except ValueError as error:  # there is no such format
        raise InputError(f"cannot write the picture {str(output)!r} ({error}); give another name") from error
    write_whole(output, drawn.getvalue())
