"""What answering image by image saves: `python -m llava.eval.throughput [--images 40] [--questions 12] [--json]`.

Questions per second of image-major execution against question by question, side by side in one run, without
compression and with GlobalCom² at R = 0.25. The checkpoint is random and in the published format, scaled so that
running the prompt costs most, as it does for a real one; pictures are noise, read from files as in an evaluation.
"""

import argparse
import json
import platform
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save

from llava.compress import get
from llava.constants import InputError
from llava.eval.benchmarks.base import Question
from llava.eval.engine import Asked, Engine
from llava.eval.pictures import Picture, Pictures, Source, stream
from llava.model.builder import load_pretrained_model
from llava.model.miniature import GRIDS, PATCH, published_config, state_shapes, write_miniature
from llava.output import refusing, write_whole
from llava.utils import OneLineParser, at_least, run_command

METHODS = ("none", "globalcom2(retention_ratio=0.25)")
MODES = ("question by question", "image-major")


@dataclass(frozen=True)
class Scale:
    """Sizes of a random checkpoint."""

    side: int
    """Patches along a view."""
    vision: tuple[int, int]
    """Width and layers of the vision tower."""
    language: tuple[int, int]
    """Width and layers of the language model."""
    picture: tuple[int, int]
    """Width and height of the pictures in pixels."""


# LLaVA-NeXT-7B has side 24, vision (1024, 24), language (4096, 32) and a tile of 336 pixels: "eighth" keeps the number
# of tokens and divides every width and depth by eight, so that its parts cost what they cost there, in proportion.
SCALES = {
    "miniature": Scale(side=6, vision=(32, 4), language=(64, 3), picture=(120, 90)),
    "eighth": Scale(side=24, vision=(128, 3), language=(512, 4), picture=(640, 480)),
}


@dataclass(frozen=True, kw_only=True)
class Speed:
    """One way of answering, over all rounds."""

    method: str
    mode: str
    rates: list[float]
    """Questions per second of every round."""
    texts: list[str]
    """All answers, in question order."""

    @property
    def rate(self) -> float:
        """Median of the rounds."""
        return median(self.rates)

    def summary(self) -> dict[str, Any]:
        """Return the numbers as plain data."""
        numbers = {"questions_per_second": self.rate, "slowest": min(self.rates), "fastest": max(self.rates)}
        rounded = {key: round(value, 3) for key, value in numbers.items()}
        return {"method": self.method, "mode": self.mode, "questions": len(self.texts), **rounded}


def write_scaled(folder: Path, scale: Scale) -> Path:
    """Write a random LLaVA-NeXT checkpoint of other sizes than the miniature's; returns its folder."""
    write_miniature(folder)
    (width, layers), (hidden, depth), tile = scale.vision, scale.language, scale.side * PATCH
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers}
    vision = {**json.loads((folder / "clip" / "config.json").read_text()), **sizes, "image_size": tile}
    config = published_config("v1.6-vicuna") | {
        "hidden_size": hidden,
        "intermediate_size": 3 * hidden,
        "num_hidden_layers": depth,
        "num_key_value_heads": 4,  # as many as heads, like Vicuna
        "mm_hidden_size": width,
        "image_grid_pinpoints": [[tile * cols, tile * rows] for cols, rows in GRIDS],
    }
    processor = json.loads((folder / "clip" / "preprocessor_config.json").read_text())
    for file, content in {
        folder / "config.json": config,
        folder / "clip" / "config.json": vision,
        folder / "clip" / "preprocessor_config.json": processor | {"crop_size": tile, "size": tile},
    }.items():
        write_whole(file, json.dumps(content))
    for old in folder.glob("model*"):
        old.unlink()
    generator = torch.Generator().manual_seed(0)
    shapes = state_shapes(config, vision)
    state = {name: torch.randn(shape, generator=generator) * shape[-1] ** -0.5 for name, shape in shapes.items()}
    write_whole(folder / "model.safetensors", save(state, metadata={"format": "pt"}))
    return folder


def write_pictures(folder: Path, number: int, size: tuple[int, int]) -> list[str]:
    """Write noise as JPEG files; returns their names."""
    folder.mkdir()
    names = [f"{index:04d}.jpg" for index in range(number)]
    for index, name in enumerate(names):
        pixels = np.random.default_rng(index).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)
    return names


def ask_about(name: str, number: int, per_image: int) -> list[Question]:
    """Return the questions about picture `number`."""
    text = "what is shown in this image? number {}"
    ids = range(number * per_image, (number + 1) * per_image)
    return [Question(id=index, image=name, text=text.format(index)) for index in ids]


def answer(engine: Engine, pictures: Pictures, groups: Sequence[Sequence[Question]], one_by_one: bool) -> list[str]:
    """Answer groups of questions about one picture each, from files to texts; returns them in question order."""
    units = [[question] for group in groups for question in group] if one_by_one else groups
    sources = [Source(index, unit[0].image) for index, unit in enumerate(units)]

    def feed() -> Iterator[tuple[Picture, list[Asked]]]:
        for picture in stream(pictures, sources, workers=0):
            yield picture, [engine.ask(int(question.id), question) for question in units[picture.group]]

    answers = sorted(engine.answer(feed(), one_by_one=one_by_one), key=lambda answer: answer.index)
    failed = [found.error for found in answers if found.error]
    if failed:
        raise InputError(failed[0])
    return [found.text for found in answers]


def measure(args: argparse.Namespace, root: Path) -> list[Speed]:
    """Time every method in both modes, taking turns round by round; each round is about other pictures."""
    scale = SCALES[args.scale]
    tokenizer, model, processor, _ = load_pretrained_model(str(write_scaled(root / "model", scale)), device=args.device)
    names = write_pictures(root / "pictures", args.images, scale.picture)
    groups = [ask_about(name, number, args.questions) for number, name in enumerate(names)]
    pictures = Pictures(root / "pictures", processor, model.config)
    speeds = [Speed(method=method, mode=mode, rates=[], texts=[]) for method in METHODS for mode in MODES]
    rounds = [groups[start :: args.rounds] for start in range(args.rounds)]
    warm_up = [group[:2] for group in groups[:1]]
    for part in [warm_up, *rounds]:
        for speed in speeds:
            model.method = get(speed.method)
            engine = Engine(tokenizer, model, batch=args.batch_size, max_new_tokens=args.max_new_tokens)
            start = time.perf_counter()
            texts = answer(engine, pictures, part, one_by_one=speed.mode == MODES[0])
            seconds = time.perf_counter() - start
            if part is not warm_up:
                speed.rates.append(len(texts) / seconds)
                speed.texts.extend(texts)
    return speeds


def compare(speeds: Sequence[Speed]) -> dict[str, Any]:
    """Return all numbers and the ratios between them; the first is the yardstick."""
    base = speeds[0].rate
    return {
        "speeds": [speed.summary() | {"against_first": round(speed.rate / base, 2)} for speed in speeds],
        "ratios": {
            alone.method: round(shared.rate / alone.rate, 2)
            for alone, shared in zip(speeds[::2], speeds[1::2], strict=True)
        },
        "answers_differ": {
            alone.method: sum(one != other for one, other in zip(alone.texts, shared.texts, strict=True))
            for alone, shared in zip(speeds[::2], speeds[1::2], strict=True)
        },
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
        "when": datetime.now().astimezone().isoformat(timespec="seconds"),
    }


def as_text(found: dict[str, Any]) -> str:
    """Write the comparison for people."""
    lines = [f"{'method':34} {'mode':22} {'questions/s':>11}  {'slowest to fastest':18} {'ratio':>6}"]
    for row in found["speeds"]:
        spread = f"{row['slowest']:.2f} to {row['fastest']:.2f}"
        rate, ratio = row["questions_per_second"], row["against_first"]
        lines.append(f"{row['method']:34} {row['mode']:22} {rate:11.2f}  {spread:18} {ratio:5.2f}x")
    for method, ratio in found["ratios"].items():
        differ = found["answers_differ"][method]
        lines.append(f"{method}: image-major is {ratio:.2f} times as fast; {differ} answers differ")
    return "\n".join([*lines, f"{found['machine']}, {found['when']}"])


def main() -> None:
    """Run the command."""
    parser = OneLineParser(prog="llava.eval.throughput", description="Measure what answering image by image saves.")
    parser.add_argument("--images", type=at_least(1), default=40)
    parser.add_argument("--questions", type=at_least(1), default=12, help="per image")
    parser.add_argument("--rounds", type=at_least(1), default=5, help="the images are dealt out to this many rounds")
    parser.add_argument("--scale", default="eighth", choices=sorted(SCALES), help="size of the random checkpoint")
    parser.add_argument("--batch-size", type=at_least(1), default=12, help="questions answered at once")
    parser.add_argument("--max-new-tokens", type=at_least(1), default=4, help="of every answer (default: a short one)")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    args.rounds = min(args.rounds, args.images)
    with TemporaryDirectory() as folder, refusing(Path(folder)):
        found = compare(measure(args, Path(folder)))
    print(json.dumps(found) if args.json else as_text(found))


if __name__ == "__main__":
    run_command(main)
