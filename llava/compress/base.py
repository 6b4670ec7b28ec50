"""What a compression method is: a frozen record of hyper-parameters that turns `Views` into a `Selection`.

A method never sees a model, a tokenizer or a config. It says which attention it wants to look at (`Taps`), announces
what it intends for an image of a given size (`Plan`) and chooses tokens (`Selection`); everything else is plumbing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from math import log10
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor

from llava import env
from llava.anyres import AnyResGrid
from llava.compress.stages import LayerSizes, LayerTokens, Product, Reduction
from llava.compress.tokens import apportion, budget, fill_shares, top_indices
from llava.constants import InputError

if TYPE_CHECKING:
    from llava.compress.encoding import EncoderSizes, EncoderTokens, Merging

PROFILES = ("corrected", "released", "paper")


def parse_ratio(value: object, source: str = "retention_ratio") -> float:
    """Return a retention ratio as a float.

    Raises:
        InputError: it is no number in (0, 1]; the message names the value and where it came from.
    """
    try:
        ratio = -1.0 if isinstance(value, bool) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        ratio = -1.0
    except OverflowError:  # an integer that may be too long to be written out
        ratio, value = -1.0, f"an integer of about {int(cast(int, value).bit_length() * log10(2))} digits"
    if not 0 < ratio <= 1:
        raise InputError(f"{source} must be a number in (0, 1], got {str(value)[:80]}")
    return ratio


def resolve_ratio(ratio: float | None) -> float:
    """Return the retention ratio in force: the argument, else LLAVA_RETENTION_RATIO, else line 101 of `llava_arch`.

    It is looked up at every use, so that editing or assigning `llava.model.llava_arch.retention_ratio` takes effect.
    """
    if ratio is not None:
        return parse_ratio(ratio)
    if found := env.read(env.RATIO):
        return parse_ratio(found, env.RATIO)
    from llava.model import llava_arch  # here, because llava_arch is built on this module

    return parse_ratio(llava_arch.retention_ratio, "llava_arch.retention_ratio")


class Taps(NamedTuple):
    """What a method reads inside the encoder; layers are counted from the end (-1 = last) or the start (0 = first)."""

    cls: tuple[int, ...] = ()
    keys: tuple[int, ...] = ()
    cls_feature: bool = False


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How the selected tokens of one image become a sequence."""

    unpad: bool = True
    """Leave out the patches that show padding."""
    newline: str = "unpadded"
    """Rows that end in a newline token: `unpadded`, `canvas` (padding too), `occupied` (with a kept token), `none`."""
    thumbnail: str = "raster"
    """Order of the thumbnail's tokens: `raster` or `score` (best first)."""
    placement: str = "raster"
    """Where crop tokens go: `raster` of the canvas, `flat` (crop after crop), `released` (see GlobalCom²)."""


@dataclass(kw_only=True)
class Views:
    """One image after the encoder; view 0 is the thumbnail, the crops follow row-major."""

    features: Tensor
    """`[V, N, C]`, the input of the projector."""
    grid: AnyResGrid
    cls_logits: Mapping[int, Tensor] = field(default_factory=dict)
    """Layer (as in `Taps`) -> `[V, H, 1 + N]`: scaled q·k of the [CLS] query before softmax, column 0 is [CLS]."""
    keys: Mapping[int, Tensor] = field(default_factory=dict)
    """Layer (as in `Taps`) -> `[V, N, C]`: the keys of the patches."""
    layout: Layout = Layout()
    """The sequence format the checkpoint was trained with."""
    valid: Tensor = None  # type: ignore[assignment]
    """Bool `[V, N]`: the patch shows the image; derived from the grid unless given."""
    cls: Tensor | None = None
    """`[V, C]`, the [CLS] feature, if tapped."""
    ids: Tensor | None = None
    """`[V, N']` patch ids, if the encoder already reduced the tokens."""

    def attention(self, layer: int) -> Tensor:
        """Return the [CLS] attention of a tapped layer to patches, `[V, H, N]` in float32; [CLS] has the rest."""
        return self.cls_logits[layer].float().softmax(-1)[:, :, 1:]

    def __post_init__(self) -> None:
        """Check that features and geometry belong together."""
        if self.features.shape[0] != self.grid.n_views:
            raise ValueError(
                f"{self.features.shape[0]} views of features for a grid of {self.grid.n_views} ({self.grid})"
            )
        if self.valid is None:
            valid = self.grid.valid(self.layout.unpad, self.features.device)
            self.valid = valid if self.ids is None else valid.gather(1, self.ids)


@dataclass(frozen=True, kw_only=True)
class Extra:
    """Tokens a method appends that are no patch: `features [E, C]`, each behind patch `anchor` of its `view`."""

    features: Tensor
    view: Tensor
    """`[E]`, view index."""
    anchor: Tensor
    """`[E]`, patch id in that view; -1 puts the token before the whole view, N behind it (crops: the whole canvas)."""


@dataclass(kw_only=True)
class Selection:
    """Which tokens of one image the language model gets to see."""

    order: Tensor
    """`[V, N]`, the tokens of every view by decreasing worth."""
    count: Tensor
    """`[V]`, how many of them are kept."""
    total: int | None = None
    """Sum of `count`, if it follows from sizes alone; None costs one device read when packing."""
    features: Tensor | None = None
    """`[V, N, C]` if the method changed (merged) the features."""
    extra: Extra | None = None
    layout: Layout = Layout()

    @property
    def kept(self) -> Tensor:
        """Bool `[V, N]`: the token is kept."""
        chosen = torch.arange(self.order.shape[1], device=self.order.device) < self.count[:, None]
        return torch.zeros_like(chosen).scatter(1, self.order, chosen)

    @property
    def keep(self) -> list[Tensor]:
        """V index tensors of the kept tokens, in the order they appear in the sequence; for people and tests."""
        best = [order[:count] for order, count in zip(self.order, self.count.tolist(), strict=True)]
        by_score = self.layout.thumbnail == "score"
        return [b if view == 0 and by_score else b.sort().values for view, b in enumerate(best)]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a method intends for an image of a given size, known before any pixel is looked at."""

    ratio: float | None
    """The retention ratio in force, wherever in the model it is met; None where a field asks for something else."""
    patches: int
    """Patches of the uncompressed image, newlines not counted: the ratio's denominator."""
    at_least: int
    at_most: int
    """Bounds of the number of patches kept before the language model; equal where the count follows from the sizes."""

    @property
    def exact(self) -> bool:
        """True where the number of kept patches follows from image size and ratio alone."""
        return self.at_least == self.at_most


@dataclass(frozen=True, kw_only=True)
class Compressor:
    """The base of every method. As it stands everything is kept, in the checkpoint's own format."""

    name: ClassVar[str]
    """Name of the method and of its file."""
    paper: ClassVar[str] = ""
    profiles: ClassVar[tuple[str, ...]] = ("corrected",)
    mixing_profiles: ClassVar[tuple[str, ...]] = ()
    """Profiles in which what is chosen of an image depends on the others of its call: see `mixes_images`."""
    taps: ClassVar[Taps] = Taps()
    query_agnostic: ClassVar[bool] = True
    """The selection does not depend on the prompt, so that all questions about an image can share it."""
    encoder_reads: ClassVar[tuple[str, ...]] = ()
    """What `reduce_in_encoder` looks at, in words for the listing."""
    has_ratio: ClassVar[bool] = True
    """The number of kept tokens follows the retention ratio, unless a field stands in for it: see `fixed`."""
    numbers: ClassVar[tuple[str, ...]] = ()
    """Fields that say how many tokens go, in place of the retention ratio; None where they do not."""
    llm_middle: ClassVar[bool] = False
    """The points in the language model lie between attention and MLP of their layers, not behind them."""

    retention_ratio: float | None = None
    """Kept ÷ uncompressed visual tokens, in (0, 1]; None: LLAVA_RETENTION_RATIO, else line 101 of llava_arch."""
    profile: str = "corrected"
    """Which reading of the method runs: `corrected`, `released` (defects included) or `paper` (literal)."""

    def __post_init__(self) -> None:
        """Refuse values that cannot mean anything."""
        if self.retention_ratio is not None:
            object.__setattr__(self, "retention_ratio", parse_ratio(self.retention_ratio))
        for name in self.numbers:
            if getattr(self, name) is not None and self.retention_ratio is not None:
                given = f"{getattr(self, name)} and {self.retention_ratio:g}"
                raise InputError(f"give {self.name} either {name} or retention_ratio, got {given}")
        if self.profile not in self.profiles:
            raise InputError(f"{self.name} has no profile {self.profile!r}; choose from {', '.join(self.profiles)}")

    def _require(self, field: str, kind: type, low: float, high: float) -> None:
        """Refuse a number that is none, or outside [low, high]; for `__post_init__`."""
        value: Any = getattr(self, field)
        number = isinstance(value, (int, kind)) and not isinstance(value, bool)
        if not number or not low <= value <= high:
            raise InputError(f"{self.name}'s {field} must be in [{low:g}, {high:g}], got {value!r}")

    def _require_choice(self, field: str, choices: tuple[str, ...]) -> None:
        """Refuse a word that is none of the choices; for `__post_init__`."""
        if getattr(self, field) not in choices:
            raise InputError(f"{self.name}'s {field} must be one of {', '.join(choices)}, got {getattr(self, field)!r}")

    def _require_switch(self, *names: str) -> None:
        """Refuse what is neither on nor off; for `__post_init__`."""
        for name in names:
            if not isinstance(getattr(self, name), bool):
                raise InputError(f"{self.name}'s {name} must be True or False, got {getattr(self, name)!r}")

    @property
    def mixes_images(self) -> bool:
        """What is chosen of an image depends on the others of its call: answers are then made one by one."""
        return self.profile in self.mixing_profiles

    @property
    def ratio(self) -> float:
        """The retention ratio in force, resolved now."""
        return resolve_ratio(self.retention_ratio)

    @property
    def fixed(self) -> bool:
        """A field says how many tokens go, in place of the retention ratio."""
        return any(getattr(self, name) is not None for name in self.numbers)

    @property
    def follows_ratio(self) -> bool:
        """The number of kept tokens follows the retention ratio."""
        return self.has_ratio and not self.fixed

    def plan(self, grid: AnyResGrid, layout: Layout = Layout()) -> Plan:
        """Announce how many patches of an image of this size will be kept."""
        patches = grid.n_patches(layout.unpad)
        ratio = None if self.fixed else self.ratio if self.has_ratio else 1.0
        return Plan(ratio=ratio, patches=patches, at_least=patches, at_most=patches)

    def select(self, views: Views) -> Selection:
        """Choose the tokens of one image. Reads nothing back from the device; does not change its argument."""
        return Selection(
            order=top_indices(views.valid.float(), views.valid),
            count=views.valid.sum(1),
            # What the encoder left of the image follows from its size only if the encoder left all of it.
            total=views.grid.n_patches(views.layout.unpad) if views.ids is None else None,
            layout=views.layout,
        )

    def select_all(self, batch: Sequence[Views]) -> list[Selection]:
        """Choose the tokens of every image of a call, each on its own."""
        return [self.select(views) for views in batch]

    def select_products(self, grid: AnyResGrid, layout: Layout, width: int, heads: int) -> tuple[Product, ...]:
        """Return the matrix products of `select` on features of `width`, given attention of so many heads.

        Like the other two accounts, it follows from sizes alone and leaves out what is computed element by element.
        """
        return ()

    def encoder_points(self, depth: int) -> tuple[int, ...]:
        """Layers of the encoder in which `reduce_in_encoder` is asked, ascending; `depth` of its layers run."""
        return ()

    def reduce_in_encoder(self, tokens: "EncoderTokens") -> "Merging":
        """Merge tokens of all views of a call, between attention and MLP of a layer."""
        raise NotImplementedError(f"{self.name} has no encoder_points")

    def encoder_products(self, sizes: "EncoderSizes") -> tuple[Product, ...]:
        """Return the matrix products of `reduce_in_encoder`, run unfused."""
        return ()

    def patches_per_layer(self, grid: AnyResGrid, layout: Layout, depth: int) -> tuple[tuple[int, ...], ...]:
        """Return the patches of every view that enter each layer of the encoder; one entry more, the features.

        Raises:
            InputError: the method cannot meet its ratio in an encoder of that depth.
        """
        return ((grid.patches_per_view,) * grid.n_views,) * (depth + 1)

    @property
    def llm_points(self) -> tuple[int, ...]:
        """Layers of the language model, of 32 if it matters, after which `reduce_in_llm` is asked, ascending."""
        return ()

    def points_in(self, depth: int) -> tuple[int, ...]:
        """The same for a language model of that depth."""
        return self.llm_points

    def checked_points(self, depth: int) -> tuple[int, ...]:
        """The same, for sure in that language model.

        Raises:
            InputError: it has too few layers.
        """
        points = self.points_in(depth)
        # Behind the last layer nothing is left to run; in its middle, its MLP is.
        if points and points[-1] >= depth - (not self.llm_middle):
            raise InputError(
                f"{self} drops tokens after layer {points[-1]}, but the model has {depth} layers; choose an earlier one"
            )
        return points

    def reduce_in_llm(self, tokens: LayerTokens) -> Reduction:
        """Choose what goes on from `tokens.layer`, and how; must keep all text. Reads nothing from the device."""
        raise NotImplementedError(f"{self.name} has no llm_points")

    def llm_products(self, sizes: LayerSizes) -> tuple[Product, ...]:
        """Return the matrix products of `reduce_in_llm`, rows of attention that it asks for included."""
        return ()

    def visual_per_layer(self, n_visual: int, depth: int) -> tuple[int, ...]:
        """Return the image tokens, newlines included, that every layer of the language model will run on.

        Args:
            n_visual: how many enter it.
            depth: its layers.

        Raises:
            InputError: the method cannot meet its ratio in a model of that depth.
        """
        return (n_visual,) * depth

    def visual_left(self, n_visual: int, depth: int) -> int:
        """Return how many of them leave the last layer, in whose middle some may go."""
        return self.visual_per_layer(n_visual, depth)[-1]

    def __str__(self) -> str:
        """The method in call syntax, with the fields that differ from their defaults; `get` reads it back."""
        changed = (f"{f.name}={getattr(self, f.name)!r}" for f in fields(self) if getattr(self, f.name) != f.default)
        return f"{self.name}({', '.join(changed)})"


def split_budget(ratio: float, grid: AnyResGrid, unpad: bool = True) -> tuple[int, int]:
    """Return the patches to keep of the thumbnail, ⌊R·N⌋, and of all crops together, ⌊R·Σ n_j⌋.

    Where both are 0 the thumbnail keeps one, as an image must leave a trace in the sequence.
    """
    thumbnail = budget(ratio, grid.patches_per_view)
    crops = budget(ratio, sum(grid.crop_patches(unpad)))
    return (thumbnail, crops) if thumbnail + crops else (1, 0)


def nearest_count(ratio: float, grid: AnyResGrid) -> int:
    """Return R·N to the nearest, at least one: what releases that keep as much of every view take, padding or not."""
    return max(1, round(ratio * grid.patches_per_view))


def exact_plan(ratio: float, grid: AnyResGrid, unpad: bool = True) -> Plan:
    """Plan of a method that meets `split_budget` exactly."""
    kept = sum(split_budget(ratio, grid, unpad))
    return Plan(ratio=ratio, patches=grid.n_patches(unpad), at_least=kept, at_most=kept)


def uniform_counts(ratio: float, grid: AnyResGrid, unpad: bool = True) -> tuple[int, ...]:
    """Share `split_budget` over the crops by their size: kept patches per view, thumbnail first."""
    thumbnail, total = split_budget(ratio, grid, unpad)
    sizes = torch.tensor(grid.crop_patches(unpad), dtype=torch.float64)
    shares = fill_shares(torch.ones_like(sizes), sizes, total)
    return thumbnail, *apportion(shares, total).tolist()
