"""What the pocket's tests share: scenes, a tokenizer and a model so small that all are made on the spot."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llava.compress import get
from llava.mm_utils import process_images
from llava.model.builder import load_tokenizer
from llava.model.miniature import write_tokenizer
from llava.pocket import scenes as drawing
from llava.pocket.model import build_model, save_checkpoint, train_tokenizer
from llava.pocket.questions import TASKS
from llava.pocket.scenes import CANVASES, CELL, SPLITS, Scene, Thing, make_scene
from llava.pocket.talk import Conversation, choose_questions, converse
from llava.pocket.train import Anyres, processor

VISION, LANGUAGE = (32, 3), (64, 2)


@cache
def drawn(split: str = "test", number: int = 60) -> tuple[Scene, ...]:
    """The first scenes of a split."""
    return tuple(make_scene(split, index) for index in range(number))


@cache
def undrawn(split: str, number: int) -> tuple[Scene, ...]:
    """The first scenes of a split, things only."""
    scenes = []
    for index in range(number):
        rng = np.random.default_rng([SPLITS.index(split), index])
        grid = CANVASES[rng.integers(len(CANVASES))]
        things = drawing._place(rng, grid, split)
        nothing = np.zeros((0, 0, 3), np.uint8)
        scenes.append(Scene(split=split, index=index, grid=grid, things=things, pixels=nothing))
    return tuple(scenes)


def box(thing: Thing, around: int = 0) -> tuple[slice, slice]:
    """Rows and columns of a thing's pixels, and so many around them."""
    top, left = thing.top * CELL, thing.left * CELL
    bottom, right = top + thing.height * CELL, left + thing.width * CELL
    return slice(max(0, top - around), bottom + around), slice(max(0, left - around), right + around)


def put(kind: str, colour: str, left: int, top: int, width: int = 2, height: int = 2, **more: Any) -> Thing:
    """A thing by hand, small unless said."""
    return Thing(kind=kind, colour=colour, left=left, top=top, width=width, height=height, **{"big": False} | more)


def arrange(*things: Thing, grid: tuple[int, int] = (2, 2)) -> Scene:
    """A scene by hand, its pixels blank."""
    pixels = np.zeros((grid[1] * drawing.TILE, grid[0] * drawing.TILE, 3), np.uint8)
    return Scene(split="test", index=0, grid=grid, things=things, pixels=pixels)


@cache
def spelling() -> bytes:
    """A tokenizer that knows the questions' words."""
    rng = np.random.default_rng(0)
    asked = [a for shown in drawn("train", 40) for make in TASKS.values() for a in make(shown, rng)]
    return train_tokenizer([line for a in asked for line in (a.prompt, a.answer)])


def tokenizer(folder: Path) -> Any:
    """Write the tokenizer and load it."""
    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(folder, spelling())
    return load_tokenizer(str(folder))


def untrained(words: int) -> Any:
    """A model whose weights are large enough that every token seen changes what is said."""
    torch.manual_seed(0)
    model = build_model(VISION, LANGUAGE, words)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "image_newline" in name:
                weight.normal_()
            elif weight.ndim == 2 and "vision_tower" not in name:
                weight.mul_(3)
    model.method = get("none")
    return model.eval()


def checkpoint(folder: Path) -> Path:
    """Write an untrained checkpoint."""
    words = tokenizer(folder)
    save_checkpoint(folder, untrained(len(words)), spelling())
    return folder


def views_of(shown: Sequence[Scene]) -> list[torch.Tensor]:
    """Thumbnail and crops of every scene."""
    return [process_images([one.image], processor(), Anyres())[0] for one in shown]


ASKED = dict.fromkeys(TASKS, 1)
"""One question of every task."""


def conversation(shown: Sequence[Scene], words: Any, config: Any) -> Conversation:
    """Ten questions about every scene."""
    asked = choose_questions(shown, np.random.default_rng(1), ASKED)
    return converse(asked, views_of(shown), [one.image.size for one in shown], words, config)
