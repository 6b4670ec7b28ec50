"""One request, an image and a question, as numbers of tokens; and what each of its stages runs."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from llava.constants import InputError
from llava.efficiency.devices import Device
from llava.efficiency.flops import (
    decode_step,
    every_layer,
    kv_bytes,
    prefill,
    products,
    projector,
    selection,
    tower,
)
from llava.efficiency.memory import Footprint, footprint
from llava.efficiency.ops import Fusion, Ops
from llava.efficiency.roofline import seconds
from llava.efficiency.shapes import Model

if TYPE_CHECKING:
    from llava.compress.stages import Product

STAGES = ("tower", "selection", "projector", "prefill", "decode")
"""What a method costs itself is `selection`, be it done inside the tower, behind it or inside the language model."""
VISION = STAGES[:3]


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the stages of one request run on."""

    model: Model
    views: int
    """Images the tower encodes: the thumbnail and the crops."""
    kept: int
    """Patches the method keeps before the language model."""
    tokens: tuple[int, ...]
    """Tokens entering every layer of the language model: visual ones, newlines and text."""
    mlp_tokens: tuple[int, ...] | None = None
    """Tokens entering every layer's MLP, if a method drops some in between; None: the same."""
    cached: tuple[int, ...] | None = None
    """Tokens in every layer's KV cache after prefill; None: those that entered the layer."""
    runs: tuple[int, ...] | None = None
    """First layers of runs that share their positions, which are rotated anew behind every point of a method; None: of
    those that see the same number of tokens."""
    output: int = 1
    """Tokens produced; the first comes of prefill, every further one of a decoding step."""
    batch: int = 1
    """Requests alike that are run together."""
    projected: int | None = None
    """Patches the projector sees; None: the kept ones."""
    tower_layers: int | None = None
    """Layers of the tower that are run; None: those the features need."""
    tower_tokens: tuple[int, ...] | None = None
    """Tokens of a view that enter each of them, one entry more for the features; None: all."""
    cls_rows: int = 0
    """Layers of the tower whose [CLS] attention is recomputed."""
    key_rows: int = 0
    """Layers of the tower whose keys are recomputed."""
    own: tuple["Product", ...] = ()
    """Matrix products that the method itself runs, wherever it does, but for those that the two rows above say."""

    def __post_init__(self) -> None:
        """Refuse numbers that no request has.

        Raises:
            InputError: one is too small, or tokens are not given for every layer.
        """
        for name, low in {"views": 0, "kept": 0, "output": 1, "batch": 1}.items():
            if getattr(self, name) < low:
                raise InputError(f"{name} must be at least {low}, got {getattr(self, name)}")
        for counts in (self.tokens, self.mlp_tokens, self.cached):
            if counts is not None and len(counts) != self.model.language.layers:
                raise InputError(f"give tokens for each of {self.model.language.layers} layers, got {len(counts)}")

    @property
    def context(self) -> tuple[int, ...]:
        """Tokens in every layer's KV cache when decoding begins."""
        return self.tokens if self.cached is None else self.cached

    @property
    def kv_bytes(self) -> int:
        """What the KV cache occupies after prefill, in bytes."""
        return kv_bytes(self.model.language, self.context, self.batch)

    def footprint(self, fusion: Fusion = Fusion.ATTENTION) -> Footprint:
        """What must fit into memory at once."""
        return footprint(self.model, self.tokens, cached=self.context, batch=self.batch, fusion=fusion)

    def decode_step(self, done: int = 1, fusion: Fusion = Fusion.NONE) -> Ops:
        """The operators of the step after `done` tokens were produced."""
        context = [count + done - 1 for count in self.context]
        return decode_step(self.model.language, context, runs=self.runs, batch=self.batch, fusion=fusion)

    def stages(self, fusion: Fusion = Fusion.NONE) -> dict[str, Ops]:
        """The operators of every stage, in the order of `STAGES`."""
        model, views, kept = self.model, self.batch * self.views, self.batch * self.kept
        projected = kept if self.projected is None else self.batch * self.projected
        rows = {"cls_rows": self.cls_rows, "key_rows": self.key_rows}
        steps = (self.decode_step(done, fusion) for done in range(1, self.output))
        return {
            "tower": tower(model.tower, views, layers=self.tower_layers, tokens=self.tower_tokens, fusion=fusion),
            "selection": (
                *selection(model.tower, views, kept, **rows, fusion=fusion),
                *products(self.own, batch=self.batch),
            ),
            "projector": projector(model, projected, fusion=fusion),
            "prefill": prefill(
                model.language,
                self.tokens,
                mlp_tokens=self.mlp_tokens,
                runs=self.runs,
                batch=self.batch,
                fusion=fusion,
            ),
            "decode": tuple(op for step in steps for op in step),
        }

    def seconds(self, device: Device, fusion: Fusion = Fusion.ALL) -> dict[str, float]:
        """The least time of every stage, in seconds."""
        return {name: seconds(ops, device) for name, ops in self.stages(fusion).items()}


def nominal(model: Model, visual: int, text: int = 0, *, views: int = 5, output: int = 1) -> Request:
    """Return a request as papers count it: `visual` tokens without newlines, kept of as many as the views have.

    Args:
        model: the model.
        visual: tokens kept, R · 2880 for 5 views of CLIP-L/336.
        text: tokens of the prompt.
        views: the tower encodes.
        output: tokens produced.
    """
    tokens = every_layer(model.language, visual + text)
    return Request(model=model, views=views, kept=visual, tokens=tokens, output=output, cls_rows=1)


def limits(base: Request, request: Request, device: Device, fusion: Fusion = Fusion.ALL) -> dict[str, float]:
    """Return by how much a request can at best be faster than another.

    Args:
        base: the uncompressed one.
        request: the compressed one.
        device: both run on it.
        fusion: what is moved.

    Returns:
        Ratios of times: of the language model's prefill alone, of everything up to the first token, and of the request.
    """
    before, after = base.seconds(device, fusion), request.seconds(device, fusion)
    spans = {"prefill": ("prefill",), "first token": (*VISION, "prefill"), "request": STAGES}
    return {
        name: sum(before[stage] for stage in stages) / sum(after[stage] for stage in stages)
        for name, stages in spans.items()
    }


def released(request: Request) -> Request:
    """Return the same request in the arrangement of the authors' code: all tower layers, everything projected."""
    tower = request.model.tower
    everything = request.views * tower.patches
    return replace(request, tower_layers=tower.layers, tower_tokens=None, projected=everything, cls_rows=0)
