"""What `python -m llava.efficiency` prints, laid out for people."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from textwrap import fill
from typing import Any

from llava.efficiency.corrections import CARD, TEXT, corrections, speedups
from llava.efficiency.ops import Fusion
from llava.efficiency.paper import TABLES, Figure, Table, figures
from llava.efficiency.request import STAGES
from llava.efficiency.shapes import MODELS
from llava.utils import ratio_text

Data = Mapping[str, Any]
SIDES = ("uncompressed", "compressed")
WIDTH = 118
LEGEND = (
    "unfused: every operator reads and writes memory; flash: attention is one operator and skips what the mask hides; "
    "fused: whatever is no matrix product costs nothing, a bound. Times are those of a device that keeps its maker's "
    "promises and waits for nothing; first token: tower, selection, projector and prefill; request: all of it."
)


def verdict(found: Sequence[Figure]) -> str:
    """Say how many printed figures came out, and name every one that did not."""
    wrong = [figure for figure in found if not figure.agrees]
    lines = [f"{len(found) - len(wrong)} of {len(found)} printed figures come out of their formulas, digit for digit."]
    for figure in wrong:
        lines.append(
            f"NOT REPRODUCED: {figure.table}, {figure.column}, R = {figure.ratio:.0%}: "
            f"printed {figure.printed}, the formula gives {figure.reproduced}"
        )
    return "\n".join(lines)


def paper_data() -> dict[str, Any]:
    """Return the reproduction of Tables V and VI as plain data."""
    found = figures()
    formulas = {table.name: {column.title: column.formula for column in table.columns} for table in TABLES}
    return {
        "figures": [asdict(figure) | {"agrees": figure.agrees} for figure in found],
        "formulas": formulas,
        "reproduced": sum(figure.agrees for figure in found),
        "printed": len(found),
        "corrections": corrections(),
        "speedups": [asdict(speedup) for speedup in speedups()],
    }


def paper_text() -> str:
    """Lay out the reproduction of Tables V and VI: every column with its formula, and beside it what is true."""
    found = figures()
    blocks = [
        fill(
            "Tables V and VI of arXiv 2501.05179, computed. T = 2880·R visual tokens and nothing else, batch 1, "
            "2 bytes per number; d width, m MLP width, L layers, h heads, V vocabulary. Left the printed figure and "
            "what its formula gives, right of the bar what belongs beside them; the footprint is of the layers alone.",
            WIDTH,
        )
    ]
    for table in TABLES:
        blocks.append(f"{table.name}: {MODELS[table.model].name}")
        blocks += [_column(table, column.title, column.formula, found) for column in table.columns]
    blocks.append(verdict(found))
    blocks.append("Corrections")
    blocks += [
        fill(text, WIDTH, initial_indent=f"{number}. ", subsequent_indent="   ")
        for number, text in enumerate(corrections(), 1)
    ]
    return "\n\n".join([*blocks, _speedups()])


def _column(table: Table, title: str, formula: str, found: Sequence[Figure]) -> str:
    rows = [figure for figure in found if (figure.table, figure.column) == (table.name, title)]
    names = list(rows[0].corrected)
    lines = [
        fill(f"{title} = {formula}", WIDTH, initial_indent="  ", subsequent_indent="      "),
        f"{'R':>8}{'T':>7}{'printed':>11}{'formula':>11}     |" + "".join(f"{name:>15}" for name in names),
    ]
    for row, figure in zip(table.rows, rows, strict=True):
        beside = "".join(f"{figure.corrected[name]:15.3f}" for name in names)
        mark = "  =  " if figure.agrees else " !!! "
        ratio = f"{row.ratio:.0%}"
        lines.append(f"{ratio:>8}{row.tokens:7}{figure.printed:>11}{figure.reproduced:>11}{mark}|{beside}")
    return "\n".join(lines)


def _speedups() -> str:
    head = ("FLOPs", "prefill", "first token", "request", "measured", "Φ")
    lines = [
        fill(
            f"Speedups over R = 100% on one {CARD.name}: ratio of eq. (9); of the prefill column; limits with tower, "
            f"projector and {TEXT} text tokens, everything fused, up to the first and to the second token; measured by "
            "“Total Time” (MME, wall clock); Φ = (1 - 1/measured)/(1 - 1/request), the share of the removable time "
            "that was removed.",
            WIDTH,
        ),
        f"{'':16}{'R':>6}" + "".join(f"{name:>13}" for name in head),
    ]
    for found in speedups():
        values = (found.flops, found.prefill, found.first_token, found.request, found.measured)
        cells = "".join(f"{value:13.2f}" for value in values)
        lines.append(f"{found.model:16}{found.ratio:>6.0%}{cells}{found.removed:13.0%}")
    return "\n".join(lines)


def analysis_text(data: Data) -> str:
    """Lay an analysis out."""
    width, height = data["image_size"]
    crops = f" ({data['crops'][0]}x{data['crops'][1]} crops)" if data["crops"] else ""
    head = (
        f"{data['model']}, {data['method']}, {ratio_text(data['requested_ratio'])}; "
        f"image of {width}x{height}, {data['views']} views{crops}; "
        f"{data['text_tokens']} text tokens, {data['output_tokens']} produced; batch {data['batch']}"
    )
    if not isinstance(planned := data["planned"], int):
        head += f"; {planned[0]} to {planned[1]} patches are planned, as what is kept depends on the image"
    blocks = [fill(head, WIDTH), _tokens(data), _operations(data), _moved(data), _memory(data)]
    blocks += [_device(name, times) for name, times in data["devices"].items()]
    return "\n\n".join([*blocks, fill(LEGEND, WIDTH)])


def _tokens(data: Data) -> str:
    rows = {
        "patches kept": "patches",
        "newlines": "newlines",
        "appended by the method": "extra",
        "visual tokens": "visual_tokens",
        "mean over layers": "mean_visual_tokens_per_layer",
        "sequence with text": "sequence",
    }
    return "\n".join(
        [
            _heading("Tokens per image"),
            *(_line(name, (data[side][key] for side in SIDES), "g") for name, key in rows.items()),
        ]
    )


def _operations(data: Data) -> str:
    lines = [f"{_heading('Operations (TFLOP)')}{'TMAC before':>14}{'after':>14}"]
    for name in (*STAGES, "all"):
        stages = STAGES if name == "all" else (name,)
        flops, macs = (
            [sum(data[side]["stages"][stage][key] for stage in stages) / 1e12 for side in SIDES]
            for key in ("flops", "macs")
        )
        lines.append(_line(name, flops, ".4f") + "".join(f"{value:14.4f}" for value in macs))
    return "\n".join(lines)


def _moved(data: Data) -> str:
    lines = [_heading("Bytes moved (GB)")]
    for fusion in Fusion:
        for stage in ("tower", "prefill", "decode"):
            values = (data[side]["bytes_moved"][fusion][stage] / 1e9 for side in SIDES)
            lines.append(_line(f"{stage}, {fusion}", values, ".3f"))
    return "\n".join(lines)


def _memory(data: Data) -> str:
    lines = [_heading("Memory occupied"), _line("KV cache (MiB)", (data[s]["kv_bytes"] / 2**20 for s in SIDES), ".2f")]
    for fusion in (Fusion.NONE, Fusion.ATTENTION):
        values = (sum(data[side]["footprint"][fusion].values()) / 1e9 for side in SIDES)
        lines.append(_line(f"footprint, {fusion} (GB)", values, ".3f"))
    return "\n".join(lines)


def _device(name: str, found: Data) -> str:
    lines = [_heading(f"{name}: least time (ms)")]
    for fusion in Fusion:
        for stage in ("tower", "prefill", "first token", "request"):
            values = (1e3 * found[fusion][side][stage] for side in SIDES)
            lines.append(_line(f"{stage}, {fusion}", values, ".3f", times=True))
        steps = (1e3 * found[fusion]["decode_step"][side] for side in SIDES)
        lines.append(_line(f"one decoding step, {fusion}", steps, ".3f", times=True))
    return "\n".join([*lines, _line("largest batch", (found["largest_batch"][side] for side in SIDES), "g")])


def _heading(title: str) -> str:
    return f"{title:34}{'uncompressed':>14}{'compressed':>14}{'ratio':>9}"


def _line(name: str, values: Iterable[float], form: str, times: bool = False) -> str:
    """Lay both values out with their ratio: what is left of the first, or how many times faster the second is."""
    before, after = values
    ratio = "-" if not before or not after else f"{before / after:.2f}x" if times else f"{after / before:.1%}"
    return f"{name:34}{before:>14{form}}{after:>14{form}}{ratio:>9}"
