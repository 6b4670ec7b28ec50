"""Stage by stage, the naive arrangement and ours in turns: `python -m llava.efficiency.measure --profile-naive`.

Both must come to the same before they are timed: the same pixels, the same features and scores but for rounding, and
under the profile `released` the same patches in the same places.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from llava.anyres import AnyResGrid
from llava.compress import get
from llava.compress.base import Compressor, Layout, Views
from llava.compress.pack import pack
from llava.constants import InputError
from llava.efficiency import naive
from llava.efficiency.bench import Spread, alternate, peak_bytes, table, timed
from llava.efficiency.launches import Launches
from llava.mm_utils import process_images
from llava.model.views import view_images

CHEAP = 5
"""How many times as often stages are run that take little time."""
Arrangements = dict[str, Callable[[], Any]]


STAGES = ("preprocessing", "tower", "selection", "projector")
PROFILES = ("corrected", "released")


def measure(
    model: Any,
    processor: Any,
    image: Image.Image,
    ratios: Sequence[float],
    repeats: int,
    stages: Sequence[str] = STAGES,
) -> list[dict[str, Any]]:
    """Return a row for every stage, and for selection and projector at every ratio below 1.

    Args:
        model: a LLaVA-NeXT; its language model is not run.
        processor: CLIP's preprocessing.
        image: the picture.
        ratios: R.
        repeats: how often the tower is run; cheaper stages are run more often.
        stages: which of `STAGES`; without the tower, features and attention are noise.

    Raises:
        InputError: the model makes a single view of an image, where the naive arrangement selects nothing.
        RuntimeError: the two arrangements do not come to the same.
    """
    pinpoints, tower = model.config.image_grid_pinpoints, model.get_vision_tower()
    if model.config.mm_patch_merge_type != "spatial_unpad" or not pinpoints:
        raise InputError(
            "--profile-naive compares arrangements of LLaVA-NeXT; this model does not cut images into crops"
        )
    rows = []

    def row(name: str, arrangements: Arrangements, times: int = CHEAP) -> None:
        if name.partition(",")[0] in stages:
            rows.append({"stage": name} | _compare(arrangements, repeats * times, tower.device))

    def ours() -> Tensor:
        return process_images([image], processor, model.config)[0]

    pixels = ours()
    _agree("pixels", torch.equal(naive.preprocess(image, processor, pinpoints), pixels))
    row("preprocessing", {"naive": partial(naive.preprocess, image, processor, pinpoints), "ours": ours})

    pixels = pixels.to(tower.device, tower.dtype)
    _, (grid,), layout = view_images([pixels], [image.size], model.config, tower)
    if "tower" in stages:
        run = partial(tower.views, [pixels], [grid], layout, get("globalcom2"))
        (views,), (features, scores) = run(), naive.encode(tower, pixels)
        own = views.cls_logits[-1][:, :, 1:].mean(1)
        _agree("features", _close(features, views.features))
        _agree("scores", _close(scores, own))
        row("tower", {"naive": partial(naive.encode, tower, pixels), "ours": run}, times=1)
    else:
        views = _noise(tower, grid, layout)
    for ratio in ratios:
        if ratio < 1:
            for name, arrangements in _at_ratio(model.get_model(), views, ratio).items():
                row(f"{name}, R = {ratio:g}", arrangements)
    return rows


def _noise(tower: Any, grid: AnyResGrid, layout: Layout) -> Views:
    """What the tower might make of an image."""
    shape, heads = (grid.n_views, 1 + grid.patches_per_view), tower.config.num_attention_heads
    hidden = torch.randn(*shape, tower.hidden_size, device=tower.device, dtype=tower.dtype)
    logits = torch.randn(shape[0], heads, shape[1], device=tower.device)
    return Views(features=hidden[:, 1:], grid=grid, cls_logits={-1: logits}, layout=layout)


def _at_ratio(inner: Any, views: Views, ratio: float) -> dict[str, Arrangements]:
    """Selection and projector at a ratio."""
    newline, project = inner.image_newline, inner.mm_projector
    everything, own = project(views.features), views.cls_logits[-1][:, :, 1:].mean(1)
    chosen = {profile: get(f"globalcom2(profile='{profile}')", retention_ratio=ratio) for profile in PROFILES}
    selection = chosen["released"].select(views)
    sequence, kept = naive.compress(everything, own, views.grid, ratio, newline)
    order = [o[:count].tolist() for o, count in zip(selection.order, selection.count.tolist(), strict=True)]
    _agree("kept patches", order[0] == kept[0] and [*map(sorted, order[1:])] == kept[1:])
    _agree("sequence", len(sequence) == len(pack(views, selection, project, newline).features))
    mark = newline[: views.features.shape[-1]]
    select = {profile: partial(_select, views, method, mark) for profile, method in chosen.items()}
    patches = views.features.flatten(0, 1)[: chosen["corrected"].plan(views.grid).at_least]
    way = partial(naive.compress, everything, own, views.grid, ratio, newline)
    return {
        "selection": {"naive": way, "ours": select["corrected"], "ours, released": select["released"]},
        "projector": {"naive": partial(project, views.features), "ours": partial(project, patches)},
    }


def _select(views: Views, method: Compressor, newline: Tensor) -> Tensor:
    """Select and lay out at the tower's width, as nothing but what is kept is projected."""
    return pack(views, method.select(views), torch.nn.Identity(), newline).features


def _close(one: Tensor, other: Tensor) -> bool:
    """Tell whether they differ by no more than half precision makes of another order of sums."""
    return bool((one - other).float().norm() <= 0.05 * other.float().norm())


def _agree(what: str, same: bool) -> None:
    if not same:
        raise RuntimeError(f"the naive arrangement and ours differ in their {what}: their times say nothing")


def _compare(arrangements: Arrangements, repeats: int, device: torch.device) -> dict[str, Any]:
    """Time arrangements in turns; and, once more each, count what they hold, launch and read."""
    names = list(arrangements)

    def clocked(block: Callable[[], Any]) -> Callable[[], dict[str, float]]:
        return lambda: {"seconds": timed(block, device)[1]}

    taken = alternate([clocked(arrangements[name]) for name in names], repeats)
    found = {}
    for name, times in zip(names, taken, strict=True):
        with Launches(device) as count:
            arrangements[name]()
        found[name] = {
            "seconds": asdict(Spread.of([one["seconds"] for one in times])),
            "peak_bytes": peak_bytes(arrangements[name], device),
            "launches": count.launches,
            "reads": count.reads,
        }
    return found


def text(rows: Sequence[dict[str, Any]]) -> str:
    """Lay the rows out, times in ms."""
    lines: list[tuple[str, ...]] = [
        ("stage", "arrangement", "ms [quartiles]", "naive ÷ it", "peak MiB", "launches", "reads")
    ]
    for row in rows:
        first = row["naive"]["seconds"]["median"]
        for name, one in row.items():
            if name == "stage":
                continue
            low, mid, high = (1e3 * one["seconds"][key] for key in ("low", "median", "high"))
            lines.append(
                (
                    row["stage"],
                    name,
                    f"{mid:.2f} [{low:.2f}, {high:.2f}]",
                    f"{first / one['seconds']['median']:.2f}",
                    f"{one['peak_bytes'] / 2**20:.1f}",
                    str(one["launches"]),
                    str(one["reads"]),
                )
            )
    return table(lines)
