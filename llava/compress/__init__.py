"""Token-compression methods, one per file; the directory is the registry.

`available()` lists them, `get("globalcom2(temperature=5)")` builds one. Importing this package imports none.
"""

from __future__ import annotations

import ast
import dataclasses
import pkgutil
from importlib import import_module
from typing import TYPE_CHECKING, Any

from llava.constants import InputError

if TYPE_CHECKING:
    from llava.compress.base import Compressor

LONGEST = 1000
"""Characters of a method in call syntax."""
_PLUMBING = {
    "__main__",
    "allocation",
    "attach",
    "attention",
    "base",
    "encoding",
    "merge",
    "pack",
    "stages",
    "tokens",
    "trace",
}


def available() -> list[str]:
    """Return the names of all methods."""
    return sorted({module.name for module in pkgutil.iter_modules(__path__)} - _PLUMBING)


def method_class(name: str) -> type[Compressor]:
    """Return the class of a method.

    Raises:
        InputError: there is no such method.
    """
    from llava.compress.base import Compressor

    if name not in available():
        raise InputError(f"unknown method {name!r}; choose from {', '.join(available())}")
    found = vars(import_module(f"{__name__}.{name}")).values()
    classes = [c for c in found if isinstance(c, type) and issubclass(c, Compressor) and vars(c).get("name") == name]
    if len(classes) != 1:
        raise TypeError(f"llava/compress/{name}.py must define exactly one Compressor with name = {name!r}")
    return classes[0]


def get(spec: str, **fallback: Any) -> Compressor:
    """Build a method from its name or from call syntax.

    Args:
        spec: `"globalcom2"` or `"globalcom2(retention_ratio=0.5, profile='released')"`; values are Python literals.
        **fallback: fields to use where the spec does not name them; None means "not given".

    Raises:
        InputError: unknown method, field or value.
    """
    name, given = _parse(spec)
    values = {k: v for source in (fallback, given) for k, v in source.items() if v is not None}
    cls = method_class(name)
    known = [field.name for field in dataclasses.fields(cls)]
    unknown = sorted((values | given).keys() - set(known))
    if unknown:
        raise InputError(f"method {name} has no field {', '.join(unknown)}; it has {', '.join(known)}")
    return cls(**values)


def _parse(spec: str) -> tuple[str, dict[str, Any]]:
    """Split call syntax into a name and literal keyword arguments."""
    if not isinstance(spec, str):
        raise InputError(f"a method is given by its name or as a call, in text; got {type(spec).__name__}")
    if len(spec) > LONGEST:  # a number may have more digits than can be written out again
        raise InputError(f"cannot read method {spec[:40]!r}… of {len(spec)} characters; write at most {LONGEST}")
    try:
        node = ast.parse(spec.strip(), mode="eval").body
        if isinstance(node, ast.Name):
            return node.id, {}
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.args:
            pairs = {keyword.arg: ast.literal_eval(keyword.value) for keyword in node.keywords}
            if len(pairs) < len(node.keywords):
                raise InputError(f"method {spec!r} names a field twice: {', '.join(str(k.arg) for k in node.keywords)}")
            if None not in pairs:
                return node.func.id, {str(key): value for key, value in pairs.items()}
    except InputError:
        raise
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        pass
    raise InputError(f"cannot read method {spec!r}; write a name or a call like globalcom2(profile='released')")
