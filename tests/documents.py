"""The code in the documents, and a place for the modules that they show how to write."""

import re
import runpy
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted(ROOT.glob("docs/**/*.md")),
    *sorted(ROOT.glob("playground/*/README.md")),
    *sorted(ROOT.glob("playground/data/eval/*/README.md")),
]


class Block(NamedTuple):
    """A fenced block of a page."""

    page: str
    line: int
    """Of its first line of code, from 1."""
    language: str
    text: str
    module: Path | None
    """The file that it is an example of: the paragraph above names it, and there is none yet."""

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


@cache
def blocks() -> list[Block]:
    """Every fenced block of every page."""
    return [block for page in PAGES for block in _blocks(page)]


def _blocks(page: Path) -> Iterator[Block]:
    text = page.read_text(encoding="utf-8")
    for match in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        above = text[: match.start()].rstrip().rpartition("\n\n")[2]
        named = [Path(name) for name in re.findall(r"`(llava/[\w/]+\.py)`", above) if not (ROOT / name).exists()]
        line = text.count("\n", 0, match.start(2)) + 1
        yield Block(str(page.relative_to(ROOT)), line, match[1], match[2], named[-1] if named else None)


def inline(text: str) -> list[str]:
    """Every `piece of code` in running text."""
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose)]


class Command(NamedTuple):
    """A command as one types it."""

    variables: dict[str, str]
    words: list[str]


def commands(shell: str) -> list[Command]:
    """The commands of a shell block, one a line."""
    lines = shell.replace("\\\n", " ").splitlines()
    return [_command(words) for line in lines if (words := shlex.split(line, comments=True))]


def _command(words: list[str]) -> Command:
    given = 0
    while re.match(r"[A-Z_]+=", words[given]):
        given += 1
    pairs = (word.split("=", 1) for word in words[:given])
    return Command({name: value for name, value in pairs}, words[given:])


@contextmanager
def installed(block: Block, folder: Path) -> Iterator[str]:
    """Have an example's module beside its siblings, written to a folder, for as long as the context lasts."""
    assert block.module is not None
    parent, name = ".".join(block.module.parent.parts), block.module.stem
    package = import_module(parent)
    (folder / block.module.name).write_text(block.text, encoding="utf-8")
    package.__path__.append(str(folder))
    try:
        yield name
    finally:
        package.__path__.remove(str(folder))
        sys.modules.pop(f"{parent}.{name}", None)
        vars(package).pop(name, None)


def contract(tests: Path, name: str) -> Iterator[tuple[Callable[..., None], dict[str, Any]]]:
    """Every test, with arguments, that a file runs over a registry: those for one name that the registry has now."""
    for test in runpy.run_path(str(tests)).values():
        axes = {m.args[0]: m.args[1] for m in getattr(test, "pytestmark", []) if m.name == "parametrize"}
        named = [axis for axis, values in axes.items() if name in values]
        if named:
            axes |= {axis: [name] for axis in named}
            for values in product(*axes.values()):
                yield test, dict(zip(axes, values, strict=True))


def run(test: Callable[..., None], arguments: dict[str, Any]) -> None:
    """Run a test, with the one fixture that tests of a contract use."""
    with pytest.MonkeyPatch.context() as patch:
        wanted = {"monkeypatch": patch} if "monkeypatch" in test.__code__.co_varnames else {}
        test(**arguments, **wanted)
