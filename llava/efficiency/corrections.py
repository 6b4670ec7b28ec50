"""What Tables V and VI of arXiv 2501.05179 do not say: the true figures, and how far from its limit the paper was."""

from collections.abc import Callable
from dataclasses import dataclass

from llava.efficiency.devices import DEVICES
from llava.efficiency.flops import every_layer, prefill, projector, tower
from llava.efficiency.ops import Fusion, total
from llava.efficiency.paper import (
    ELEMENT,
    NOMINAL,
    TABLES,
    Table,
    decode_equation,
    equation_9,
    reduction,
    viewer_footprint,
    viewer_maps,
    viewer_operators,
)
from llava.efficiency.request import limits, nominal, released
from llava.efficiency.roofline import removed_share, seconds
from llava.efficiency.shapes import MODELS

CARD = DEVICES["A100-80G"]
"""What the paper's experiments ran on."""
TEXT = 60
"""Tokens of prompt and question assumed in the limits."""


@dataclass(frozen=True, kw_only=True)
class Speedup:
    """How much faster a row of a table is than the uncompressed model, on one A100-80G."""

    model: str
    ratio: float
    flops: float
    """Ratio of eq. (9)."""
    prefill: float
    """Of the prefill column, both rows on this card."""
    first_token: float
    """Limit with the tower, everything fused, 60 text tokens, in the released arrangement."""
    request: float
    """Limit of the same with a second token, as a one-word answer takes."""
    measured: float
    """By the "Total Time" column."""
    removed: float
    """Φ of the measured speedup against the request's limit."""


def speedups() -> list[Speedup]:
    """Return what every compressed row of both tables could gain, and what it was measured to gain."""
    found = []
    for table in TABLES:
        model, first = MODELS[table.model], table.rows[0]
        base = released(nominal(model, NOMINAL, TEXT, output=2))
        for row in table.rows[1:]:
            after = released(nominal(model, row.tokens, TEXT, output=2))
            limit, measured = limits(base, after, CARD), first.total_time / row.total_time
            ideal = [seconds(viewer_operators(table.shape, tokens), CARD) for tokens in (NOMINAL, row.tokens)]
            found.append(
                Speedup(
                    model=table.model,
                    ratio=row.ratio,
                    flops=equation_9(table.shape, NOMINAL) / equation_9(table.shape, row.tokens),
                    prefill=ideal[0] / ideal[1],
                    first_token=limit["first token"],
                    request=limit["request"],
                    measured=measured,
                    removed=removed_share(measured, limit["request"]),
                )
            )
    return found


def corrections() -> list[str]:
    """Return what has to be known before a figure of these tables is quoted, one or two sentences each."""
    return [_flops(), _equation(), _memory(), _cache(), _cards(), _rest()]


def _flops() -> str:
    seven, thirteen = ([equation_9(t.shape, row.tokens) / 1e12 for row in t.rows] for t in TABLES)
    return (
        "The TFLOPs columns follow different formulas: Table V eq. (9), Table VI LLM-Viewer's operations with softmax, "
        f"norms and LM head. By eq. (9) alike they are {_list(seven, 2)} (7B) and {_list(thirteen, 2)} (13B)."
    )


def _equation() -> str:
    shape = TABLES[0].shape
    true = [100 * reduction(shape, row.ratio) for row in TABLES[0].rows[1:]]
    literal = [100 * reduction(shape, ratio, as_printed=True) for ratio in (0.75, 0.1)]
    return (
        "The second line of eq. (9) has a d too many beside T: taken literally it saves "
        f"{literal[0]:.1f}% at R = 75% and {literal[1]:.1f}% at 10%. Right is 1 - R(8d + 4RT + 6m)/(8d + 4T + 6m) = "
        f"{_list(true, 2)}% (7B). Likewise a decoding step costs L·(8d² + 4Td + 6dm), "
        f"{decode_equation(shape, NOMINAL) / 1e9:.2f} GFLOP at T = {NOMINAL} (7B)."
    )


def _memory() -> str:
    printed = " and ".join(table.rows[0].printed[1] for table in TABLES)
    return (
        "“Total Memory” is what one prefill moves to and from memory, not what it occupies: "
        f"{printed} GB are more than the cards hold. {_both(_moved)}."
    )


def _moved(table: Table) -> str:
    shape, ends = table.shape, (NOMINAL, table.rows[-1].tokens)
    moved = [total(viewer_operators(shape, t)).bytes / 1e9 for t in ends]
    maps = [viewer_maps(shape, t) / 1e9 for t in ends]
    flash = [m - square for m, square in zip(moved, maps, strict=True)]
    fused = [total(prefill(shape, every_layer(shape, t), fusion=Fusion.ALL)).bytes / 1e9 for t in ends]
    held = [viewer_footprint(shape, t) / 1e9 for t in ends]
    # The footprint is LLM-Viewer's, which knows the layers alone.
    layers = ELEMENT * shape.layers * (4 * shape.width**2 + 3 * shape.width * shape.inner)
    others = (MODELS[table.model].weight_bytes - layers) / 1e9
    return (
        f"moved {_saving(moved)} at R = 10%, {maps[0] / moved[0]:.0%} of it at R = 100% the T x T maps of unfused "
        f"attention; with FlashAttention {_saving(flash)}, all fused {_saving(fused)}; occupied {_saving(held, 2)}, "
        f"and at every R {others:.2f} GB more by embedding, LM head, tower and projector"
    )


def _cache() -> str:
    base, half = (row.printed[2] for row in TABLES[0].rows[:3:2])
    per_token = " and ".join(f"{table.shape.kv_bytes_per_token / 2**20:g} MiB" for table in TABLES)
    saved = f"{1 - float(half) / float(base):.2%}"
    return (
        f"The KV cache shrinks by exactly 1 - R: the {saved} of Table V at R = 50% comes of one figure "
        f"that was rounded and then multiplied by 1024 ({base}) and one that was not ({half}). "
        f"A token takes {per_token} (7B, 13B)."
    )


def _cards() -> str:
    first, second = (table.device.name for table in TABLES)
    return (
        f"The prefill columns assume different cards, {first} (7B) and {second} (13B), and must not be compared; both "
        "cards stand beside both columns above."
    )


def _rest() -> str:
    rows = 2 * MODELS[TABLES[0].model].tower.side
    return (
        "All columns leave out the vision tower, the projector, text and newlines. "
        f"Five views cost {_vision(TABLES[0])[0]:.3f} TFLOP in all layers of CLIP-L/336; tower and projector are "
        f"{_share(TABLES[0])} (7B) and {_share(TABLES[1])} (13B) of the operations at R = 100, 25 and 10%. "
        f"Nor are T = 2880·R tokens read: a square image has {NOMINAL + rows} with its newlines, other shapes fewer."
    )


def _vision(table: Table) -> tuple[float, float]:
    """TFLOP of all tower layers on five views, and with the projector on all their patches."""
    model = MODELS[table.model]
    run = total(tower(model.tower, 5, layers=model.tower.layers)).matmul_flops
    return run / 1e12, (run + total(projector(model, NOMINAL)).matmul_flops) / 1e12


def _share(table: Table) -> str:
    vision = _vision(table)[1]
    llm = [equation_9(table.shape, round(ratio * NOMINAL)) / 1e12 for ratio in (1, 0.25, 0.1)]
    return f"{_list([100 * vision / (vision + each) for each in llm], 1)}%"


def _both(part: Callable[[Table], str]) -> str:
    return ". ".join(f"{size}: {part(table)}" for table, size in zip(TABLES, ("7B", "13B"), strict=True))


def _list(values: list[float], digits: int) -> str:
    return " / ".join(f"{value:.{digits}f}" for value in values)


def _saving(ends: list[float], digits: int = 1) -> str:
    return f"{ends[0]:.{digits}f} to {ends[1]:.{digits}f} GB (-{1 - ends[1] / ends[0]:.0%})"
