"""The gates' measures on stand-ins of which the right figure is known."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llava.compress.base import Compressor, Selection, Views
from llava.constants import InputError
from llava.eval.benchmarks.base import Result
from llava.pocket import gates
from llava.pocket.gates import attention_on_things, controls, coverage, home, patches_of, sight
from llava.pocket.model import build_tower
from llava.pocket.questions import TASKS
from llava.pocket.scenes import CHARACTERS, KINDS, SHAPES, SIDE, Scene, Thing
from llava.pocket.see import ASPECTS, Seeing, label_views
from llava.pocket.train import Anyres, processor
from llava.pocket.write import write_benchmarks
from tests.pocket.tiny import VISION, arrange, checkpoint, drawn, put, views_of

CLASSES = sum(ASPECTS.values())


def seer(scenes: Sequence[Scene], labels: Any) -> Any:
    """A `Seeing` that sees, in one scene after the other, what `labels` says of it: `[V, 3, SIDE, SIDE]`."""
    told = iter(scenes)

    def tower(pixels: Tensor, output_hidden_states: bool) -> Any:
        truth = labels(next(told)).flatten(2)
        assert len(pixels) == len(truth)
        seen = [F.one_hot(truth[:, place], size) for place, size in enumerate(ASPECTS.values())]
        patches = torch.cat(seen, -1).float()
        return SimpleNamespace(hidden_states=[None, F.pad(patches, (0, 0, 1, 0)), None])

    return SimpleNamespace(tower=tower, select_layer=-2, heads=lambda hidden: hidden)


def look(labels: Any, scenes: Sequence[Scene]) -> dict[str, float]:
    return sight(seer(scenes, labels), scenes, processor(), Anyres())


def names(thing: Thing) -> list[tuple[str, str]]:
    """What is asked of a thing: (name of the figure, right answer)."""
    size = "big" if thing.big else "small"
    if thing.kind in SHAPES:
        return [(f"shape {size}", thing.kind)]
    digit = "handwritten digit" if thing.kind == "note" else "printed digit"
    return [(f"{digit if c.isdecimal() else 'letter'} {size}", c) for c in thing.text]


def shares(scenes: Sequence[Scene]) -> dict[str, Counter[str]]:
    found: dict[str, Counter[str]] = defaultdict(Counter)
    for scene in scenes:
        for name, answer in (pair for thing in scene.things for pair in names(thing)):
            found[name][answer] += 1
    return found


def test_who_sees_the_truth_is_always_right_in_crops() -> None:
    scenes = drawn("test")[:40]
    found = look(label_views, scenes)
    assert {name for name in found if name.endswith("crop")} == {f"{name} crop" for name in shares(scenes)}
    assert all(value == 1 for name, value in found.items() if name.endswith("crop"))


def test_what_no_thumbnail_patch_shows_is_wrong_there() -> None:
    """Of a small sign's letters on a canvas two views wide every second one; without shapes and on one view's width."""
    sign = put("sign", "red", 2, 3, 3, 2, text="CAT")
    found = look(label_views, [arrange(sign, grid=(2, 1))])
    assert found == {"letter small crop": 1, "letter small thumbnail": pytest.approx(1 / 3)}
    assert look(label_views, [arrange(sign, grid=(1, 2))])["letter small thumbnail"] == 1
    digits = put("note", "red", 4, 13, 4, 2, text="35", big=True)
    found = look(label_views, [arrange(digits, put("ring", "red", 20, 20), grid=(2, 2))])
    assert found == {
        **{f"handwritten digit big {where}": 1 for where in ("crop", "thumbnail")},
        **{f"shape small {where}": 1 for where in ("crop", "thumbnail")},
    }


def test_who_always_says_the_same_is_right_as_often_as_it_is_so() -> None:
    """Everything a ring that bears a 7: each figure is the share of rings or sevens."""
    scenes = drawn("test")
    same = torch.tensor([1 + KINDS.index("ring"), 1, 1 + CHARACTERS.index("7")])
    found = look(lambda scene: same[None, :, None, None].expand(label_views(scene).shape), scenes)
    for name, answers in shares(scenes).items():
        said = "ring" if name.startswith("shape") else "7"
        assert found[f"{name} crop"] == pytest.approx(answers[said] / sum(answers.values()))


def test_most_patches_decide_and_nothing_is_no_answer() -> None:
    """A ring of sixteen patches: fifteen that see nothing are outvoted, nine that see a cross are not."""
    ring = put("ring", "blue", 13, 1, 4, 4, big=True)
    scene = arrange(ring, grid=(2, 1))

    def seen(crosses: int, nothing: int) -> dict[str, float]:
        labels = label_views(scene)
        row = labels[2, 0, 1:5, 1:5].flatten()
        row[:crosses], row[crosses : crosses + nothing] = 1 + KINDS.index("cross"), 0
        labels[2, 0, 1:5, 1:5] = row.view(4, 4)
        return look(lambda _: labels, [scene])

    assert seen(0, 15)["shape big crop"] == 1
    assert seen(7, 0)["shape big crop"] == 1
    assert seen(9, 0)["shape big crop"] == 0
    assert seen(9, 0)["shape big thumbnail"] == 1


def test_an_untrained_tower_is_measured() -> None:
    found = sight(Seeing(build_tower(*VISION)), drawn("test")[:10], processor(), Anyres())
    assert all(0 <= value <= 1 for value in found.values())
    assert min(value for name, value in found.items() if "crop" in name) < 0.5


def test_things_are_at_home_in_one_crop() -> None:
    scene = arrange(put("ring", "red", 13, 25, 4, 4, big=True), put("note", "blue", 1, 2, 2, 1, text="12"), grid=(3, 3))
    ring, note = scene.things
    assert (home(scene, ring), home(scene, note)) == (1 + 2 * 3 + 1, 1)
    rows, columns = patches_of(scene, ring, False).nonzero().unbind(1)
    assert (sorted(set(rows.tolist())), sorted(set(columns.tolist()))) == ([1, 2, 3, 4], [1, 2, 3, 4])
    for number, scene in enumerate(drawn("test")[:20]):
        labels = label_views(scene)[:, 0] > 0
        found = torch.zeros_like(labels)
        for thing in scene.things:
            found[home(scene, thing)] |= patches_of(scene, thing, False)
            found[0] |= patches_of(scene, thing, True)
        assert torch.equal(found, labels), number


class Staring:
    """A tower whose [CLS] token looks, in its layer 1, at patches as much as a weight says."""

    def __init__(self, scenes: Sequence[Scene], weigh: Any) -> None:
        self.told, self.weigh = iter(scenes), weigh
        self.encoder = SimpleNamespace(layers=[None, self])
        self.layer_norm1 = lambda hidden: hidden
        self.self_attn = SimpleNamespace(num_heads=1, scale=1.0, q_proj=torch.ones_like, k_proj=lambda hidden: hidden)

    def __call__(self, pixels: Tensor, output_hidden_states: bool) -> Any:
        weights = self.weigh(label_views(next(self.told))[:, 0].flatten(1) > 0).float()
        own = torch.full((len(pixels), 1), 5.0)  # what [CLS] gives itself is no patch's
        return SimpleNamespace(hidden_states=[None, torch.cat((own, weights), 1).log()[..., None], None])


def stare(scenes: Sequence[Scene], weigh: Any) -> dict[str, float]:
    return attention_on_things(Staring(scenes, weigh), 1, scenes, processor(), Anyres())


def test_attention_that_is_even_is_the_area() -> None:
    scenes = drawn("test")[:30]
    found = stare(scenes, torch.ones_like)
    areas: dict[str, list[float]] = {"thumbnail": [], "crop": []}
    for scene in scenes:
        for view, labels in enumerate(label_views(scene)[:, 0]):
            if labels.any():
                areas["crop" if view else "thumbnail"].append(float((labels > 0).double().mean()))
    for where, values in areas.items():
        wanted = sum(values) / len(values)
        assert found[f"area {where}"] == pytest.approx(wanted)
        assert found[f"attention {where}"] == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize(("on", "off"), [(1.0, 1e-9), (1e-9, 1.0), (3.0, 1.0)])
def test_attention_is_the_share_that_falls_on_things(on: float, off: float) -> None:
    """Of a thing of nine patches in a crop of 144, and of what of it the thumbnail shows."""
    scene = arrange(put("sign", "red", 0, 0, 3, 3), grid=(1, 2))
    found = stare([scene], lambda things: torch.where(things, on, off))
    seen = int((label_views(scene)[0, 0] > 0).sum())
    for where, patches in (("crop", 9), ("thumbnail", seen)):
        assert found[f"area {where}"] == pytest.approx(patches / 144)
        wanted = patches * on / (patches * on + (144 - patches) * off)
        assert found[f"attention {where}"] == pytest.approx(wanted, rel=1e-4, abs=1e-6)


def test_attention_is_that_of_clip_itself() -> None:
    """On a real tower: the map that CLIP's own eager attention returns, heads averaged, [CLS] left out."""
    tower, scene = build_tower(*VISION), drawn("test")[1]
    last = VISION[1] - 1
    found = attention_on_things(tower, last, [scene], processor(), Anyres())
    tower.set_attn_implementation("eager")
    with torch.no_grad():
        maps = tower(views_of([scene])[0], output_attentions=True).attentions[last].mean(1)[:, 0, 1:]
    things = label_views(scene)[:, 0].flatten(1) > 0
    mass = (maps * things).sum(1) / maps.sum(1)
    crops = [float(mass[view]) for view in range(1, len(mass)) if things[view].any()]
    assert found["attention thumbnail"] == pytest.approx(float(mass[0]), rel=1e-4)
    assert found["attention crop"] == pytest.approx(sum(crops) / len(crops), rel=1e-4)
    assert abs(found["attention thumbnail"] / found["area thumbnail"] - 1) > 1e-3, "it is not even"


def test_without_compression_everything_is_found(model: Any) -> None:
    before = model.method
    found = coverage(model, processor(), drawn("test")[:10], "none")
    assert found == dict.fromkeys(("big found", "big patches", "small found", "small patches"), 1.0)
    assert model.method is before


def test_at_a_tenth_blind_methods_find_less(model: Any) -> None:
    for method in ("uniform", "random"):
        found = coverage(model, processor(), drawn("test")[:30], f"{method}(retention_ratio=0.1)")
        assert 0.02 < found["small patches"] < 0.25, "about a tenth"
        assert 0.02 < found["big patches"] < 0.25
        assert found["small patches"] < found["small found"] < found["big found"] <= 1
        assert found["small found"] < 0.8


class Kept(Compressor):
    """Keep the first patches of every view, row by row."""

    name = "kept"

    def __init__(self, number: int) -> None:
        super().__init__(retention_ratio=1.0)
        object.__setattr__(self, "number", number)

    def plan(self, grid: Any, layout: Any = None) -> Any:
        every = super().plan(grid)
        return type(every)(ratio=1.0, patches=every.patches, at_least=0, at_most=every.patches)

    def select(self, views: Views) -> Selection:
        count, size = views.valid.shape
        order = torch.arange(size).expand(count, size)
        return Selection(order=order, count=torch.full((count,), self.number), layout=views.layout)


def test_coverage_counts_crop_patches_only(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first three rows of every view are kept: of four big and two small things what lies there."""
    scene = arrange(
        put("ring", "red", 1, 1, 4, 4, big=True),
        put("ring", "blue", 13, 12, 4, 4, big=True),
        put("cross", "red", 2, 14),
        put("cross", "blue", 20, 20),
        put("note", "red", 22, 0, 2, 1, text="12"),
        grid=(2, 2),
    )
    monkeypatch.setattr(gates, "get", lambda number: Kept(int(number)))
    found = coverage(model, processor(), [scene], str(3 * SIDE))
    assert found == {
        "big found": 1.0,
        "big patches": pytest.approx((8 / 16 + 12 / 16) / 2),
        "small found": pytest.approx(2 / 3),
        "small patches": pytest.approx((1 / 2 + 0 + 1) / 3),
    }
    assert coverage(model, processor(), [scene], "0")["big found"] == 0


def test_an_error_leaves_the_method_as_it_was(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    before = model.method
    monkeypatch.setattr(gates, "process_images", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        coverage(model, processor(), drawn("test")[:1], "uniform(retention_ratio=0.1)")
    assert model.method is before


def test_controls_answer_the_whole_the_thumbnail_and_grey(tmp_path: Path) -> None:
    """An untrained checkpoint: every task has a figure under each, and the mean is theirs without the unanswerable."""
    path = str(checkpoint(tmp_path / "model"))
    data = write_benchmarks(tmp_path / "data", scenes=3)
    found = controls(path, data, tmp_path / "out", ["--max-new-tokens", "2", "--limit", "20", "--device", "cpu"])
    assert list(found) == ["full", "thumbnail", "blank"]
    for figures in found.values():
        assert figures.keys() == {*TASKS, "mean", "unanswerable"}
        assert figures["mean"] == pytest.approx(sum(figures[task] for task in TASKS) / 10)
    assert (tmp_path / "data-blank" / "truth.json").exists()
    assert {file.parent.parent.name for file in (tmp_path / "out").rglob("*.jsonl")} == {"data", "data-blank"}


def test_a_task_without_its_number_is_refused() -> None:
    result = Result(benchmark="mmbench", metrics={"vanilla": 100.0}, headline="circular", n=0, notes=("2 left out",))
    with pytest.raises(InputError, match=r"mmbench has no circular \(2 left out\); finish the run first"):
        gates.percent(result)
