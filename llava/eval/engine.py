"""Answer questions image by image: an image is encoded and compressed once, and so is what its prompts begin with.

The system prompt is run through the language model once per run, every image once, and all questions about it start
from the cached keys and values. Greedy answers equal those of asking one by one (a test holds them together).
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from llava.compress.pack import Packed
from llava.compress.trace import Trace
from llava.constants import IMAGE_TOKEN_INDEX, InputError
from llava.eval.benchmarks.base import Question
from llava.eval.pictures import Picture
from llava.eval.run_llava import build_prompt
from llava.mm_utils import tokenizer_image_token
from llava.model.language_model.prefix import SharedPrefix

# Images whose questions are looked at together, in batches, to put prompts of like length side by side.
WINDOW = 4


@dataclass(frozen=True, eq=False)
class Asked:
    """A question with its place in the question file and its prompt's ids `[L]`."""

    index: int
    question: Question
    ids: Tensor


@dataclass(frozen=True)
class Answer:
    """What came of a question."""

    index: int
    question: Question
    text: str = ""
    kept: int = 0
    """Visual tokens the language model saw, newlines not counted."""
    total: int = 0
    """Visual tokens without compression."""
    error: str | None = None


@dataclass(frozen=True)
class _Shown:
    """Questions about one encoded image (or none)."""

    questions: list[Asked]
    packed: Packed | None
    total: int


class Engine:
    """A loaded model that answers groups of questions."""

    def __init__(
        self, tokenizer: Any, model: Any, *, batch: int = 8, conv_mode: str | None = None, **generation: Any
    ) -> None:
        """Prepare a model.

        Args:
            tokenizer: as `load_pretrained_model` returns it.
            model: likewise, with its `method`.
            batch: questions the language model answers at once.
            conv_mode: conversation template; None: the checkpoint's.
            **generation: for `generate`.
        """
        self.tokenizer, self.model, self.batch, self.conv_mode = tokenizer, model, batch, conv_mode
        self.generation = generation
        # Methods that read the prompt, and beams, which transformers cannot start from a cache, go one by one.
        self.shares = model.method.query_agnostic and generation.get("num_beams", 1) == 1
        self._system: tuple[Tensor, SharedPrefix] | None = None

    def ask(self, index: int, question: Question) -> Asked:
        """Tokenise a question's prompt."""
        images = int(question.image is not None or question.data is not None)
        prompt = build_prompt(question.text, images, self.model.config, self.conv_mode)
        return Asked(index, question, tokenizer_image_token(prompt, self.tokenizer, return_tensors="pt"))

    def answer(self, stream: Iterable[tuple[Picture, list[Asked]]], one_by_one: bool = False) -> Iterator[Answer]:
        """Answer groups of questions as their pictures arrive; not in question order.

        Args:
            stream: pictures with the questions about them.
            one_by_one: encode the image anew for every question and run it alone, as LLaVA's own scripts do.
        """
        window: list[tuple[Picture, list[Asked]]] = []
        for picture, questions in stream:
            usable, failures = self._sort_out(picture, questions)
            yield from failures
            if one_by_one or not self.shares:
                for asked in usable:
                    yield from self._alone(picture, asked)
                continue
            if usable:
                window.append((picture, usable))
            if sum(len(questions) for _, questions in window) >= WINDOW * self.batch:
                yield from self._together(window)
                window = []
        yield from self._together(window)

    def _sort_out(self, picture: Picture, questions: list[Asked]) -> tuple[list[Asked], list[Answer]]:
        """Part questions that can be asked from those that cannot."""
        usable, failures = [], []
        for asked in questions:
            slots = int((asked.ids == IMAGE_TOKEN_INDEX).sum())
            error = picture.error
            if error is None and slots != (picture.views is not None):
                error = f"the question has {slots} <image> for {int(picture.views is not None)} picture(s)"
            if error is None:
                usable.append(asked)
            else:
                failures.append(Answer(asked.index, asked.question, error=error))
        return usable, failures

    def _alone(self, picture: Picture, asked: Asked) -> Iterator[Answer]:
        trace = Trace()
        images = None if picture.views is None else self._images([picture])
        try:
            output = self.model.generate(
                asked.ids[None], images=images, image_sizes=[picture.size], trace=trace, **self.generation
            )
        except InputError as error:  # the prompt is too long
            yield Answer(asked.index, asked.question, error=str(error))
            return
        kept, total = (trace.images[0].packed.patches, trace.images[0].plan.patches) if trace.images else (0, 0)
        yield Answer(asked.index, asked.question, self._text(output[0]), kept, total)

    def _images(self, pictures: Sequence[Picture]) -> Any:
        """What `images` wants: single views as one tensor, AnyRes views as a list."""
        views = [picture.views for picture in pictures if picture.views is not None]
        return torch.stack(views) if views[0].ndim == 3 else views

    def _together(self, window: list[tuple[Picture, list[Asked]]]) -> Iterator[Answer]:
        """Answer the questions of a window in batches of like length."""
        shown = [_Shown(questions, None, 0) for picture, questions in window if picture.views is None]
        seen = [(picture, questions) for picture, questions in window if picture.views is not None]
        for start in range(0, len(seen), self.batch):
            part = seen[start : start + self.batch]
            trace = Trace()
            with torch.no_grad():
                packed = self.model.compress_images(
                    self._images([p for p, _ in part]), [p.size for p, _ in part], trace
                )
            totals = [image.plan.patches for image in trace.images]
            shown += [_Shown(q, p, n) for (_, q), p, n in zip(part, packed, totals, strict=True)]
        for unit in shown:
            yield from self._drop_too_long(unit)
        for with_image in (False, True):
            units = [unit for unit in shown if (unit.packed is not None) == with_image]
            for batch in self._batches(units):
                yield from self._answer_batch(batch)

    def _drop_too_long(self, unit: _Shown) -> Iterator[Answer]:
        """Take the questions that do not fit the model out of a unit, each with its error."""
        limit = self.model.config.max_position_embeddings
        for asked in list(unit.questions):
            length = len(asked.ids) + (len(unit.packed.origin) - 1 if unit.packed else 0)
            if length > limit:
                unit.questions.remove(asked)
                error = f"the prompt is {length} tokens long with its images, the model's limit is {limit}"
                yield Answer(asked.index, asked.question, error=error)

    def _batches(self, units: list[_Shown]) -> Iterator[list[_Shown]]:
        """Cut units at the batch size and fill batches with units of like length."""
        cut = [
            _Shown(unit.questions[start : start + self.batch], unit.packed, unit.total)
            for unit in units
            for start in range(0, len(unit.questions), self.batch)
        ]
        cut.sort(key=lambda unit: -len(unit.packed.origin) if unit.packed else -len(unit.questions[0].ids))
        batch: list[_Shown] = []
        for unit in cut:
            if batch and sum(len(u.questions) for u in (*batch, unit)) > self.batch:
                yield batch
                batch = []
            batch.append(unit)
        if batch:
            yield batch

    def _answer_batch(self, units: list[_Shown]) -> Iterator[Answer]:
        """Run what the prompts share once, then all the questions as one batch."""
        asked = [(unit, question) for unit in units for question in unit.questions]
        images = [unit.packed for unit in units if unit.packed is not None]
        if images:
            at = int((asked[0][1].ids == IMAGE_TOKEN_INDEX).nonzero())
            system = self._system_prefix(asked[0][1].ids[:at])
            slots = torch.full((len(units), 1), IMAGE_TOKEN_INDEX)
            prefix = system.rows([0] * len(units), self.model).extend(self.model, slots, images)
            prefix = prefix.rows([i for i, unit in enumerate(units) for _ in unit.questions], self.model)
            rest = [question.ids[at + 1 :] for _, question in asked]
            ids, mask = _pad(rest)
            output = self.model.generate_after(prefix, ids, mask, **self.generation)
        else:
            ids, mask = _pad([question.ids for _, question in asked])
            output = self.model.generate(ids, attention_mask=mask, **self.generation)
        for (unit, question), row in zip(asked, output, strict=True):
            kept = unit.packed.patches if unit.packed else 0
            yield Answer(question.index, question.question, self._text(row), kept, unit.total)

    def _system_prefix(self, ids: Tensor) -> SharedPrefix:
        """What every prompt of the run begins with, run once."""
        if self._system is None or not torch.equal(self._system[0], ids):
            self._system = (ids, SharedPrefix.empty(self.model, 1).extend(self.model, ids[None]))
        return self._system[1]

    def _text(self, ids: Tensor) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True)).strip()


def _pad(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Pad rows of ids on the left: `[B, L]` and their mask."""
    ids = pad_sequence(rows, batch_first=True, padding_side="left")
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side="left")
    return ids, mask
