"""What must hold before compression is discussed: the tower reads crops, its [CLS] token finds things, methods differ.

`python -m llava.pocket.gates` measures the shipped checkpoint on test scenes.
"""

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llava.compress import get
from llava.compress.attention import cls_logits
from llava.compress.base import Compressor
from llava.compress.trace import Trace
from llava.eval import benchmarks, grid
from llava.eval.benchmarks.base import Result, Row, read_jsonl
from llava.eval.runs import collect
from llava.mm_utils import process_images
from llava.model.builder import load_pretrained_model
from llava.pocket.questions import UNANSWERABLE
from llava.pocket.scenes import CHARACTERS, KINDS, SHAPES, SIDE, Scene, Thing, home, letter_cells, make_scene
from llava.pocket.see import ASPECTS, Seeing, label_views, middles
from llava.pocket.write import write_benchmarks
from llava.utils import OneLineParser, at_least, run_command
from llava.visualize import kept_patches


def patches_of(scene: Scene, thing: Thing, thumbnail: bool) -> Tensor:
    """Return the patches `[SIDE, SIDE]`, bool, that show a thing in its crop or in the thumbnail."""
    return _box(scene, thumbnail, home(scene, thing), thing.left, thing.top, thing.width, thing.height)


def _box(scene: Scene, thumbnail: bool, view: int, left: int, top: int, width: int, height: int) -> Tensor:
    cols, rows = scene.grid
    shown = torch.zeros(rows * SIDE, cols * SIDE, dtype=torch.bool)
    shown[top : top + height, left : left + width] = True
    if thumbnail:
        return shown[middles(rows)][:, middles(cols)]
    row, col = divmod(view - 1, cols)
    return shown[row * SIDE : (row + 1) * SIDE, col * SIDE : (col + 1) * SIDE]


@torch.no_grad()
def sight(model: Seeing, scenes: Iterable[Scene], processor: Any, config: Any) -> dict[str, float]:
    """Return how often the tower's features tell a thing's shape and every digit and letter, crop and thumbnail apart.

    A thing's patches vote: their logits are averaged. What no thumbnail patch shows is wrong there.
    """
    right: dict[str, list[float]] = defaultdict(list)
    sizes = list(ASPECTS.values())
    for scene in scenes:
        views = process_images([scene.image], processor, config)[0]
        hidden = model.tower(views, output_hidden_states=True).hidden_states[model.select_layer][:, 1:]
        kinds, _, characters = model.heads(hidden).unflatten(1, (SIDE, SIDE)).split(sizes, -1)
        for thing in scene.things:
            size = "big" if thing.big else "small"
            for where, view in (("crop", home(scene, thing)), ("thumbnail", 0)):
                if thing.kind in SHAPES:
                    said = _vote(kinds[view], patches_of(scene, thing, not view))
                    right[f"shape {size} {where}"].append(said == KINDS.index(thing.kind))
                across, _ = letter_cells(thing.kind, thing.big)
                what = "handwritten digit" if thing.kind == "note" else "printed digit"
                for place, character in enumerate(thing.text):
                    left = thing.left + place * across
                    box = _box(scene, not view, home(scene, thing), left, thing.top, across, thing.height)
                    said = _vote(characters[view], box)
                    name = what if character.isdecimal() else "letter"
                    right[f"{name} {size} {where}"].append(said == CHARACTERS.index(character))
    return {name: sum(found) / len(found) for name, found in sorted(right.items())}


def _vote(logits: Tensor, patches: Tensor) -> int:
    """Return the class most patches speak for, nothing (0) left out; −1 without patches."""
    return int(logits[patches].mean(0)[1:].argmax()) if patches.any() else -1


@torch.no_grad()
def attention_on_things(
    tower: Any, layer: int, scenes: Iterable[Scene], processor: Any, config: Any
) -> dict[str, float]:
    """Return the share of the [CLS] attention to patches that falls on things, beside their share of the area.

    Args:
        tower: `CLIPVisionModel`.
        layer: the one whose attention methods read, counted from the first (0).
        scenes: looked at.
        processor: image processor.
        config: with the AnyRes keys.
    """
    found: dict[str, list[float]] = defaultdict(list)
    for scene in scenes:
        views = process_images([scene.image], processor, config)[0]
        hidden = tower(views, output_hidden_states=True).hidden_states[layer]
        mass = cls_logits(tower.encoder.layers[layer], hidden).softmax(-1)[:, :, 1:].mean(1)  # [V, N]
        mass = mass / mass.sum(1, keepdim=True)
        things = label_views(scene)[:, 0].flatten(1) > 0  # [V, N]
        for view in range(len(views)):
            if things[view].any():
                where = "crop" if view else "thumbnail"
                found[f"attention {where}"].append(float(mass[view][things[view]].sum()))
                found[f"area {where}"].append(float(things[view].float().mean()))
    return {name: sum(values) / len(values) for name, values in sorted(found.items())}


@torch.no_grad()
def coverage(model: Any, processor: Any, scenes: Sequence[Scene], method: str) -> dict[str, float]:
    """Return the share of small and of big things of which a method keeps a crop patch, and of all their crop patches.

    Args:
        model: a LLaVA; its language model is not run.
        processor: image processor.
        scenes: looked at.
        method: as for `llava.compress.get`.
    """
    found: dict[str, list[float]] = defaultdict(list)
    chosen = get(method)
    traces = [_looked_at(model, processor, scene.image, chosen) for scene in scenes]
    for scene, trace in zip(scenes, traces, strict=True):
        kept = kept_patches(trace.images[0])  # [V, SIDE, SIDE]
        for thing in scene.things:
            own = kept[home(scene, thing)][patches_of(scene, thing, False)].float()
            size = "big" if thing.big else "small"
            found[f"{size} found"].append(float(own.any()))
            found[f"{size} patches"].append(float(own.mean()))
    return {name: sum(values) / len(values) for name, values in sorted(found.items())}


def _looked_at(model: Any, processor: Any, image: Any, method: Compressor) -> Trace:
    """Return what became of an image's tokens."""
    trace = Trace()
    model.compress_images(process_images([image], processor, model.config), [image.size], trace, method)
    return trace


def percent(result: Result) -> float:
    """Return a task's score on a scale on which guessing can be told: MME per category, POPE as accuracy."""
    if result.benchmark == "mme":
        categories = sum(name.endswith("_acc") for name in result.metrics)
        return result.metrics["total"] / (2 * categories)
    if result.benchmark == "pope":
        accuracies = [value for name, value in result.metrics.items() if name.startswith("accuracy_")]
        return sum(accuracies) / len(accuracies)
    return float(result.metrics[result.headline])


def unanswerable(rows: Sequence[Row], data: Path) -> float:
    """Return how many of VizWiz's unanswerable questions were seen to be so, in percent: not part of any mean."""
    wanted = {(e["image"], e["question"]) for e in json.loads((data / "vizwiz" / "unanswerable.json").read_text())}
    asked = {q.id: (q.image, q.text.split("\n")[0]) for q in benchmarks.get("vizwiz").questions(_questions(data))}
    said = [row["text"].strip().lower() == UNANSWERABLE for row in rows if asked[row["question_id"]] in wanted]
    return float(100 * sum(said) / len(said))


def _questions(data: Path) -> Path:
    return data / "vizwiz" / benchmarks.get("vizwiz").question_file


def controls(model_path: str, data: Path, out: Path, words: Sequence[str] = ()) -> dict[str, dict[str, float]]:
    """Answer everything with the whole image, the thumbnail alone and a grey picture; returns percent by task.

    Args:
        model_path: the checkpoint.
        data: folder of the written benchmark; the grey one is written beside it.
        out: answers are written here.
        words: further options of `llava.eval.grid`.
    """
    blank = data.with_name(data.name + "-blank")
    if not (data / "truth.json").exists():
        write_benchmarks(data)
    if not (blank / "truth.json").exists():
        write_benchmarks(blank, blank=True)
    found: dict[str, dict[str, float]] = {}
    for name, folder, method in (
        ("full", data, "none"),
        ("thumbnail", data, "thumbnail_only"),
        ("blank", blank, "none"),
    ):
        given = ["--model-path", model_path, "--data", str(folder), "--out", str(out / folder.name)]
        grid.run(grid.build_parser().parse_args([*given, "--methods", method, *words]))
        runs = collect(out / folder.name, folder, model_path).runs
        found[name] = {run.benchmark: percent(run.result) for run in runs if run.key[0] == method}
        found[name]["mean"] = sum(found[name].values()) / len(found[name])
        answers = next((out / folder.name / "vizwiz").glob(f"{method}-*.jsonl"))
        found[name]["unanswerable"] = unanswerable(read_jsonl(answers), folder)
    return found


METHODS = (
    *("random", "uniform", "fastervlm", "globalcom2", "globalcom2(allocation='uniform')"),
    *("globalcom2(criterion='local')", "globalcom2(criterion='global')"),
)


def main() -> None:
    """Run the command."""
    parser = OneLineParser(prog="llava.pocket.gates", description=(__doc__ or "").split(":")[0])
    parser.add_argument("--model-path", default="playground/pocket")
    parser.add_argument("--data", type=Path, default=Path("playground/data/pocket"))
    parser.add_argument(
        "--out", type=Path, default=Path("playground/data/pocket-gates"), help="answers are written here"
    )
    parser.add_argument("--heads", type=Path, help="state of stage 1 (see.pt): also test what its features tell")
    parser.add_argument("--scenes", type=at_least(1), default=110, help="for everything but questions")
    parser.add_argument("--ratio", type=float, default=0.1, help="for coverage")
    args = parser.parse_args()
    _, model, processor, _ = load_pretrained_model(args.model_path, device="cpu")
    scenes = [make_scene("test", index) for index in range(args.scenes)]
    tower = model.get_vision_tower()
    found: dict[str, Any] = {}
    if args.heads:
        seeing = Seeing(tower.vision_tower)
        seeing.load_state_dict(torch.load(args.heads, weights_only=True)["model"])
        found["sight"] = sight(seeing, scenes, processor, model.config)
    found["attention"] = attention_on_things(tower.vision_tower, tower.depth, scenes, processor, model.config)
    specs = [get(spec, retention_ratio=args.ratio) for spec in METHODS]
    found["coverage"] = {str(spec): coverage(model, processor, scenes, str(spec)) for spec in specs}
    found["controls"] = controls(args.model_path, args.data, args.out)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    run_command(main)
