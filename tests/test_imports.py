"""Who may import whom (design.md, section 4), read from the source; what an import costs, in fresh interpreters."""

import ast
import json
import os
import re
import subprocess
import sys
import tomllib
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

import llava

ROOT = Path(llava.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
IMPORT_NAMES = {"pillow": "PIL", "protobuf": "google"}


def module_name(file: Path) -> str:
    parts = file.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(file): file for file in FILES}


@cache
def tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


class Import(NamedTuple):
    target: str
    """The module: of `from llava.compress import base` it is llava.compress.base, of `… import get` llava.compress."""
    inside: bool
    """Inside a function: runs when that is called, not at import."""


def imports(module: str) -> list[Import]:
    return [
        Import(target, inside)
        for node, inside in statements(tree(MODULES[module]), False)
        for target in targets(node, module)
    ]


def statements(node: ast.AST, inside: bool) -> Iterator[tuple[ast.AST, bool]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child, inside
        deeper = inside or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        yield from statements(child, deeper)


def targets(node: ast.AST, module: str) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    assert isinstance(node, ast.ImportFrom)
    origin = node.module or ""
    if node.level:
        package = module if MODULES[module].name == "__init__.py" else module.rpartition(".")[0]
        base = package.split(".")[: len(package.split(".")) - node.level + 1]
        origin = ".".join([*base, *filter(None, [origin])])
    named = (f"{origin}.{alias.name}" for alias in node.names)
    return [name if name in MODULES else origin for name in named]


def within(target: str, *packages: str) -> bool:
    return any(target == package or target.startswith(package + ".") for package in packages)


def third_party(target: str) -> bool:
    root = target.split(".")[0]
    return root != "llava" and root not in sys.stdlib_module_names


# --- who imports whom ------------------------------------------------------------------------------------------------

LEAVES = ("llava.constants", "llava.env", "llava.conversation", "llava.anyres", "llava.schema", "llava.reading")
COMPRESS = sorted(name for name in MODULES if within(name, "llava.compress"))
# The paper's method lives in llava_arch, by its users' wish; the ratio that they edit stands there too. The command
# that lists the methods talks like every other.
EXCEPTIONS = {
    ("llava.compress.__main__", Import("llava.utils", inside=False)),
    ("llava.compress.globalcom2", Import("llava.model.llava_arch", inside=False)),
    ("llava.compress.base", Import("llava.model.llava_arch", inside=True)),
}


def test_the_reader_of_imports_sees_them_all():
    # The rules below are worth what this finds.
    assert Import("llava.model.llava_arch", inside=True) in imports("llava.compress.base")
    assert Import("torch", inside=False) in imports("llava.anyres")
    assert Import("llava.model.llava_arch", inside=False) in imports("llava.compress.globalcom2")
    relative = ast.parse("from . import base\nfrom .tokens import budget\nfrom ..anyres import AnyResGrid\nimport a.b")
    found = [target for node, _ in statements(relative, False) for target in targets(node, "llava.compress.none")]
    assert found == ["llava.compress.base", "llava.compress.tokens", "llava.anyres", "a.b"]
    assert COMPRESS[0] == "llava.compress"
    assert len(COMPRESS) > 5


@pytest.mark.parametrize("module", LEAVES)
def test_leaves_import_torch_the_constants_and_the_schema_only(module):
    found = {target for target, _ in imports(module)}
    assert {target for target in found if within(target, "llava")} <= {"llava.constants", "llava.schema"} - {module}
    assert {target.split(".")[0] for target in found if third_party(target)} <= {"torch"}


@pytest.mark.parametrize("module", COMPRESS)
def test_methods_and_plumbing_import_torch_and_each_other_only(module):
    found = {found for found in imports(module) if (module, found) not in EXCEPTIONS}
    ours = {target for target, _ in found if within(target, "llava")}
    assert {
        target
        for target in ours
        if not within(target, "llava.constants", "llava.env", "llava.anyres", "llava.compress")
    } == set()
    assert {target.split(".")[0] for target, _ in found if third_party(target)} <= {"torch"}


def test_the_exceptions_are_still_needed():
    assert [pair for pair in EXCEPTIONS if pair[1] not in imports(pair[0])] == []


def test_the_joint_itself_knows_neither_transformers_nor_pictures():
    for module in ("llava.model", "llava.model.llava_arch", "llava.model.splice", "llava.model.views"):
        assert {target.split(".")[0] for target, _ in imports(module) if third_party(target)} <= {"torch"}


# Package -> what stands above it: used by nothing in the package itself.
ABOVE = {
    "llava.model": ("llava.eval", "llava.visualize", "llava.efficiency", "llava.hf", "llava.pocket"),
    "llava.mm_utils": ("llava.model", "llava.eval", "llava.visualize", "llava.efficiency", "llava.hf", "llava.pocket"),
    **dict.fromkeys(
        ("llava.fetch", "llava.images", "llava.resize"),
        ("llava.mm_utils", "llava.model", "llava.eval", "llava.visualize", "llava.efficiency", "llava.pocket"),
    ),
    "llava.utils": ("llava.model", "llava.eval", "llava.visualize", "llava.efficiency", "llava.hf", "llava.pocket"),
    "llava.hf": ("llava.model", "llava.eval", "llava.visualize", "llava.efficiency", "llava.pocket"),
    "llava.visualize": ("llava.eval", "llava.pocket"),
    "llava.efficiency": ("llava.eval", "llava.pocket"),
}


@pytest.mark.parametrize("package", ABOVE)
def test_nothing_imports_what_stands_above_it(package):
    upward = {
        f"{module} imports {target}"
        for module in MODULES
        if within(module, package)
        for target, _ in imports(module)
        if within(target, *ABOVE[package])
    }
    assert upward == set()


@pytest.mark.parametrize("module", sorted(MODULES))
def test_modules_import_declared_dependencies_only_when_imported(module):
    # What an extra brings, or another package happens to bring, is imported where it is used.
    declared = [re.match(r"[\w-]+", requirement).group() for requirement in PROJECT["dependencies"]]
    roots = {target.split(".")[0] for target, inside in imports(module) if third_party(target) and not inside}
    assert roots <= {IMPORT_NAMES.get(name, name.replace("-", "_")) for name in declared}


# --- rules of the source ---------------------------------------------------------------------------------------------


def nodes(kind: type | tuple[type, ...]) -> Iterator[tuple[Path, ast.AST]]:
    for file in FILES:
        for node in ast.walk(tree(file)):
            if isinstance(node, kind):
                yield file, node


def place(file: Path, node: ast.AST) -> str:
    return f"{file.relative_to(ROOT.parent)}:{node.lineno}"


def test_no_star_imports():
    assert [place(f, n) for f, n in nodes(ast.ImportFrom) if any(alias.name == "*" for alias in n.names)] == []


def reads_environment(node: ast.AST) -> bool:
    if isinstance(node, ast.Attribute):
        return node.attr in ("environ", "environb", "getenv", "getenvb")
    return isinstance(node, ast.ImportFrom) and node.module == "os" and any("env" in alias.name for alias in node.names)


def test_environment_variables_are_read_in_one_place():
    """Settings are; `interrupts` has what a launcher tells its processes."""
    found = {place(f, n).split(":")[0] for f, n in nodes((ast.Attribute, ast.ImportFrom)) if reads_environment(n)}
    assert found == {"llava/env.py", "llava/interrupts.py"}


def test_no_module_is_longer_than_375_lines():
    lengths = {str(file.relative_to(ROOT.parent)): len(file.read_text("utf-8").splitlines()) for file in FILES}
    assert {name: length for name, length in lengths.items() if length > 375} == {}


def is_command(file: Path) -> bool:
    """It can be run with `python -m`."""
    guards = (node for node in tree(file).body if isinstance(node, ast.If))
    return file.name == "__main__.py" or any("__main__" in ast.unparse(guard.test) for guard in guards)


def test_only_commands_print():
    calls = ((f, n) for f, n in nodes(ast.Call) if isinstance(n.func, ast.Name) and n.func.id == "print")
    assert [place(f, n) for f, n in calls if not is_command(f)] == []


def undocumented(node: ast.AST) -> Iterator[ast.AST]:
    """Public classes and functions without a docstring, methods of public classes included."""
    for child in getattr(node, "body", []):
        if not isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) or child.name.startswith("_"):
            continue
        decorators = {ast.unparse(decorator).split(".")[-1] for decorator in child.decorator_list}
        # An overload is a type, not a function; a setter is told about at its getter.
        if ast.get_docstring(child) is None and not decorators & {"overload", "override", "setter"}:
            yield child
        if isinstance(child, ast.ClassDef):
            yield from undocumented(child)


def test_everything_public_has_a_docstring():
    missing = [place(file, node) for file in FILES for node in undocumented(tree(file))]
    assert missing == []
    bare = [name for name, file in MODULES.items() if tree(file).body and ast.get_docstring(tree(file)) is None]
    assert bare == []


# --- fresh interpreters ----------------------------------------------------------------------------------------------


def fresh(code: str, *arguments: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    search = [str(entry) for entry in (path, ROOT.parent, os.environ.get("PYTHONPATH")) if entry]
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(search)},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def loaded_after(statement: str) -> set[str]:
    done = fresh(f"import sys, json\n{statement}\nprint(json.dumps(sorted(sys.modules)))")
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_importing_llava_is_light():
    names = ("conversation", "interrupts", "output", "endings", "schema", "reading", "compress", "compress.__main__")
    modules = loaded_after(f"import {', '.join(f'llava.{name}' for name in names)}")
    assert "llava.conversation" in modules
    assert modules & {"torch", "transformers", "numpy", "PIL"} == set()


def test_importing_every_method_needs_neither_transformers_nor_pictures():
    modules = loaded_after("from llava.compress import available, method_class\nlist(map(method_class, available()))")
    assert {"llava.compress.globalcom2", "llava.model.llava_arch"} <= modules
    assert modules & {"transformers", "PIL"} == set()


def test_importing_globalcom2_needs_neither_transformers_nor_pictures():
    assert loaded_after("import llava.compress.globalcom2") & {"transformers", "PIL"} == set()


IMPORT_ALL = """
import importlib, importlib.metadata, sys, traceback
names = sys.argv[1:]
# A module that parses arguments when imported exits here; one that opens a connection is told off.
sys.argv = ["python", "--no-such-flag"]
def watch(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo"):
        raise RuntimeError(f"network at import time: {event} {arguments}")
import torch, transformers
sys.addaudithook(watch)
importlib.metadata.packages_distributions = lambda: {}  # reads every installed package: once is enough, below
failed = 0
for name in names:
    # Each as the first one, so that no circular import hides behind the order.
    for module in [m for m in sys.modules if m.split(".")[0] == "llava"]:
        del sys.modules[module]
    try:
        importlib.import_module(name)
    except BaseException:
        failed += 1
        print("cannot import", name, traceback.format_exc())
sys.exit(failed > 0)
"""


def test_every_module_imports_first_and_silently():
    done = fresh(IMPORT_ALL, *(name for name in MODULES if not name.endswith("__main__")))
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr


# --- lazy names ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", ["llava", "llava.model"])
def test_lazy_names_resolve(module):
    package = sys.modules[module]
    assert "LlavaLlamaForCausalLM" in package.__all__
    for name in package.__all__:
        assert getattr(package, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = package.no_such_name


def test_upstreams_import_lines_work():
    from llava import LlavaLlamaForCausalLM
    from llava.model import LlavaConfig, LlavaMistralConfig, LlavaMistralForCausalLM
    from llava.model.builder import load_pretrained_model

    assert llava.LlavaLlamaForCausalLM is LlavaLlamaForCausalLM
    assert llava.load_pretrained_model is load_pretrained_model
    assert LlavaLlamaForCausalLM.config_class is LlavaConfig
    assert LlavaMistralForCausalLM.config_class is LlavaMistralConfig
    assert Path(next(iter(llava.__path__))) == ROOT  # VLMEvalKit reads it


# --- a second owner of the import name -------------------------------------------------------------------------------


@pytest.mark.parametrize("owners", [{}, {"llava": ["globalcom2"]}, {"llava": ["globalcom2"] * 2, "x": ["llava-torch"]}])
def test_alone_there_is_nothing_to_warn_about(owners, monkeypatch):
    monkeypatch.setattr(llava, "packages_distributions", lambda: owners)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        llava._warn_about_a_second_owner()


@pytest.mark.parametrize("owners", [["llava-torch"], ["globalcom2", "llava-torch"], ["llava-torch", "globalcom2"]])
def test_a_second_owner_is_named(owners, monkeypatch):
    monkeypatch.setattr(llava, "packages_distributions", lambda: {"llava": owners})
    with pytest.warns(UserWarning, match="llava-torch") as caught:
        llava._warn_about_a_second_owner()
    assert len(caught) == 1
    assert "\n" not in str(caught[0].message)


def installed(folder: Path, metadata: str | None) -> Path:
    """What pip leaves of a distribution that owns `llava`."""
    info = folder / "llava_torch-1.2.2.dist-info"
    info.mkdir()
    (info / "top_level.txt").write_text("llava\n")
    if metadata is not None:
        (info / "METADATA").write_text(metadata)
    return folder


def test_a_second_owner_is_named_at_import(tmp_path):
    path = installed(tmp_path, "Metadata-Version: 2.1\nName: llava-torch\nVersion: 1.2.2\n")
    done = fresh("import llava", path=path)
    assert done.returncode == 0, done.stderr
    assert "llava-torch" in done.stderr
    assert fresh("import llava").stderr == ""


def test_the_remains_of_an_uninstalled_owner_do_no_harm(tmp_path):
    # A dist-info folder without METADATA has no name; an interrupted uninstallation leaves such folders.
    done = fresh("import llava", path=installed(tmp_path, None))
    assert done.returncode == 0, done.stderr
