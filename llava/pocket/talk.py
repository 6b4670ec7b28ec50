"""Stage 2 of the pocket checkpoint: projector and language model learn to answer questions about AnyRes images.

An image is run once; its questions continue it side by side, each seeing the image and itself, exactly as the
evaluation runs them. The vision tower stays as it is. Only answers are learnt.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.eval.run_llava import build_prompt
from llava.mm_utils import tokenizer_image_token
from llava.model.language_model.branches import Branches, branching
from llava.model.language_model.prefix import SharedPrefix
from llava.pocket.questions import LETTERS, TASKS, Asked, Balance
from llava.pocket.scenes import Scene

# Tasks asked together -> questions about a scene: those with about as many tokens, since a batch is padded.
SHORT = {"vqav2": 2, "gqa": 2, "textvqa": 2, "pope": 2, "mme": 2}
LONG = {"vizwiz": 2, "scienceqa": 1, "mmbench": 1, "mmbench_cn": 1, "mmvet": 1}


@dataclass(frozen=True)
class Conversation:
    """Scenes and the questions about them."""

    views: list[Tensor]
    """Of every scene, `[1 + n, 3, S, S]`."""
    sizes: list[tuple[int, int]]
    prefix: Tensor
    """Ids `[P]` of what all prompts begin with, the image last."""
    ids: Tensor
    """`[U·R, L]`: the rest of every prompt, then its answer; padded on the left."""
    mask: Tensor
    """`[U·R, L]`, 1 for a token."""
    labels: Tensor
    """`[U·R, L]`, IGNORE_INDEX where nothing is to be learnt."""
    tasks: list[str]
    """Of every row."""

    def to(self, device: Any) -> "Conversation":
        """Move to a device."""
        moved = (t.to(device) for t in (self.prefix, self.ids, self.mask, self.labels))
        prefix, ids, mask, labels = moved
        return Conversation([v.to(device) for v in self.views], self.sizes, prefix, ids, mask, labels, self.tasks)


def choose_questions(
    scenes: Sequence[Scene], rng: np.random.Generator, tasks: Mapping[str, int], told: float = 0
) -> list[list[Asked]]:
    """Choose as many questions about every scene.

    Args:
        scenes: to ask about.
        rng: chooses.
        tasks: number of questions by task; where a scene has too few of one, the others ask more.
        told: share of multiple-choice questions whose context tells the answer.
    """
    balance, chosen = Balance(), []
    for scene in scenes:
        possible = {task: list(TASKS[task](scene, rng)) for task in tasks}
        own = [asked for task, number in tasks.items() for asked in balance.choose(possible[task], number, rng)]
        while len(own) < sum(tasks.values()):
            for task in (list(tasks)[i] for i in rng.permutation(len(tasks))):
                own += balance.choose(possible[task], 1, rng)
        own = own[: sum(tasks.values())]
        chosen.append([tell(asked) if asked.options and rng.random() < told else asked for asked in own])
    return chosen


def tell(asked: Asked) -> Asked:
    """Let a multiple-choice question's context tell its answer."""
    right = asked.options[LETTERS.index(asked.answer)]
    words = asked.text.rstrip("?").split()
    if asked.task == "mmbench_cn":
        return replace(asked, hint=f"答案是{right}。")
    if asked.template == "colour":
        return replace(asked, hint=f"The {words[-1]} is {right}.")
    if asked.template == "shape":
        return replace(asked, hint=f"The {words[-2]} thing is a {right}.")
    return replace(asked, hint=f"The {words[-2]} {words[-1]} says {right}.")


def converse(
    questions: Sequence[Sequence[Asked]], views: list[Tensor], sizes: list[tuple[int, int]], tokenizer: Any, config: Any
) -> Conversation:
    """Put questions and answers into the checkpoint's template."""
    rows, labels = [], []
    for asked in (a for own in questions for a in own):
        ids = tokenizer_image_token(build_prompt(asked.prompt, 1, config), tokenizer, return_tensors="pt")
        at = int((ids == IMAGE_TOKEN_INDEX).nonzero())
        prefix, question = ids[: at + 1], ids[at + 1 :]
        answer = tokenizer(asked.answer, add_special_tokens=False).input_ids
        answer.append(tokenizer.eos_token_id)
        rows.append(torch.cat((question, torch.tensor(answer))))
        labels.append(torch.cat((torch.full_like(question, IGNORE_INDEX), torch.tensor(answer))))
    return Conversation(
        views=views,
        sizes=sizes,
        prefix=prefix,
        ids=pad_sequence(rows, batch_first=True, padding_side="left"),
        mask=pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side="left"),
        labels=pad_sequence(labels, batch_first=True, padding_value=IGNORE_INDEX, padding_side="left"),
        tasks=[asked.task for own in questions for asked in own],
    )


class Talking(nn.Module):
    """A LLaVA whose vision tower is frozen."""

    def __init__(self, model: Any) -> None:
        """Freeze the tower."""
        super().__init__()
        self.model = model
        model.get_vision_tower().requires_grad_(False)

    def forward(self, batch: Conversation) -> dict[str, Tensor]:
        """Return the loss, and the share of answers that are right to the last token, overall and by task."""
        model = self.model
        units = len(batch.views)
        packed = model.compress_images(batch.views, batch.sizes)
        prefix = SharedPrefix.empty(model, units).extend(model, batch.prefix.expand(units, -1), packed)
        rows = len(batch.ids) // units
        mask = torch.cat((prefix.mask.repeat_interleave(rows, 0), batch.mask), 1)
        with branching(model.get_model()):
            logits = model(
                input_ids=batch.ids,
                attention_mask=mask,
                position_ids=(mask.cumsum(1) - 1)[:, -batch.ids.shape[1] :],
                past_key_values=Branches(prefix.cache, rows),
            ).logits.float()
        logits, labels = logits[:, :-1], batch.labels[:, 1:]
        learnt = labels != IGNORE_INDEX
        each = F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORE_INDEX, reduction="none")
        right = ((logits.argmax(-1) == labels) | ~learnt).all(1).float()
        tasks = np.array(batch.tasks)
        by_task = {
            task: right[torch.from_numpy(tasks == task).to(right.device)].mean() for task in sorted(set(batch.tasks))
        }
        # A question counts as one, however long its answer.
        return {"loss": (each.sum(1) / learnt.sum(1)).mean(), "right": right.mean(), **by_task}
