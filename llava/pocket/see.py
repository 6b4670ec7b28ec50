"""Stage 1 of the pocket checkpoint: a CLIP vision tower learns to see scenes.

Two losses: views against captions as in CLIP, through the [CLS] token, so that it attends to what a caption would
mention; and what every patch shows, read off the features LLaVA will use, so that these carry it. The caption encoder
and the heads are thrown away afterwards.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import CLIPVisionModel

from llava.pocket.scenes import CHARACTERS, COLOURS, KINDS, SIDE, Scene, home, letter_cells

ASPECTS = {"kind": 1 + len(KINDS), "colour": 1 + len(COLOURS), "character": 1 + len(CHARACTERS)}
"""What a patch shows -> number of classes; 0 is nothing."""
PHRASES = len(KINDS) * len(COLOURS) + len(CHARACTERS)


def label_cells(scene: Scene) -> NDArray[np.int64]:
    """Return what every lattice cell shows: `[3, rows, columns]`, in the order of `ASPECTS`."""
    width, height = scene.size
    cells = np.zeros((3, height, width), dtype=np.int64)
    for thing in scene.things:
        room = cells[:, thing.top : thing.top + thing.height, thing.left : thing.left + thing.width]
        room[0], room[1] = 1 + KINDS.index(thing.kind), 1 + list(COLOURS).index(thing.colour)
        across, _ = letter_cells(thing.kind, thing.big)
        for place, character in enumerate(thing.text):
            room[2, :, place * across : (place + 1) * across] = 1 + CHARACTERS.index(character)
    return cells


def middles(views: int) -> NDArray[np.int64]:
    """Return the cell in the middle of what every patch along a thumbnail of so many views shows: `[SIDE]`."""
    return (np.arange(SIDE) * 2 + 1) * views // 2


def label_views(scene: Scene) -> Tensor:
    """Return the labels of thumbnail and crops: `[1 + n, 3, SIDE, SIDE]`; a thumbnail patch shows its middle cell."""
    cells, (cols, rows) = label_cells(scene), scene.grid
    views = [cells[:, middles(rows)[:, None], middles(cols)]]
    views += [cells[:, r * SIDE : (r + 1) * SIDE, c * SIDE : (c + 1) * SIDE] for r in range(rows) for c in range(cols)]
    return torch.from_numpy(np.stack(views))


def caption(scene: Scene) -> list[Tensor]:
    """Return the phrases that describe thumbnail and crops, as ids: coloured kinds, and characters."""
    cols, rows = scene.grid
    phrases: list[list[int]] = [[] for _ in range(1 + cols * rows)]
    for thing in scene.things:
        own = [KINDS.index(thing.kind) * len(COLOURS) + list(COLOURS).index(thing.colour)]
        own += [len(KINDS) * len(COLOURS) + CHARACTERS.index(character) for character in thing.text]
        for view in (0, home(scene, thing)):
            phrases[view] += own
    return [torch.tensor(sorted(ids), dtype=torch.long) for ids in phrases]


@dataclass(frozen=True)
class Seen:
    """A batch of views."""

    pixels: Tensor
    """`[V, 3, S, S]`."""
    labels: Tensor
    """`[V, 3, SIDE, SIDE]`."""
    captions: Sequence[Tensor]

    def to(self, device: Any) -> "Seen":
        """Move to a device."""
        return Seen(self.pixels.to(device), self.labels.to(device), [ids.to(device) for ids in self.captions])


class Seeing(nn.Module):
    """A vision tower with what its training needs besides."""

    def __init__(self, tower: CLIPVisionModel, select_layer: int = -2) -> None:
        """Put heads on a tower.

        Args:
            tower: trained.
            select_layer: index of the hidden state LLaVA reads; the dense loss is on its patches.
        """
        super().__init__()
        width = tower.config.hidden_size
        self.tower, self.select_layer = tower, select_layer
        self.heads = nn.Linear(width, sum(ASPECTS.values()))
        self.image = nn.Linear(width, width, bias=False)
        self.phrases = nn.EmbeddingBag(PHRASES, width, mode="sum")
        self.caption = nn.Sequential(nn.GELU(), nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))
        self.scale = nn.Parameter(torch.tensor(10.0).log())

    def forward(self, seen: Seen) -> dict[str, Tensor]:
        """Return the losses of a batch and shares of right answers, 0-dimensional."""
        output = self.tower(seen.pixels, output_hidden_states=True)
        logits = self.heads(output.hidden_states[self.select_layer][:, 1:]).float()
        found = self._dense(logits, seen.labels.flatten(2))
        return found | self._contrast(self.image(output.pooler_output).float(), seen.captions)

    def _dense(self, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        found = {}
        for place, (name, part) in enumerate(zip(ASPECTS, logits.split(list(ASPECTS.values()), -1), strict=True)):
            truth = labels[:, place]
            each = F.cross_entropy(part.transpose(1, 2), truth, reduction="none")
            shown = truth > 0
            # Objects are rare: their patches weigh as much as all others together.
            found[f"{name}_loss"] = (each * shown).sum() / shown.sum().clamp_min(1) + each[~shown].mean()
            found[name] = ((part.argmax(-1) == truth) & shown).sum() / shown.sum().clamp_min(1)
        return found

    def _contrast(self, images: Tensor, captions: Sequence[Tensor]) -> dict[str, Tensor]:
        """InfoNCE both ways; views of nothing are left out, views of the same things are all right answers."""
        some = [number for number, ids in enumerate(captions) if len(ids)]
        ids = [captions[number] for number in some]
        offsets = torch.tensor([0, *(len(i) for i in ids[:-1])], device=images.device).cumsum(0)
        texts = self.caption(self.phrases(torch.cat(ids), offsets)).float()
        scores = F.normalize(images[some], dim=-1) @ F.normalize(texts, dim=-1).T * self.scale.exp().clamp_max(100)
        names = [tuple(i.tolist()) for i in ids]
        same = torch.tensor([[one == other for other in names] for one in names], device=images.device).float()
        target = same / same.sum(1, keepdim=True)
        loss = (F.cross_entropy(scores, target) + F.cross_entropy(scores.T, target)) / 2
        right = same.gather(1, scores.argmax(1, keepdim=True)).mean()
        return {"caption_loss": loss, "caption": right}
