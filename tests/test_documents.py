"""The code in the documents runs: Python for real, commands as far as their programs' own parsers."""

import argparse
import ast
import importlib.util
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from llava.compress import __main__ as listing
from llava.compress import available, get
from llava.constants import InputError
from llava.utils import OneLineParser
from tests.conftest import Command as Run
from tests.conftest import picture
from tests.documents import PAGES, ROOT, Block, Command, blocks, commands, contract, inline, installed, run
from tests.eval.test_scripts import SCRIPTS, dry

EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
CONTRACTS = {"llava/compress": ("tests/compress/test_methods.py", "fastervlm")}
"""Where examples of modules belong: the tests that run over everything there, and something that they run over."""
OWN_TESTS = {"llava/eval/benchmarks"}
"""Where else: the tests of the place install the example themselves (`tests.documents.installed`)."""

PYTHON = [block for block in blocks() if block.language == "python"]
EXAMPLES = [block for block in PYTHON if block.module]
every_example = pytest.mark.parametrize("block", EXAMPLES, ids=str)
Parsed = Callable[[list[str]], argparse.Namespace]


def test_every_block_is_run_or_a_figure() -> None:
    assert {block.language for block in blocks()} <= {"python", "bash", "bibtex", ""}
    figures = [block.text for block in blocks() if not block.language]
    assert not [text for text in figures if re.search(r"^(\$|import|from|python|bash|pip) ", text, re.MULTILINE)]
    assert {block.page for block in PYTHON} == {"README.md", "CONTRIBUTING.md"}
    fences = sum(len(re.findall("^ *```", page.read_text(encoding="utf-8"), re.MULTILINE)) for page in PAGES)
    assert fences == 2 * len(blocks())  # none escapes, in a list or of another make


# --- Python ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [block for block in PYTHON if not block.module], ids=str)
def test_python_runs(
    block: Block, checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the documents' checkpoint and picture are, in small."""
    (tmp_path / "liuhaotian").symlink_to(checkpoint("v1.6-vicuna").parent)
    picture(640, 480).save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    exec(compile(block.text, str(block), "exec"), {"__name__": "__main__"})


@every_example
def test_an_example_is_as_the_linter_wants_it(block: Block) -> None:
    ruff = [str(Path(sys.executable).with_name("ruff"))]
    place = ["--stdin-filename", str(ROOT / block.module), "-"]
    for what in (["check"], ["format", "--diff"]):
        done = subprocess.run([*ruff, *what, *place], input=block.text, capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@every_example
def test_an_example_is_typed(block: Block, tmp_path: Path) -> None:
    """As if it stood in the place of a module that is there."""
    (tmp_path / block.module.name).write_text(block.text, encoding="utf-8")
    place = max((ROOT / block.module.parent).glob("*.py"))
    shadow = ["--shadow-file", str(place), str(tmp_path / block.module.name)]
    words = [sys.executable, "-m", "mypy", "--config-file", "pyproject.toml", *shadow, str(place)]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_example_has_tests() -> None:
    assert {str(block.module.parent) for block in EXAMPLES} <= CONTRACTS.keys() | OWN_TESTS


@pytest.mark.parametrize("block", [b for b in EXAMPLES if str(b.module.parent) in CONTRACTS], ids=str)
def test_an_example_keeps_the_contract(block: Block, tmp_path: Path) -> None:
    tests, sibling = CONTRACTS[str(block.module.parent)]
    ran = []
    with installed(block, tmp_path) as name:
        for test, arguments in contract(ROOT / tests, name):
            run(test, arguments)
            ran.append(test.__name__)
    assert ran == [test.__name__ for test, _ in contract(ROOT / tests, sibling)]
    assert len(ran) > len(set(ran)) > 3


def test_the_example_of_a_method_is_found_by_its_name(command: Run, tmp_path: Path) -> None:
    (block,) = (block for block in EXAMPLES if block.module.parent == Path("llava/compress"))
    with installed(block, tmp_path) as name:
        assert name in available()
        assert str(get(f"{name}(retention_ratio=0.5)")) == f"{name}(retention_ratio=0.5)"
        code, out, _ = command(listing.main, name)
    assert (code, name in out, "retention_ratio" in out) == (0, True, True)
    assert name not in available()


# --- commands --------------------------------------------------------------------------------------------------------


def check(command: Command, parsed: Parsed) -> None:
    """A command of the documents: its script and variables, or its module and options, exist and make sense."""
    match command.words:
        case ["python", "-m", module, "--help"]:
            with pytest.raises(SystemExit, match=r"^0$"):
                parsed(["-m", module, "--help"])
        case ["python", "-m", module, *words]:
            made = parsed(["-m", module, *words])
            specs = [*(getattr(made, "methods", None) or []), getattr(made, "method", None)]
            assert all(get(spec) for spec in specs if spec)
        case ["bash", script, *words]:
            check_script(ROOT / script, command.variables, words, parsed)
        case ["pip", "install", "-e", target]:
            assert (found := re.fullmatch(r"\.(?:\[(\w+)\])?", target))
            assert found[1] is None or found[1] in EXTRAS
        case _:
            pytest.fail(f"no test knows what to do with {shlex.join(command.words)}")


def check_script(script: Path, variables: dict[str, str], words: list[str], parsed: Parsed) -> None:
    """It reads these variables; what a benchmark's script would run is checked in turn."""
    source = script.read_text(encoding="utf-8")
    shared = re.findall(r'^source .*/(_\w+\.sh)"', source, re.MULTILINE)
    read = source + "".join((script.parent / name).read_text(encoding="utf-8") for name in shared)
    assert not [name for name in variables if not re.search(rf"\$\{{?{name}\b", read)]
    assert not [word for word in words if word not in read]
    if script.parent == SCRIPTS and script.stem != "check_data":
        for made in dry(script.stem, *words, **variables):
            check(Command({}, ["python", *made]), parsed)


@pytest.mark.parametrize("block", [block for block in blocks() if block.language == "bash"], ids=str)
def test_commands_are_understood(block: Block, parsed: Parsed) -> None:
    subprocess.run(["bash", "-n"], input=block.text, text=True, check=True)
    assert commands(block.text)
    for command in commands(block.text):
        check(command, parsed)


@pytest.mark.parametrize(
    "wrong",
    [
        "python -m llava.eval.run_llava --model-path M --image-file I --query Q --ratio-of-retention 0.5",
        "python -m llava.eval.run_lava --help",
        "python -m llava.visualize --image-file photo.jpg",
        "python -m llava.efficiency --method 'uniform(strength=1)'",
        "bash scripts/v1_5/eval/popes.sh",
        "LIMTI=8 bash scripts/v1_5/eval/pope.sh",
        "METHODS='globalcom2 fastest' bash scripts/v1_5/eval/pocket.sh",
        "bash scripts/test.sh --everything",
        'pip install -e ".[gpu]"',
        "make test",
    ],
)
def test_what_is_wrong_with_a_command_is_noticed(wrong: str, parsed: Parsed) -> None:
    (command,) = commands(wrong)
    with pytest.raises((AssertionError, pytest.fail.Exception, SystemExit, ImportError, OSError, InputError)):
        check(command, parsed)


def is_command(code: str) -> bool:
    return bool(re.match(r"([A-Z_]+=\S* )*(python -m llava|bash scripts/|pip install) ?", code))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_in_the_text_are_understood(page: Path, parsed: Parsed) -> None:
    for code in filter(is_command, inline(page.read_text(encoding="utf-8"))):
        (command,) = commands(code)
        if command.words[:2] == ["python", "-m"] and len(command.words) == 3:  # named, not to be typed like this
            assert importlib.util.find_spec(command.words[2]), code
        else:
            check(command, parsed)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_methods_in_the_text_can_be_built(page: Path) -> None:
    for code in inline(page.read_text(encoding="utf-8")):
        if re.match(rf"({'|'.join(available())})\(", code):
            get(code)


def test_options_in_docstrings_exist(parser_of: Callable[[str], OneLineParser]) -> None:
    """Modules say how they are called, with what can be left out in brackets."""
    found = 0
    for file in sorted(ROOT.glob("llava/**/*.py")):
        for code in filter(is_command, inline(ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or "")):
            _, _, module, *words = code.translate(str.maketrans("[]", "  ")).split()
            options = [word for word in words if word.startswith("--")]
            if options and module != "llava.eval.launch":  # which hands them to torchrun
                assert set(options) <= set(parser_of(module)._option_string_actions), f"{file}: {code}"
                found += 1
    assert found > 10


def test_commands_in_the_scripts_heads_are_understood(parsed: Parsed) -> None:
    found = 0
    for script in sorted(ROOT.glob("scripts/**/*.sh")):
        for line in re.findall(r"^#   (.*bash scripts/.*)$", script.read_text(encoding="utf-8"), re.MULTILINE):
            for command in commands(line):
                check(command, parsed)
                found += 1
    assert found >= 2
