"""Fixtures: miniature checkpoints in the published format, loaded through the real path; no network, fixed seeds."""

import argparse
import os
import resource
import runpy
import sys

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.pop("LLAVA_RETENTION_RATIO", None)

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

from llava.model.builder import load_pretrained_model
from llava.model.miniature import write_miniature
from llava.utils import OneLineParser, run_command

# One thread per worker: the models are tiny and the suite runs one worker per core.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of a miniature by version; read-only for tests (copy it to change it)."""

    @cache
    def make(version: str = "v1.6-vicuna") -> Path:
        return write_miniature(tmp_path_factory.mktemp(version) / "liuhaotian" / "llava-next-7b", version)

    return make


class Loaded(NamedTuple):
    tokenizer: Any
    model: Any
    processor: Any
    context_len: int


@pytest.fixture(scope="session")
def loaded(checkpoint: Callable[[str], Path]) -> Callable[[str], Loaded]:
    """A miniature loaded in float32, shared by the session: tests that change the model must undo it."""

    @cache
    def load(version: str = "v1.6-vicuna") -> Loaded:
        return Loaded(*load_pretrained_model(str(checkpoint(version)), device="cpu"))

    return load


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """A random RGB picture with structure at several scales, so that crops and thumbnail differ."""
    rng = np.random.default_rng((seed, width, height))
    coarse = Image.fromarray(rng.integers(0, 256, (3, 4, 3), dtype=np.uint8)).resize((width, height))
    fine = rng.integers(-60, 60, (height, width, 3))
    return Image.fromarray(np.clip(np.asarray(coarse) + fine, 0, 255).astype(np.uint8))


@contextmanager
def file_limit(size: int) -> Iterator[None]:
    """Let no file grow beyond a size, as on a full disk: python ignores the signal, and gets EFBIG."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Run a command's `main` with words; returns exit code, stdout and stderr."""

    def run(main: Callable[[], None], *words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["command", *map(str, words)])
        code = 0
        try:
            run_command(main)
        except SystemExit as stop:
            code = int(stop.code or 0)
        return code, *capsys.readouterr()

    return run


class _Parser(Exception):
    """Carries the parser of a program out of it."""


@cache
def _parser_of(module: str) -> OneLineParser:
    def found(parser: OneLineParser, *_: Any) -> None:
        raise _Parser(parser)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OneLineParser, "parse_args", found)
        patch.setattr(sys, "argv", [module])
        for name in (module, f"{module}.__main__"):  # runpy warns of what is there already
            patch.delitem(sys.modules, name, raising=False)
        with pytest.raises(_Parser) as caught:
            runpy.run_module(module, run_name="__main__")
    return caught.value.args[0]


@pytest.fixture
def parser_of() -> Callable[[str], OneLineParser]:
    """Run a program (`python -m` this) as far as its own parser, and return that."""
    return _parser_of


@pytest.fixture
def parsed(parser_of: Callable[[str], OneLineParser]) -> Callable[[list[str]], argparse.Namespace]:
    """Give the words of a command, from `-m` on, to its program's own parser."""

    def parse(command: list[str]) -> argparse.Namespace:
        flag, module, *words = command
        assert flag == "-m"
        if module != "llava.eval.launch":
            return parser_of(module).parse_args(words)
        from torch.distributed.run import get_args_parser

        launcher = get_args_parser().parse_args(words)
        assert launcher.module
        args = parse(["-m", launcher.training_script, *launcher.training_script_args])
        assert str(args.num_processes) == launcher.nproc_per_node
        return args

    return parse
