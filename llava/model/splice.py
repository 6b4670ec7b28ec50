"""Put the visual tokens where `<image>` stands in the prompt: a pure function of ids and packed images."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from llava.compress.pack import NEWLINE as NEWLINE_ORIGIN
from llava.compress.pack import Packed
from llava.compress.stages import NEWLINE, PAD, PREFIX, TEXT, VISUAL
from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX, InputError


@dataclass(kw_only=True)
class Spliced:
    """A batch of prompts as the language model gets it."""

    inputs_embeds: Tensor
    """`[B, L, D]`, zeros where padded."""
    attention_mask: Tensor
    """`[B, L]`, 1 for a token, 0 for padding."""
    position_ids: Tensor
    """`[B, L]`, counted without padding."""
    labels: Tensor | None
    """`[B, L]`, IGNORE_INDEX on images and padding."""
    role: Tensor
    """`[B, L]`: what every token is, as in `compress.stages`."""
    lengths: list[int]
    """Tokens per row, padding not counted."""
    n_visual: tuple[int, ...]
    """Image tokens per row, newlines included."""
    n_text: tuple[int, ...]
    """TEXT tokens per row."""
    prefix_lengths: list[int]
    """Per row, the tokens up to and including the last image (0 without one): what its questions share."""

    @property
    def visual(self) -> Tensor:
        """Bool `[B, L]`: the token belongs to an image."""
        return (self.role == VISUAL) | (self.role == NEWLINE)


def splice(
    input_ids: Tensor,
    packed: Sequence[Packed],
    embed: Callable[[Tensor], Tensor],
    attention_mask: Tensor | None = None,
    labels: Tensor | None = None,
    padding_side: str = "right",
) -> Spliced:
    """Replace every image placeholder by its image's tokens and pad the rows to one length.

    Args:
        input_ids: `[B, L]`, IMAGE_TOKEN_INDEX where an image goes; padding anywhere the mask is 0.
        packed: the images in the order of their placeholders, row by row; rows may have none.
        embed: maps ids `[T]` to embeddings `[T, D]`; called once.
        attention_mask: `[B, L]`; None: every id is a token.
        labels: `[B, L]`, aligned with `input_ids`.
        padding_side: `"left"` or `"right"`.

    Raises:
        InputError: there are more or fewer placeholders than images, or the ids are no batch.
    """
    if input_ids.ndim != 2:
        raise InputError(f"input_ids must be a batch [B, L], got shape {list(input_ids.shape)}; use ids[None] for one")
    keep = torch.ones_like(input_ids) if attention_mask is None else attention_mask.to(input_ids.device)
    keep = keep.bool()
    rows = [ids[kept] for ids, kept in zip(input_ids, keep, strict=True)]
    cuts = [_segments(row) for row in rows]
    placeholders = sum(len(segments) - 1 for segments in cuts)
    if placeholders != len(packed):
        raise InputError(
            f"the prompts have {placeholders} <image> placeholder(s) for {len(packed)} image(s); give one per image"
        )
    text = torch.cat([row[start:end] for row, segments in zip(rows, cuts, strict=True) for start, end in segments])
    words = iter(embed(text).split([end - start for segments in cuts for start, end in segments]))
    images = (image.features for image in packed)
    embeds, roles, targets, prefixes, n_visual, n_text = [], [], [], [], [], []
    origins = (image.origin for image in packed)
    for index, segments in enumerate(cuts):
        parts = _interleave(words, images, len(segments))
        embeds.append(torch.cat([part.to(parts[0]) for part in parts]))
        # Of a model on several devices, images may come from another one than words.
        embedded = embeds[-1].device
        roles.append(torch.cat([_role(number, part, origins).to(embedded) for number, part in enumerate(parts)]))
        if len(parts) == 1:
            roles[-1].fill_(TEXT)
        prefixes.append(sum(map(len, parts[:-1])) if len(parts) > 1 else 0)
        n_visual.append(sum(map(len, parts[1::2])))
        n_text.append(sum(map(len, parts[2::2] if len(parts) > 1 else parts)))
        if labels is not None:
            target = torch.full_like(roles[-1], IGNORE_INDEX, dtype=labels.dtype)
            own = labels[index].to(input_ids.device)[keep[index]]
            target[_is_text(roles[-1])] = own[rows[index] != IMAGE_TOKEN_INDEX]
            targets.append(target)
    lengths = [len(row) for row in embeds]

    def pad(sequences: list[Tensor], value: float) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence(
            sequences, batch_first=True, padding_value=value, padding_side=padding_side
        )

    mask = pad([text.new_ones(n) for n in lengths], 0)
    return Spliced(
        inputs_embeds=pad(embeds, 0.0),
        attention_mask=mask,
        position_ids=(mask.cumsum(1) - 1).clamp_min(0),
        labels=None if labels is None else pad(targets, IGNORE_INDEX),
        role=pad(roles, PAD),
        lengths=lengths,
        n_visual=tuple(n_visual),
        n_text=tuple(n_text),
        prefix_lengths=prefixes,
    )


def _role(number: int, part: Tensor, origins: Iterator[Tensor]) -> Tensor:
    """What the tokens of a part are: `[T]`; every second part is an image, whose origin is taken."""
    if number % 2 == 0:
        return torch.full((len(part),), TEXT if number else PREFIX, device=part.device)
    return torch.where(next(origins) == NEWLINE_ORIGIN, NEWLINE, VISUAL)


def _is_text(role: Tensor) -> Tensor:
    return (role == PREFIX) | (role == TEXT)


def _interleave(words: Iterator[Tensor], images: Iterator[Tensor], stretches: int) -> list[Tensor]:
    """Take the next `stretches` of text with an image between each two."""
    parts = [next(words)]
    for _ in range(stretches - 1):
        parts += [next(images), next(words)]
    return parts


def _segments(row: Tensor) -> list[tuple[int, int]]:
    """Cut a row at its placeholders into `(start, end)` stretches of text, empty ones included."""
    at = (row == IMAGE_TOKEN_INDEX).nonzero().flatten().tolist()
    return [(start + 1, end) for start, end in pairwise([-1, *at, len(row)])]
