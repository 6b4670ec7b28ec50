"""Answer questions image by image: an image is encoded and compressed once, and so is what its prompts begin with.

The system prompt is run through the language model once per run, every image once, and all questions about it start
from the cached keys and values. Greedy answers equal those of asking one by one (a test holds them together).
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from llava.compress.pack import Packed
from llava.compress.trace import Trace
from llava.constants import DEFAULT_IMAGE_TOKEN, IMAGE_PLACEHOLDER, IMAGE_TOKEN_INDEX, PromptTooLong
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

    picture: Picture
    questions: list[Asked]
    packed: Packed | None = None
    total: int = 0

    @property
    def tokens(self) -> int:
        """What stands before the questions and differs between units: the image's tokens."""
        return len(self.packed.origin) if self.packed else 0


class Engine:
    """A loaded model that answers groups of questions."""

    def __init__(
        self, tokenizer: Any, model: Any, *, batch: int = 8, conv_mode: str | None = None, **generation: Any
    ) -> None:
        """Prepare a model.

        Args:
            tokenizer: as `load_pretrained_model` returns it.
            model: likewise; what is asked later, too, is answered with the `method` it has now.
            batch: questions the language model answers at once.
            conv_mode: conversation template; None: the checkpoint's.
            **generation: for `generate`.
        """
        self.tokenizer, self.model, self.batch, self.conv_mode = tokenizer, model, batch, conv_mode
        self.generation, self.method = generation, model.method
        # What cannot share a cache goes one by one: methods that read the prompt, beams, windows shorter than a prompt.
        self.shares = (
            self.method.query_agnostic
            and generation.get("num_beams", 1) == 1
            and getattr(model.config, "sliding_window", None) is None
        )
        self._system: tuple[Tensor, SharedPrefix] | None = None

    def ask(self, index: int, question: Question) -> Asked:
        """Tokenise a question's prompt; a question whose text no tokenizer takes says so in its `error`."""
        images = int(question.image is not None or question.data is not None)
        try:
            prompt = build_prompt(question.text, images, self.model.config, self.conv_mode)
            return Asked(index, question, tokenizer_image_token(prompt, self.tokenizer, return_tensors="pt"))
        except Exception as error:  # tokenizers raise all kinds, as on half of a surrogate pair
            said = question.error or f"the question cannot be tokenised: {' '.join(str(error).split())}"
            return Asked(index, replace(question, error=said), torch.empty(0, dtype=torch.long))

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
            error = asked.question.error or picture.error
            if any(token in asked.question.text for token in (DEFAULT_IMAGE_TOKEN, IMAGE_PLACEHOLDER)):
                error = f"the question itself contains {DEFAULT_IMAGE_TOKEN}, which would be read as a picture"
            if error is None:
                usable.append(asked)
            else:
                failures.append(Answer(asked.index, asked.question, error=error))
        return usable, failures

    def _alone(self, picture: Picture, asked: Asked) -> Iterator[Answer]:
        trace = Trace()
        images = None if picture.views is None else self._images([picture])
        more: dict[str, Any] = {"trace": trace, "method": self.method, **self.generation}
        try:
            output = self.model.generate(asked.ids[None], images=images, image_sizes=[picture.size], **more)
        except PromptTooLong as error:
            yield Answer(asked.index, asked.question, error=str(error))
            return
        yield Answer(asked.index, asked.question, self._text(output[0]), *_tokens(trace))

    def _images(self, pictures: Sequence[Picture]) -> Any:
        """What `images` wants: single views as one tensor, AnyRes views as a list."""
        views = [picture.views for picture in pictures if picture.views is not None]
        return torch.stack(views) if views[0].ndim == 3 else views

    @torch.no_grad()
    def _together(self, window: list[tuple[Picture, list[Asked]]]) -> Iterator[Answer]:
        """Answer the questions of a window in batches of like length."""
        shown = [_Shown(picture, questions) for picture, questions in window if picture.views is None]
        seen = [(picture, questions) for picture, questions in window if picture.views is not None]
        # Answers must not depend on what else is in a batch.
        step = 1 if self.method.mixes_images else self.batch
        for start in range(0, len(seen), step):
            part = seen[start : start + step]
            trace, sizes = Trace(), [picture.size for picture, _ in part]
            packed = self.model.compress_images(self._images([p for p, _ in part]), sizes, trace, self.method)
            totals = [image.plan.patches for image in trace.images]
            shown += [_Shown(p, q, made, n) for (p, q), made, n in zip(part, packed, totals, strict=True)]
        for unit in shown:
            for asked in self._take_too_long(unit):
                yield from self._alone(unit.picture, asked)
        for with_image in (False, True):
            units = [unit for unit in shown if unit.questions and (unit.packed is not None) == with_image]
            for batch in self._batches(units):
                yield from self._answer_batch(batch)

    def _take_too_long(self, unit: _Shown) -> list[Asked]:
        """Take the questions out of a unit that do not fit the model; alone, each is told so by itself."""
        limit = self.model.config.max_position_embeddings
        slot = int(unit.packed is not None)
        long = [asked for asked in unit.questions if len(asked.ids) - slot + unit.tokens > limit]
        unit.questions[:] = [asked for asked in unit.questions if asked not in long]
        return long

    def _batches(self, units: list[_Shown]) -> Iterator[list[_Shown]]:
        """Put units of like length together, up to the batch size; one that has more questions stands alone."""
        batch: list[_Shown] = []
        for unit in sorted(units, key=lambda unit: (-unit.tokens, -len(unit.questions[0].ids))):
            together = [*batch, unit]
            if batch and len(together) * max(len(u.questions) for u in together) > self.batch:
                yield batch
                batch = []
            batch.append(unit)
        if batch:
            yield batch

    def _answer_batch(self, units: list[_Shown]) -> Iterator[Answer]:
        """Run what the prompts share once, then the questions, in as few equal batches as they fit."""
        prefix, start = self._prefix(units)
        most = max(len(unit.questions) for unit in units)
        batches = -(-len(units) * most // self.batch)
        for number in range(batches):
            parts = [unit.questions[number::batches] for unit in units]
            rows = max(map(len, parts))
            # Every image has as many rows; an image with fewer questions repeats one, whose answer is dropped.
            filled = [question for part in parts for question in (part + part[:1] * rows)[:rows]]
            ids, mask = _pad([question.ids[start:] for question in filled])
            if prefix is None:
                output = self.model.generate(ids, attention_mask=mask, **self.generation)
            else:
                output = self.model.generate_after(prefix, ids, mask, **self.generation)
            for row, (unit, part) in enumerate(zip(units, parts, strict=True)):
                kept = unit.packed.visual if unit.packed else 0
                for question, answer in zip(part, output[row * rows :], strict=False):
                    yield Answer(question.index, question.question, self._text(answer), kept, unit.total)

    def _prefix(self, units: list[_Shown]) -> tuple[SharedPrefix | None, int]:
        """Run the prompts of units up to and including their images; returns it and where the ids go on."""
        images = [unit.packed for unit in units if unit.packed is not None]
        if not images:
            return None, 0
        ids = units[0].questions[0].ids
        at = int((ids == IMAGE_TOKEN_INDEX).nonzero())
        system = self._system_prefix(ids[:at])
        slots = torch.full((len(units), 1), IMAGE_TOKEN_INDEX)
        return system.rows([0] * len(units)).extend(self.model, slots, images), at + 1

    def _system_prefix(self, ids: Tensor) -> SharedPrefix:
        """What every prompt of the run begins with, run once."""
        system = self._system
        if system is None or not torch.equal(system[0], ids):
            empty = SharedPrefix.empty(self.model, 1)
            self._system = system = (ids, empty.extend(self.model, ids[None]) if len(ids) else empty)
        return system[1]  # and not of self, where another thread may have put another

    def _text(self, ids: Tensor) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True)).strip()


def _tokens(trace: Trace) -> tuple[int, int]:
    """Return the visual tokens the language model ran on and those of the uncompressed image, of one question.

    Where their number changes from layer to layer it is the mean over layers, newlines included in both.
    """
    if not trace.images:
        return 0, 0
    image, layers = trace.images[0], trace.visual_per_layer[0]
    if len(set(layers)) == 1:
        return image.packed.visual, image.plan.patches
    return round(sum(layers) / len(layers)), image.plan.patches + image.packed.newlines


def _pad(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Pad rows of ids on the left: `[B, L]` and their mask."""
    ids = pad_sequence(rows, batch_first=True, padding_side="left")
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side="left")
    return ids, mask
