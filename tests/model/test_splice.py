"""`splice` against a reference that walks the rows token by token."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llava.compress.pack import Packed
from llava.compress.stages import TEXT
from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX, InputError
from llava.model.splice import Spliced, splice

WIDTH, WORDS = 3, 20
TABLE = torch.randn(WORDS, WIDTH, generator=torch.Generator().manual_seed(0))
IMG = IMAGE_TOKEN_INDEX


def embed(ids: Tensor) -> Tensor:
    return TABLE[ids]


def image(tokens: int, seed: int = 1) -> Packed:
    features = torch.randn(tokens, WIDTH, generator=torch.Generator().manual_seed(seed))
    return Packed(features=features, origin=torch.arange(tokens), patches=tokens, newlines=0)


def naive(ids: list[list[int]], mask: list[list[int]], labels: list[list[int]], packed: list[Packed]) -> list[Any]:
    """Per row: embeddings, labels, whether visual, and the length up to the end of the last image."""
    images, rows = iter(packed), []
    for row in zip(ids, mask, labels, strict=True):
        embeds, targets, visual, prefix = [], [], [], 0
        for token, kept, label in zip(*row, strict=True):
            if kept and token == IMG:
                features = next(images).features
                embeds += list(features)
                targets += [IGNORE_INDEX] * len(features)
                visual += [True] * len(features)
                prefix = len(embeds)
            elif kept:
                embeds, targets, visual = [*embeds, TABLE[token]], [*targets, label], [*visual, False]
        rows.append((torch.stack(embeds), targets, visual, prefix))
    return rows


def check(spliced: Spliced, rows: list[Any], side: str) -> None:
    longest = max(len(row[0]) for row in rows)
    assert spliced.inputs_embeds.shape == (len(rows), longest, WIDTH)
    assert spliced.lengths == [len(row[0]) for row in rows]
    assert spliced.prefix_lengths == [row[3] for row in rows]
    for i, (embeds, targets, visual, _) in enumerate(rows):
        n = len(embeds)
        own = slice(longest - n, longest) if side == "left" else slice(0, n)
        mask = torch.zeros(longest, dtype=torch.bool)
        mask[own] = True
        assert torch.equal(spliced.attention_mask[i].bool(), mask)
        assert torch.equal(spliced.inputs_embeds[i, own], embeds)
        assert not spliced.inputs_embeds[i, ~mask].any()
        assert spliced.position_ids[i, own].tolist() == list(range(n))
        assert spliced.position_ids.min() >= 0  # a rotary table is indexed by it, padding included
        assert spliced.visual[i, own].tolist() == visual
        assert not spliced.visual[i, ~mask].any()
        assert spliced.n_visual[i] == sum(visual)
        assert spliced.n_text[i] == (spliced.role[i] == TEXT).sum()
        if spliced.labels is not None:
            assert spliced.labels[i, own].tolist() == targets
            assert (spliced.labels[i, ~mask] == IGNORE_INDEX).all()


LAYOUTS = {
    "no image": ([[1, 5, 6], [1, 7, 8]], []),
    "one each": ([[1, IMG, 5], [1, 6, IMG]], [4, 2]),
    "first and last": ([[IMG, 5, 6], [5, 6, IMG]], [3, 3]),
    "image alone": ([[IMG], [5]], [2]),
    "none and two": ([[1, 5, 6, 7, 8], [1, IMG, 5, IMG, 6]], [1, 4]),
    "side by side": ([[1, IMG, IMG, 5], [1, 5, 6, IMG]], [2, 3, 1]),
    "two, one, none": ([[1, IMG, 5, IMG], [1, 5, IMG, 6], [1, 5, 6, 7]], [5, 1, 2]),
}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("with_labels", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, with_labels: bool, side: str) -> None:
    ids, sizes = LAYOUTS[layout]
    packed = [image(size, seed) for seed, size in enumerate(sizes)]
    labels = [[100 + i for i in range(len(row))] for row in ids]
    spliced = splice(
        torch.tensor(ids), packed, embed, labels=torch.tensor(labels) if with_labels else None, padding_side=side
    )
    check(spliced, naive(ids, [[1] * len(row) for row in ids], labels, packed), side)
    assert (spliced.labels is not None) == with_labels


@st.composite
def batches(draw: st.DrawFn) -> Any:
    """Random rows with 0-3 images, padded on either side or within, and labels."""
    width = draw(st.integers(1, 9))
    rows = draw(st.integers(1, 4))
    token = st.one_of(st.integers(0, WORDS - 1), st.integers(0, WORDS - 1), st.just(IMG))
    line = st.lists(token, min_size=width, max_size=width)
    ids = draw(st.lists(line, min_size=rows, max_size=rows))
    keep = st.lists(st.integers(0, 1), min_size=width, max_size=width).filter(any)
    mask = draw(st.lists(keep, min_size=rows, max_size=rows))
    number = st.lists(st.integers(-100, 50), min_size=width, max_size=width)
    labels = draw(st.lists(number, min_size=rows, max_size=rows))
    images = sum(
        t == IMG and m == 1 for row, kept in zip(ids, mask, strict=True) for t, m in zip(row, kept, strict=True)
    )
    sizes = draw(st.lists(st.integers(1, 5), min_size=images, max_size=images))
    return ids, mask, labels, [image(size, seed) for seed, size in enumerate(sizes)]


@settings(max_examples=300, deadline=None)
@given(batches(), st.sampled_from(["left", "right"]))
def test_random_layouts(batch: Any, side: str) -> None:
    ids, mask, labels, packed = batch
    given_ids, given_labels = torch.tensor(ids), torch.tensor(labels)
    spliced = splice(
        given_ids, packed, embed, attention_mask=torch.tensor(mask), labels=given_labels, padding_side=side
    )
    check(spliced, naive(ids, mask, labels, packed), side)
    assert given_ids.tolist() == ids  # arguments are not changed
    assert given_labels.tolist() == labels


@pytest.mark.parametrize("kind", [torch.bool, torch.int64, torch.float32])
def test_padding_on_either_side_and_within_is_left_out(kind: torch.dtype) -> None:
    ids = torch.tensor([[0, 0, 1, IMG, 5], [1, IMG, 5, 0, 0], [1, 0, IMG, 0, 5]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 1, 0, 1]], dtype=kind)
    spliced = splice(ids, [image(3)] * 3, embed, attention_mask=mask)
    assert spliced.lengths == [5, 5, 5]
    assert torch.equal(spliced.inputs_embeds[0], spliced.inputs_embeds[1])
    assert torch.equal(spliced.inputs_embeds[0], spliced.inputs_embeds[2])


def test_a_masked_placeholder_takes_no_image() -> None:
    # Some harnesses pad with whatever id is at hand; only what the mask keeps counts.
    ids = torch.tensor([[IMG, 1, IMG, 5]])
    spliced = splice(ids, [image(3)], embed, attention_mask=torch.tensor([[0, 1, 1, 1]]))
    assert spliced.lengths == [5]
    assert spliced.prefix_lengths == [4]


def test_embed_is_called_once_and_never_with_a_placeholder() -> None:
    calls: list[Tensor] = []

    def spy(ids: Tensor) -> Tensor:
        calls.append(ids)
        return embed(ids)

    splice(torch.tensor([[1, IMG, 5], [6, 7, IMG]]), [image(2), image(3)], spy)
    assert [call.tolist() for call in calls] == [[1, 5, 6, 7]]


def test_images_take_the_dtype_of_the_words() -> None:
    packed = image(2)
    packed.features = packed.features.double()
    spliced = splice(torch.tensor([[1, IMG, 5]]), [packed], lambda ids: embed(ids).bfloat16())
    assert spliced.inputs_embeds.dtype == torch.bfloat16
    # also where the row begins with its image
    spliced = splice(torch.tensor([[IMG, 5]]), [packed], lambda ids: embed(ids).bfloat16())
    assert spliced.inputs_embeds.dtype == torch.bfloat16


def test_labels_keep_what_the_caller_ignored() -> None:
    ids = torch.tensor([[1, 5, IMG, 6]])
    spliced = splice(ids, [image(2)], embed, labels=torch.tensor([[IGNORE_INDEX, 5, 77, 6]]))
    # 77 stood at the placeholder, which no longer exists
    assert spliced.labels.tolist() == [[IGNORE_INDEX, 5, IGNORE_INDEX, IGNORE_INDEX, 6]]


@pytest.mark.parametrize(("placeholders", "images"), [(0, 1), (1, 0), (1, 2), (3, 2)])
def test_a_mismatch_names_both_numbers(placeholders: int, images: int) -> None:
    ids = torch.tensor([[1, *[IMG] * placeholders, 5]])
    with pytest.raises(InputError, match=rf"\b{placeholders}\b.*\b{images}\b"):
        splice(ids, [image(2)] * images, embed)


def test_a_mismatch_between_rows_is_none() -> None:
    # Images are handed out in order over the whole batch; only the sum can be wrong.
    ids = torch.tensor([[1, IMG, IMG], [1, 5, 6]])
    assert splice(ids, [image(2), image(3)], embed).lengths == [6, 3]
