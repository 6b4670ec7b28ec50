"""Tables V and VI of arXiv 2501.05179: every theoretical figure from its formula, beside what is printed.

The four theoretical columns are functions of the retention ratio R alone: T = 2880·R visual tokens and nothing else (no
text, no newlines, no vision tower, no projector), batch 1, 2 bytes per number. They are those of the paper's eq. (9)
and of LLM-Viewer (commit 472f71f), whose operators are written out here with their quirks: the activation is charged at
width d instead of m, the LM head at one operation per multiply-accumulate, for the last position only, attention is
unfused and knows no mask, and there are no rotary positions. What users need instead is in `flops` and `memory`.
"""

from collections.abc import Callable
from dataclasses import dataclass

from llava.efficiency.devices import DEVICES, Device
from llava.efficiency.ops import ADD, GATE, NORM, SOFTMAX, Op, Ops, linear, pointwise, total
from llava.efficiency.roofline import seconds
from llava.efficiency.shapes import MODELS, Language

NOMINAL = 2880
"""Visual tokens at R = 1: five views of 24 x 24."""
ELEMENT = 2
"""Bytes of a float16."""


def viewer_operators(shape: Language, tokens: int) -> Ops:
    """Return one prefill as LLM-Viewer counts it: per layer ten kinds of operators, and the LM head once."""
    d, m, h, t = shape.width, shape.inner, shape.heads, tokens
    widths = {"q": (d, d), "k": (d, d), "v": (d, d), "o": (d, d), "gate": (d, m), "up": (d, m), "down": (m, d)}
    product = Op(name="q·k", macs=t * t * d, activations=(2 * t * d + h * t * t) * ELEMENT)
    layer = (
        *(linear(name, t, *sizes, ELEMENT) for name, sizes in widths.items()),
        product,
        Op(name="scores·v", macs=product.macs, activations=product.activations),
        pointwise("softmax", h * t * t, SOFTMAX, 2, ELEMENT),
        pointwise("norm", t * d, NORM, 2, ELEMENT),
        pointwise("norm", t * d, NORM, 2, ELEMENT),
        pointwise("add", t * d, ADD, 2, ELEMENT),
        pointwise("add", t * d, ADD, 2, ELEMENT),
        pointwise("activation", t * d, GATE, 3, ELEMENT),
    )
    v = shape.vocabulary
    head = Op(name="head", other=d * v, weights=d * v * ELEMENT, activations=(d + v) * ELEMENT)
    return (*(op.repeated(shape.layers) for op in layer), head)


def equation_9(shape: Language, tokens: int) -> int:
    """Return the first line of eq. (9) over all layers, in FLOPs: L·(8Td² + 4T²d + 6Tdm)."""
    d, m = shape.width, shape.inner
    return shape.layers * (8 * tokens * d**2 + 4 * tokens**2 * d + 6 * tokens * d * m)


def reduction(shape: Language, ratio: float, tokens: int = NOMINAL, as_printed: bool = False) -> float:
    """Return the share of FLOPs saved, eq. (9)'s second line: 1 - R(8d + 4RT + 6m) / (8d + 4T + 6m).

    Args:
        shape: gives d and m.
        ratio: R.
        tokens: T at R = 1.
        as_printed: with the spurious d beside T that the paper prints.
    """
    d, m = shape.width, shape.inner
    squared = 4 * tokens * (d if as_printed else 1)
    return 1 - ratio * (8 * d + ratio * squared + 6 * m) / (8 * d + squared + 6 * m)


def decode_equation(shape: Language, tokens: int) -> int:
    """Return a decoding step over all layers, in FLOPs: L·(8d² + 4Td + 6dm), the paper's misprint mended."""
    d, m = shape.width, shape.inner
    return shape.layers * (8 * d**2 + 4 * tokens * d + 6 * d * m)


def viewer_footprint(shape: Language, tokens: int) -> int:
    """Return LLM-Viewer's `memory_consumption` in bytes: weights of the layers, KV cache, one layer's outputs.

    Embedding, LM head, tower and projector are left out, which is 1.2 GB (7B) or 1.3 GB (13B).
    """
    d, m, h, t = shape.width, shape.inner, shape.heads, tokens
    weights = shape.layers * (4 * d**2 + 3 * d * m)
    outputs = 9 * t * d + 2 * t * m + 2 * h * t**2
    return ELEMENT * (weights + outputs) + viewer_kv(shape, tokens)


def viewer_kv(shape: Language, tokens: int) -> int:
    """Return the KV cache in bytes: 4TLd at 2 bytes per number."""
    return 2 * ELEMENT * tokens * shape.layers * shape.width


def page_value(size: float) -> str:
    """Return bytes as LLM-Viewer's web page shows them and the paper took them over, in "MB".

    From 10⁹ on the page shows G with one decimal, which the paper multiplied by 1024; below, whole M, as they are.
    (The rounding is inferred from the ten printed values.)
    """
    return f"{float(f'{size / 1e9:.1f}') * 1024:g}" if size >= 1e9 else f"{size / 1e6:.0f}"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of a table, as printed."""

    ratio: float
    """R."""
    printed: tuple[str, str, str, str]
    """TFLOPs, "Total Memory (GB)", "KV-Cache (MB)", "Prefill Time (ms)", digit for digit."""
    total_time: int
    """"Total Time": wall clock of 2374 MME questions in seconds; measured, so not computed here."""

    @property
    def tokens(self) -> int:
        """T."""
        return round(self.ratio * NOMINAL)


@dataclass(frozen=True, kw_only=True)
class Column:
    """One theoretical column: its formula, and what should have stood there."""

    title: str
    formula: str
    compute: Callable[[Language, int], float]
    """From model and T."""
    form: Callable[[float], str]
    """As the table prints it."""
    corrected: dict[str, Callable[[Language, int], float]]
    """What it is called -> from model and T, in the unit of the name."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """One table of the paper."""

    name: str
    model: str
    """Name in `MODELS`."""
    device: Device
    """The GPU that its prefill times assume."""
    rows: tuple[Row, ...]
    columns: tuple[Column, ...]

    @property
    def shape(self) -> Language:
        """The language model."""
        return MODELS[self.model].language


def _traffic(shape: Language, tokens: int) -> int:
    return total(viewer_operators(shape, tokens)).bytes


def _operations(shape: Language, tokens: int) -> int:
    return total(viewer_operators(shape, tokens)).flops


def viewer_maps(shape: Language, tokens: int) -> int:
    """Return the bytes of T x T attention maps among what is moved: written, read and written by softmax, read."""
    return ELEMENT * shape.layers * 4 * shape.heads * tokens**2


def _milliseconds(device: Device) -> Callable[[Language, int], float]:
    return lambda shape, tokens: 1e3 * seconds(viewer_operators(shape, tokens), device)


def _columns(tflops: Column, device: Device) -> tuple[Column, ...]:
    gigabytes = "{:.3g}".format
    return (
        tflops,
        Column(
            title="Total Memory (GB)",
            formula="bytes moved ÷ 1e9 = 2·{L·[4d² + 3dm + 8Td + 3T(d+m) + 4Td + 4hT² + 11Td] + dV + d + V} ÷ 1e9",
            compute=lambda shape, t: _traffic(shape, t) / 1e9,
            form=gigabytes,
            corrected={
                "moved GB": lambda shape, t: _traffic(shape, t) / 1e9,
                "flash GB": lambda shape, t: (_traffic(shape, t) - viewer_maps(shape, t)) / 1e9,
                "footprint GB": lambda shape, t: viewer_footprint(shape, t) / 1e9,
            },
        ),
        Column(
            title="KV-Cache (MB)",
            formula="4TLd bytes as a web page rounds them: G to one decimal, then x 1024; below 1 G whole M",
            compute=viewer_kv,
            form=page_value,
            corrected={
                "MB": lambda shape, t: viewer_kv(shape, t) / 1e6,
                "MiB": lambda shape, t: viewer_kv(shape, t) / 2**20,
            },
        ),
        Column(
            title="Prefill Time (ms)",
            formula=(
                f"Σ over operators of max(OPs ÷ 312e12, bytes ÷ {device.bandwidth / 1e9:.0f}e9), an {device.name}: "
                "L·(7 linear layers, q·kᵀ, scores·v, softmax at 5hT² OPs, 2 norms at 7Td OPs, 2 additions, "
                "activation at 2Td OPs and 3Td elements) + LM head"
            ),
            compute=_milliseconds(device),
            form="{:.1f}".format,
            corrected={f"{name} ms": _milliseconds(DEVICES[name]) for name in ("A100-40G", "A100-80G")},
        ),
    )


_TFLOPS = {
    "eq. (9)": lambda shape, t: equation_9(shape, t) / 1e12,
    "OPs": lambda shape, t: _operations(shape, t) / 1e12,
}
_EQUATION = Column(
    title="TFLOPs",
    formula="eq. (9), first line: L·(8Td² + 4T²d + 6Tdm) ÷ 1e12; 2 per MAC, no LM head, no causal mask",
    compute=_TFLOPS["eq. (9)"],
    form="{:.2f}".format,
    corrected=_TFLOPS,
)
_VIEWER = Column(
    title="TFLOPs",
    formula="LLM-Viewer's OPs: {L·[8Td² + 4T²d + 6Tdm + 5hT² + 18Td] + dV} ÷ 1e12, not eq. (9)",
    compute=_TFLOPS["OPs"],
    form="{:.1f}".format,
    corrected=_TFLOPS,
)

TABLES = (
    Table(
        name="Table V",
        model="llava-next-7b",
        device=DEVICES["A100-40G"],
        rows=(
            Row(ratio=1.0, printed=("41.65", "107", "1536", "170.7"), total_time=15 * 60 + 35),
            Row(ratio=0.75, printed=("30.42", "70.7", "1126.4", "119.9"), total_time=12 * 60 + 17),
            Row(ratio=0.5, printed=("19.74", "43.1", "755", "74.5"), total_time=9 * 60 + 21),
            Row(ratio=0.25, printed=("9.60", "23.9", "377", "34.6"), total_time=7 * 60 + 27),
            Row(ratio=0.1, printed=("3.77", "16.5", "151", "13.3"), total_time=5 * 60 + 48),
        ),
        columns=_columns(_EQUATION, DEVICES["A100-40G"]),
    ),
    Table(
        name="Table VI",
        model="llava-next-13b",
        device=DEVICES["A100-80G"],
        rows=(
            Row(ratio=1.0, printed=("80.0", "172", "2457.6", "295.1"), total_time=20 * 60 + 39),
            Row(ratio=0.75, printed=("58.7", "116", "1843.2", "211.6"), total_time=16 * 60 + 30),
            Row(ratio=0.5, printed=("38.3", "72.4", "1228.8", "134.6"), total_time=12 * 60 + 49),
            Row(ratio=0.25, printed=("18.7", "42.4", "590", "64.1"), total_time=8 * 60 + 48),
            Row(ratio=0.1, printed=("7.4", "30.8", "236", "25.0"), total_time=6 * 60 + 53),
        ),
        columns=_columns(_VIEWER, DEVICES["A100-80G"]),
    ),
)


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One printed figure, what its formula gives, and what should have stood there."""

    table: str
    column: str
    ratio: float
    printed: str
    reproduced: str
    """The formula's value in the form the table prints."""
    value: float
    """The formula's value."""
    corrected: dict[str, float]

    @property
    def agrees(self) -> bool:
        """Whether the formula gives the printed digits."""
        return self.printed == self.reproduced


def figures() -> list[Figure]:
    """Return every printed figure of the theoretical columns, by table, column and row."""
    found = []
    for table in TABLES:
        for index, column in enumerate(table.columns):
            for row in table.rows:
                value = column.compute(table.shape, row.tokens)
                found.append(
                    Figure(
                        table=table.name,
                        column=column.title,
                        ratio=row.ratio,
                        printed=row.printed[index],
                        reproduced=column.form(value),
                        value=value,
                        corrected={name: of(table.shape, row.tokens) for name, of in column.corrected.items()},
                    )
                )
    return found
