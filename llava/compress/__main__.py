"""What methods there are: `python -m llava.compress [NAME] [--json]`.

Without a name one line per method; with one its description and its fields. Everything is read off the classes.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import textwrap
from typing import TYPE_CHECKING, Any

from llava.compress import available, method_class
from llava.utils import OneLineParser, run_command

if TYPE_CHECKING:
    from llava.compress.base import Compressor

ENCODER, BETWEEN, LANGUAGE = ("vision encoder", "between", "language model")
# Where the points of a method are, in LLaVA-NeXT-7B: the layers its tower runs, and those of its language model.
ENCODER_DEPTH, LANGUAGE_DEPTH = 23, 32


def describe(name: str) -> dict[str, Any]:
    """Return what the listing says of a method, as plain data.

    Raises:
        InputError: there is no such method.
    """
    cls = method_class(name)
    method, stages = cls(), stages_of(cls)
    return {
        "name": name,
        "stages": stages,
        "paper": cls.paper,
        "needs": {
            "cls_attention": list(method.taps.cls),
            "keys": list(method.taps.keys),
            "cls_feature": method.taps.cls_feature,
            "inside_encoder": list(cls.encoder_reads),
            "encoder_layers": list(method.encoder_points(ENCODER_DEPTH)),
            "language_layers": list(method.points_in(LANGUAGE_DEPTH)),
        },
        "follows_ratio": cls.has_ratio,
        "query_agnostic": cls.query_agnostic,
        # Rows that are looked at are computed apart, so that the models keep the attention they were loaded with. Only
        # layers of the encoder that merge run on SDPA: tokens that stand for several have a bias, as do empty slots.
        "flash_attention": [LANGUAGE] if ENCODER in stages else [ENCODER, LANGUAGE],
        "profiles": list(cls.profiles),
    }


def stages_of(cls: type[Compressor]) -> list[str]:
    """Return where a method acts: the stages whose verb it brings along."""
    from llava.compress.base import Compressor

    own = {
        verb for verb in ("encoder_points", "select", "llm_points") if getattr(cls, verb) != getattr(Compressor, verb)
    }
    found = []
    if "encoder_points" in own:
        found.append(ENCODER)
    elif "select" in own:  # what an encoder method selects is what it left
        found.append(BETWEEN)
    return [*found, LANGUAGE] if "llm_points" in own else found


def describe_fields(cls: type[Compressor]) -> list[dict[str, Any]]:
    """Return every field of a method with its default and its docstring, the method's own first."""
    docs: dict[str, str] = {}
    order: list[str] = []
    for owner in cls.__mro__[:-1]:
        tree = ast.parse(textwrap.dedent(inspect.getsource(owner))).body[0]
        assert isinstance(tree, ast.ClassDef)
        for node, after in zip(tree.body, [*tree.body[1:], None], strict=True):
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                order.append(node.target.id)
                if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
                    docs.setdefault(node.target.id, inspect.cleandoc(str(after.value.value)))
    fields = sorted(dataclasses.fields(cls), key=lambda field: order.index(field.name))
    return [{"name": field.name, "default": field.default, "doc": docs.get(field.name, "")} for field in fields]


def needs_text(needs: dict[str, Any]) -> str:
    """Say in words what a method looks at."""
    parts = [
        f"{label} {_layers(needs[key])}"
        for key, label in (
            ("cls_attention", "[CLS] attention"),
            ("keys", "keys"),
            ("encoder_layers", f"{' and '.join(needs['inside_encoder'])} inside encoder"),
            ("language_layers", "LLM attention"),
        )
        if needs[key]
    ]
    return ", ".join([*parts, *["[CLS] feature"] * needs["cls_feature"]]) or "nothing"


def _layers(layers: list[int]) -> str:
    """Layers as people write them: a run as its ends, others one by one."""
    first, last = layers[0], layers[-1]
    if len(layers) > 2 and layers == list(range(first, last + 1)):
        return f"{first}..{last}"
    return " ".join(map(str, layers))


def listing(methods: list[dict[str, Any]]) -> str:
    """Lay the methods out as an aligned table."""
    rows = [
        (
            "method",
            "stage",
            "paper",
            "looks at (layers, -1 the last)",
            "needs the question",
            "FlashAttention",
            "profiles",
        )
    ]
    for method in methods:
        rows.append(
            (
                method["name"],
                " + ".join(method["stages"]) or "-",
                method["paper"] or "-",
                needs_text(method["needs"]),
                "no" if method["query_agnostic"] else "yes",
                "yes" if ENCODER in method["flash_attention"] else "yes, SDPA where merging",
                ", ".join(method["profiles"]),
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def page(method: dict[str, Any], doc: str, fields: list[dict[str, Any]]) -> str:
    """Lay one method's description out."""
    facts = listing([method]).splitlines()
    lines = [*facts, "", doc, "", "Fields:"]
    for field in fields:
        lines += [f"  {field['name']} = {field['default']!r}", textwrap.indent(field["doc"], " " * 6)]
    return "\n".join(lines)


def main() -> None:
    """Print the listing, or one method's page."""
    parser = OneLineParser(prog="llava.compress", description="What compression methods there are.")
    parser.add_argument("name", nargs="?", help="describe this method and its fields")
    parser.add_argument("--json", action="store_true", help="print JSON: a list of methods, or one object")
    args = parser.parse_args()
    if not args.name:
        methods = [describe(name) for name in available()]
        print(json.dumps(methods) if args.json else listing(methods))
        return
    method, cls = describe(args.name), method_class(args.name)
    doc, fields = inspect.getdoc(cls) or "", describe_fields(cls)
    print(json.dumps(method | {"doc": doc, "fields": fields}) if args.json else page(method, doc, fields))


if __name__ == "__main__":
    run_command(main)
