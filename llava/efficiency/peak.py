"""What a method's own work needs in memory: `python -m llava.efficiency.peak [--method fastv …] [--json]`.

A random LLaVA-NeXT of a given geometry (default: the 7B's widths and tokens, 8 layers) answers about one image with and
without each method. What the method needs on top, at its peak, is set against one eager attention map, heads · L²
numbers, of the uncompressed sequence; the encoder's is that of all views. Exit code 1 if a method needs as much.

Sizes of tensors do not depend on what they hold, so that products and attention may be left out (they are, but with
--compute): every tensor is allocated and freed as ever, and the 7B's widths take seconds. What a fused kernel allocates
inside is not seen.
"""

import argparse
import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from llava.anyres import choose_grid
from llava.compress import attach, available, get
from llava.compress.base import Compressor
from llava.compress.trace import ImageTrace, Trace
from llava.constants import IMAGE_TOKEN_INDEX
from llava.efficiency.__main__ import image_size
from llava.efficiency.build import DTYPES, random_model
from llava.efficiency.meter import Meter
from llava.efficiency.shapes import Language, Model, Tower
from llava.model.miniature import GRIDS, VOCABULARY
from llava.utils import OneLineParser, at_least, run_command

STAGES = ("tower", "llm")
# Where a method's own layers, or its way to spread a ratio over them, do not fit a model of eight.
MOVED = {
    "fastv": "fastv(budget='after')",
    "sparsevlm": "sparsevlm(layers=(1, 3, 5), budget='after')",
    "ficoco_l": "ficoco_l(control_encoding_layer=1, budget='after')",
    "ficoco_vl": "ficoco_vl(control_language_layer=1)",
}


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """Sizes of a model and a request; the defaults are LLaVA-NeXT-7B's, but for the number of layers."""

    width: int = 4096
    inner: int = 11008
    heads: int = 32
    layers: int = 8
    tower_width: int = 1024
    tower_heads: int = 16
    tower_layers: int = 24
    side: int = 24
    text: int = 60
    image_size: tuple[int, int] = (672, 672)
    dtype: str = "bfloat16"

    @property
    def tile(self) -> int:
        """Pixels along a view."""
        return self.side * 14

    @property
    def shape(self) -> Model:
        """The sizes of the whole model, of whose vocabulary little is used."""
        tower = Tower(
            width=self.tower_width,
            inner=4 * self.tower_width,
            layers=self.tower_layers,
            heads=self.tower_heads,
            image_size=self.tile,
            patch_size=14,
        )
        language = Language(
            width=self.width,
            inner=self.inner,
            layers=self.layers,
            heads=self.heads,
            kv_heads=self.heads,
            head_width=self.width // self.heads,
            vocabulary=VOCABULARY,
        )
        pinpoints = tuple((self.tile * cols, self.tile * rows) for cols, rows in GRIDS)
        return Model(name="random", tower=tower, language=language, pinpoints=pinpoints, merge="spatial_unpad")


class Watch(Meter):
    """A meter, and what ran."""

    def __init__(self) -> None:
        """Begin at nothing."""
        super().__init__()
        self.notes = Notes()
        self.own = dict.fromkeys(STAGES, 0)


class Idle(TorchDispatchMode):
    """Leaves products, attention and random numbers out: their results are zeros of the right size."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, or skip it."""
        name = str(func.overloadpacket)
        if name in ("aten.uniform_", "aten.normal_"):
            return args[0].zero_()
        tensors = [arg for arg in args if isinstance(arg, Tensor)]
        if name in ("aten.mm", "aten.addmm", "aten.bmm", "aten.baddbmm"):
            left, right = tensors[-2:]
            return left.new_zeros((*left.shape[:-1], right.shape[-1]))
        if name == "aten._scaled_dot_product_flash_attention_for_cpu":
            query, value = tensors[0], tensors[2]
            rows = torch.zeros(query.shape[:-1], dtype=torch.float32)
            return query.new_zeros((*query.shape[:-1], value.shape[-1])), rows
        return func(*args, **(kwargs or {}))


class Notes(Trace):
    """A trace that holds no tensor, as holding them costs memory."""

    views = 0

    def add(self, method: Compressor, image: ImageTrace) -> None:
        """Take an image in."""
        self.method, self.views = str(method), image.grid.n_views


class _Watched:
    """A method whose verbs are spans of a meter."""

    def __init__(self, method: Compressor, meter: Meter, base: dict[str, int]) -> None:
        self._method, self._meter, self._base = method, meter, base

    def __getattr__(self, name: str) -> Any:
        return getattr(self._method, name)

    def __str__(self) -> str:
        return str(self._method)

    def select_all(self, batch: Any) -> Any:
        with self._meter.span("tower select", self._base):
            return self._method.select_all(batch)

    def reduce_in_encoder(self, tokens: Any) -> Any:
        with self._meter.span(f"tower {tokens.layer} middle", self._base):
            return self._method.reduce_in_encoder(tokens)

    def reduce_in_llm(self, tokens: Any) -> Any:
        middle = f"llm {tokens.layer} middle"
        with self._meter.span(middle if self._method.llm_middle else f"llm {tokens.layer + 1}", self._base):
            return self._method.reduce_in_llm(tokens)


def build(geometry: Geometry) -> Any:
    """Return a random model."""
    return random_model(geometry.shape, dtype=DTYPES[geometry.dtype])


def answer(model: Any, method: Compressor, geometry: Geometry, base: dict[str, int]) -> Watch:
    """Answer about one image with one token; returns the meter that was on. For `base` see `Meter.span`.

    Raises:
        InputError: the method cannot meet its ratio in this model.
    """
    meter = Watch()
    cols, rows = choose_grid(geometry.image_size, geometry.shape.pinpoints, geometry.tile)
    images = [torch.zeros(1 + cols * rows, 3, geometry.tile, geometry.tile, dtype=DTYPES[geometry.dtype])]
    ids = torch.full((1, geometry.text + 1), 5)
    ids[0, geometry.text // 2] = IMAGE_TOKEN_INDEX
    given: dict[str, Any] = {"image_sizes": [geometry.image_size], "trace": meter.notes}
    with _marks(model, meter), _spans(meter, base), meter:
        given["method"] = _Watched(method, meter, base)
        model.generate(ids, images=images, max_new_tokens=1, do_sample=False, **given)
    return meter


@contextmanager
def _marks(model: Any, meter: Meter) -> Iterator[None]:
    """Mark the beginning and the middle of every layer."""
    tower, language = model.get_vision_tower().vision_tower.encoder.layers, model.get_model().layers
    with ExitStack() as hooks:

        def at(module: nn.Module, label: str, behind: bool = False) -> None:
            register = module.register_forward_hook if behind else module.register_forward_pre_hook
            hooks.enter_context(register(lambda *_: meter.mark(label)))

        for stage, layers, middle in (("tower", tower, "layer_norm2"), ("llm", language, "post_attention_layernorm")):
            for index, layer in enumerate(layers):
                at(layer, f"{stage} {index}")
                at(getattr(layer, middle), f"{stage} {index} middle")
                at(layer, f"{stage} {index + 1}", behind=True)
        yield


@contextmanager
def _spans(meter: Meter, base: dict[str, int]) -> Iterator[None]:
    """Count what `attach` recomputes for a method as that method's work."""

    def watched(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(*args: Any) -> Tensor:
            with meter.span(meter.at, base):
                return function(*args)

        return run

    names = ("cls_logits", "patch_keys")
    own = {name: getattr(attach, name) for name in names}
    try:
        for name in names:
            setattr(attach, name, watched(own[name]))
        yield
    finally:
        for name in names:
            setattr(attach, name, own[name])


def compare(plain: Watch, meter: Watch, geometry: Geometry) -> dict[str, Any]:
    """Return a method's extra peak per stage, in bytes and as a share of one eager attention map.

    It is the larger of two: what the method's own work took while it ran, what it had laid by included; and by how much
    the peak between any two marks is higher than without it.
    """
    bytes_of = DTYPES[geometry.dtype].itemsize
    views, sequence = plain.notes.views, plain.notes.sequence_lengths[0]
    maps = {
        "tower": views * geometry.tower_heads * (geometry.side**2 + 1) ** 2 * bytes_of,
        "llm": geometry.heads * sequence**2 * bytes_of,
    }
    found: dict[str, Any] = {
        "method": meter.notes.method,
        "visual_per_layer": list(meter.notes.visual_per_layer[0]),
    }
    for stage in STAGES:
        more = (
            peak - plain.peaks[label]
            for label, peak in meter.peaks.items()
            if label.split()[0] == stage and label in plain.peaks
        )
        extra = max(meter.own[stage], *more, 0)
        found[stage] = {"bytes": extra, "map": maps[stage], "share": extra / maps[stage]}
    return found


def measure(specs: Sequence[str], geometry: Geometry, ratio: float, compute: bool = False) -> list[dict[str, Any]]:
    """Return what `compare` says of every method, given as names or calls; `compute`: do the arithmetic too.

    Raises:
        InputError: a method is unknown, or cannot meet the ratio in this model.
    """
    methods = [get(spec, retention_ratio=ratio if get(spec).follows_ratio else None) for spec in specs]
    with torch.no_grad(), nullcontext() if compute else cast(Any, Idle()):
        model = build(geometry)
        plain = answer(model, get("none"), geometry, {})
        base = plain.points
        return [compare(plain, answer(model, method, geometry, base), geometry) for method in methods]


def text(rows: Sequence[dict[str, Any]]) -> str:
    """Lay the comparison out."""
    head = ("method", *(f"{stage}: {what}" for stage in STAGES for what in ("MiB", "of a map")))
    lines = [head]
    for row in rows:
        cells = ((f"{row[stage]['bytes'] / 2**20:.2f}", f"{row[stage]['share']:.1%}") for stage in STAGES)
        lines.append((row["method"], *(cell for pair in cells for cell in pair)))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in lines)


def build_parser() -> argparse.ArgumentParser:
    """Return the command's parser."""
    parser = OneLineParser(prog="llava.efficiency.peak", description=(__doc__ or "").split(":")[0])
    parser.add_argument("--method", action="append", help="a name or a call; may be repeated (default: all)")
    parser.add_argument("--retention-ratio", type=float, default=0.25)
    parser.add_argument("--image-size", type=image_size, default=Geometry.image_size, help="default: 672x672")
    parser.add_argument("--dtype", choices=DTYPES, default=Geometry.dtype)
    for name, value in vars(Geometry()).items():
        if isinstance(value, int):
            parser.add_argument(
                f"--{name.replace('_', '-')}", type=at_least(1), default=value, help=f"default: {value}"
            )
    parser.add_argument("--compute", action="store_true", help="do the arithmetic too: slow, and the same numbers")
    parser.add_argument("--json", action="store_true", help="print a JSON list")
    return parser


def main() -> None:
    """Run the command."""
    args = build_parser().parse_args()
    geometry = Geometry(**{name: getattr(args, name) for name in vars(Geometry())})
    specs = args.method or [MOVED.get(name, name) for name in available() if name != "none"]
    rows = measure(specs, geometry, args.retention_ratio, args.compute)
    print(json.dumps(rows) if args.json else text(rows))
    if any(not math.isfinite(row[stage]["share"]) or row[stage]["share"] >= 1 for row in rows for stage in STAGES):
        raise SystemExit(1)


if __name__ == "__main__":
    run_command(main)
