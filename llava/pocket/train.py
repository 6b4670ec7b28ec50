"""Train the pocket checkpoint: `python -m llava.pocket.train --work DIR [--device cuda] [--resume]`."""

import argparse
import io
import json
import math
import re
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import CLIPImageProcessorPil

from llava.compress import get
from llava.constants import InputError
from llava.eval.run_llava import build_prompt
from llava.interrupts import deaf_children, end_with_parent, kept
from llava.mm_utils import process_images
from llava.model.builder import load_tokenizer
from llava.model.miniature import write_tokenizer
from llava.output import refusing, write_whole
from llava.pocket.model import build_model, build_tower, pocket_config, save_checkpoint, train_tokenizer
from llava.pocket.questions import TASKS
from llava.pocket.scenes import CANVASES, TILE, make_scene
from llava.pocket.see import Seeing, Seen, caption, label_views
from llava.pocket.talk import LONG, SHORT, Conversation, Talking, choose_questions, converse
from llava.utils import OneLineParser, at_least, run_command


@dataclass(frozen=True, kw_only=True)
class Stage:
    """How long and how fast a stage learns."""

    steps: int
    scenes: int
    """Scenes a step."""
    rate: float
    """Peak learning rate."""
    warm_up: int = 100


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything a training depends on, but for the device."""

    seed: int = 0
    vision: tuple[int, int] = (128, 5)
    """Width and layers of the vision tower; heads are 32 wide."""
    language: tuple[int, int] = (192, 5)
    """Width and layers of the language model."""
    see: Stage = Stage(steps=1800, scenes=32, rate=2e-3)
    talk: Stage = Stage(steps=6000, scenes=8, rate=1.5e-3)


LARGE = Config(
    vision=(192, 6),
    language=(192, 6),
    see=Stage(steps=4000, scenes=32, rate=1.5e-3),
    talk=Stage(steps=12000, scenes=16, rate=1.2e-3),
)
"""For a GPU."""
TOLD, TUTORED = 0.6, 0.5
"""The share of multiple-choice questions whose context tells the answer falls from the first number to 0 by the second
share of stage 2: to name the letter of what one knows is learnt apart from seeing it."""
# Share of stage 2 -> canvases up to there: what takes long to be found is found on short sequences.
LESSONS = {0.5: ((1, 1),), 0.75: CANVASES[1:3], 1.0: CANVASES}


def processor() -> Any:
    """Return the image processor of the pocket checkpoint."""
    return CLIPImageProcessorPil(size={"shortest_edge": TILE}, crop_size={"height": TILE, "width": TILE})


@dataclass(frozen=True)
class Anyres:
    """What `process_images` reads of a config; the canvas of one view is for training only."""

    image_aspect_ratio: str = "anyres"
    image_grid_pinpoints: tuple[tuple[int, int], ...] = tuple(
        (TILE * cols, TILE * rows) for cols, rows in ((1, 1), *CANVASES)
    )


class SceneViews(Dataset[Seen]):
    """Batches of views: batch i is about scenes i·n to i·n + n − 1."""

    def __init__(self, split: str, scenes: int, steps: range) -> None:
        """Choose the batches.

        Args:
            split: see `make_scene`.
            scenes: n, scenes in a batch.
            steps: the batches.
        """
        self.split, self.scenes, self.steps = split, scenes, steps
        self.processor = processor()

    def __len__(self) -> int:
        """Return the number of batches."""
        return len(self.steps)

    def __getitem__(self, item: int) -> Seen:
        """Draw a batch."""
        first = self.steps[item] * self.scenes
        scenes = [make_scene(self.split, index) for index in range(first, first + self.scenes)]
        views = [process_images([scene.image], self.processor, Anyres())[0] for scene in scenes]
        labels = [label_views(scene) for scene in scenes]
        return Seen(torch.cat(list(views)), torch.cat(labels), [ids for scene in scenes for ids in caption(scene)])


class Conversations(Dataset[Conversation]):
    """Batches of questions about scenes: batch i is about scenes i·n to i·n + n − 1."""

    def __init__(self, split: str, stage: Stage, steps: range, tokenizer: Any, config: Any) -> None:
        """Choose the batches.

        Args:
            split: see `make_scene`.
            stage: how many scenes a batch has, and batches there are.
            steps: the batches to draw.
            tokenizer: of the model.
            config: of the model.
        """
        self.split, self.stage, self.steps = split, stage, steps
        self.tokenizer, self.config, self.processor = tokenizer, config, processor()

    def __len__(self) -> int:
        """Return the number of batches."""
        return len(self.steps)

    def __getitem__(self, item: int) -> Conversation:
        """Draw a batch."""
        step, number = self.steps[item], self.stage.scenes
        done = step / self.stage.steps
        canvases = next(some for until, some in LESSONS.items() if done < until)
        # One canvas a batch, so that no picture is padded. Every other batch asks the tasks whose questions are long.
        grid, first = canvases[step // 2 % len(canvases)], step * number
        scenes = [make_scene(self.split, index, grid) for index in range(first, first + number)]
        rng = np.random.default_rng([7, step])
        asked = choose_questions(scenes, rng, LONG if step % 2 else SHORT, told=TOLD * max(0, 1 - done / TUTORED))
        images = [scene.image for scene in scenes]
        views = list(process_images(images, self.processor, Anyres()))
        return converse(asked, views, [image.size for image in images], self.tokenizer, self.config)


def loader(data: Dataset[Any], workers: int) -> Iterator[Any]:
    """Yield a dataset's batches in order, made by worker processes that keep ahead."""
    ahead: dict[str, Any] = {}
    if workers:
        ahead = {"multiprocessing_context": "forkserver", "prefetch_factor": 4, "worker_init_fn": end_with_parent}
    with deaf_children() if workers else nullcontext():
        return iter(DataLoader(data, batch_size=None, num_workers=workers, **ahead))


class Optimizer:
    """Muon for the matrices between activations, AdamW for everything else; one warm-up and cosine for both."""

    def __init__(self, model: nn.Module, stage: Stage, matrices: Callable[[str], bool]) -> None:
        """Sort the parameters that are trained."""
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        inner = [p for name, p in named if p.ndim == 2 and matrices(name)]
        rest = [p for name, p in named if not (p.ndim == 2 and matrices(name))]
        muon = torch.optim.Muon(inner, lr=stage.rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw")
        adam = torch.optim.AdamW(rest, lr=stage.rate, betas=(0.9, 0.98), weight_decay=0.0)
        self.parts, self.stage, self.parameters = (muon, adam), stage, [p for _, p in named]

    def step(self, number: int) -> float:
        """Make step `number` (from 0) and clear the gradients; returns the learning rate."""
        stage = self.stage
        done = max(0, number - stage.warm_up) / max(1, stage.steps - stage.warm_up)
        rate = stage.rate * min(1, (number + 1) / stage.warm_up) * (0.02 + 0.98 * (1 + math.cos(math.pi * done)) / 2)
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = rate
            part.step()
            part.zero_grad(set_to_none=True)
        return rate

    def state_dict(self) -> list[dict[str, Any]]:
        """Return the state of both."""
        return [part.state_dict() for part in self.parts]

    def load_state_dict(self, states: list[dict[str, Any]]) -> None:
        """Continue from a state."""
        for part, state in zip(self.parts, states, strict=True):
            part.load_state_dict(state)


def run_stage(
    model: nn.Module,
    stage: Stage,
    batches: Callable[[range], Iterator[Any]],
    optimizer: Optimizer,
    file: Path,
    args: argparse.Namespace,
) -> None:
    """Train until the stage's last step, from the state in `file` if there is one; leaves it there."""
    start, table = 0, file.with_suffix(".jsonl")
    log: dict[str, float] = {}
    if file.exists():
        state = torch.load(file, map_location=args.device, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        start, log = state["step"], state["log"]
        # What was logged after the state was saved is going to be logged again.
        rows = table.read_text().splitlines() if table.exists() else []
        write_whole(table, "".join(f"{row}\n" for row in rows if json.loads(row)["step"] <= start))
    saved = began = time.monotonic()
    for number, batch in enumerate(batches(range(start, stage.steps)), start):
        with torch.autocast(args.device, torch.bfloat16, enabled=not args.fp32):
            found = model(batch.to(args.device))
        loss = sum(value for name, value in found.items() if name.endswith("loss"))
        loss.backward()
        rate = optimizer.step(number)
        for name, value in found.items():
            log[name] = 0.98 * log.get(name, value.item()) + 0.02 * value.item()
        last = number + 1 == stage.steps
        if (number + 1) % args.log_every == 0 or last:
            row = {"step": number + 1, "rate": rate, "seconds": round(time.monotonic() - began, 1)} | log
            line = json.dumps({key: round(value, 5) for key, value in row.items()})
            print(line, flush=True)
            with refusing(table), table.open("a") as stream:
                stream.write(line + "\n")
        if last or time.monotonic() - saved > 60 * args.save_minutes:
            saved = time.monotonic()
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": number + 1, "log": log}
            buffer = io.BytesIO()  # torch has an error of its own for a full disk
            torch.save(state, buffer)
            write_whole(file, buffer.getvalue())


def see(config: Config, args: argparse.Namespace) -> Seeing:
    """Run stage 1; returns the trained tower with its heads."""
    torch.manual_seed(config.seed)
    model = Seeing(build_tower(*config.vision)).to(args.device)
    optimizer = Optimizer(model, config.see, lambda name: ".layers." in name)
    batches = lambda steps: loader(SceneViews("train", config.see.scenes, steps), args.workers)  # noqa: E731
    run_stage(model, config.see, batches, optimizer, args.work / "see.pt", args)
    return model


def corpus(config: Any) -> list[str]:
    """Return the lines the tokenizer is trained on; what signs say is left out, so that it is spelt by letters."""
    rng = np.random.default_rng(0)
    scenes = [make_scene("train", index) for index in range(300)]
    asked = [a for scene in scenes for make in TASKS.values() for a in make(scene, rng)]
    lines = [line for a in asked for line in (a.prompt, a.answer) if not re.search("[A-Z]{3}", line)]
    return [*lines, *[build_prompt("", 0, config)] * 10]


def talk(config: Config, args: argparse.Namespace, tower: dict[str, Tensor]) -> Talking:
    """Run stage 2 on the tower of stage 1; returns the trained model."""
    frame = args.work / "frame"
    if not (frame / "tokenizer.model").is_file():
        shape = pocket_config(config.vision, config.language, 0)
        write_tokenizer(frame, train_tokenizer(corpus(SimpleNamespace(**shape))))
    tokenizer = load_tokenizer(str(frame))
    torch.manual_seed(config.seed)
    model = build_model(config.vision, config.language, len(tokenizer))
    model.get_vision_tower().vision_tower.load_state_dict(tower)
    model.config.image_grid_pinpoints = [list(size) for size in Anyres.image_grid_pinpoints]
    model.method = get("none")
    model.to(args.device)
    stage = Talking(model)
    optimizer = Optimizer(stage, config.talk, lambda name: ".layers." in name or "mm_projector" in name)
    batches = lambda steps: loader(  # noqa: E731
        Conversations("train", config.talk, steps, tokenizer, model.config), args.workers
    )
    run_stage(stage, config.talk, batches, optimizer, args.work / "talk.pt", args)
    save_checkpoint(args.work / "checkpoint", model, (frame / "tokenizer.model").read_bytes())
    return stage


def build_parser() -> argparse.ArgumentParser:
    """Return the command's parser."""
    parser = OneLineParser(prog="llava.pocket.train", description=(__doc__ or "").split(":")[0])
    parser.add_argument("--work", type=Path, required=True, help="state, logs and checkpoint, outside the repository")
    parser.add_argument("--resume", action="store_true", help="go on from the state that is there")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--large", action="store_true", help="the configuration for a GPU: larger, longer")
    parser.add_argument("--fp32", action="store_true", help="no bfloat16")
    parser.add_argument("--workers", type=at_least(0), default=1, help="processes that draw scenes")
    parser.add_argument("--log-every", type=at_least(1), default=20, help="steps")
    parser.add_argument("--save-minutes", type=float, default=3.0)
    return parser


def train(config: Config, args: argparse.Namespace) -> Path:
    """Run both stages; returns the folder of the checkpoint.

    Raises:
        InputError: there is a state and `--resume` was not given, or it is of another configuration.
    """
    record = args.work / "config.json"
    now = json.dumps(asdict(config) | {"device": args.device, "bfloat16": not args.fp32})
    if record.exists() and not args.resume:
        raise InputError(f"{str(args.work)!r} holds a training; go on with --resume, or give another --work")
    if record.exists() and record.read_text() != now:
        raise InputError(f"{str(args.work)!r} holds a training with other settings; give another --work")
    write_whole(record, now)
    tower = see(config, args).tower.state_dict()
    talk(config, args, tower)
    return Path(args.work / "checkpoint")


def main() -> None:
    """Run the command."""
    args = build_parser().parse_args()
    with kept(f"what {str(args.work)!r} holds is kept, at most {args.save_minutes:g} minutes are lost; add --resume"):
        print(train(LARGE if args.large else Config(), args))


if __name__ == "__main__":
    run_command(main)
