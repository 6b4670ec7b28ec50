"""A prompt that starts from cached keys and values goes on as the whole prompt does."""

from typing import Any

import pytest
import torch
from torch import Tensor

from llava.compress.pack import Packed
from llava.constants import IMAGE_TOKEN_INDEX
from llava.mm_utils import process_images
from llava.model.language_model.prefix import SharedPrefix
from tests.conftest import picture

SIZES = [(300, 200), (90, 60), (60, 200)]
SLOT = torch.tensor([[IMAGE_TOKEN_INDEX]])


def ids(length: int, seed: int) -> Tensor:
    return torch.randint(3, 300, (length,), generator=torch.Generator().manual_seed(seed))


def views(model: Any, size: tuple[int, int]) -> Any:
    return process_images([picture(*size)], model.processor, model.config)


def encoded(model: Any, size: tuple[int, int]) -> Packed:
    with torch.no_grad():
        (packed,) = model.compress_images(views(model, size), [size])
    return packed


def whole(model: Any, prompt: Tensor, size: tuple[int, int] | None, tokens: int = 8) -> list[int]:
    images = None if size is None else views(model, size)
    sizes = None if size is None else [size]
    return model.generate(prompt[None], images=images, image_sizes=sizes, max_new_tokens=tokens)[0].tolist()


def padded(rows: list[Tensor], side: str = "left") -> tuple[Tensor, Tensor]:
    pad = torch.nn.utils.rnn.pad_sequence
    return (
        pad(rows, batch_first=True, padding_side=side),
        pad([torch.ones_like(row) for row in rows], batch_first=True, padding_side=side),
    )


def until_eos(row: list[int]) -> list[int]:
    return row[: row.index(2)] if 2 in row else row


@pytest.mark.parametrize("side", ["left", "right"])
def test_images_of_several_lengths_each_with_several_questions(model, side):
    system = ids(7, 0)
    questions = [(image, ids(4 + 3 * turn, 10 * image + turn)) for image in range(3) for turn in range(3)]
    shared = SharedPrefix.empty(model, 1).extend(model, system[None])
    images = shared.rows([0] * 3).extend(model, SLOT.expand(3, 1), [encoded(model, size) for size in SIZES])
    assert images.lengths == [7 + len(encoded(model, size).origin) for size in SIZES]
    assert images.mask.sum(1).tolist() == images.lengths
    rows = images.rows([image for image, _ in questions])
    output = model.generate_after(rows, *padded([q for _, q in questions], side), max_new_tokens=8).tolist()
    wanted = [whole(model, torch.cat((system, SLOT[0], q)), SIZES[image]) for image, q in questions]
    assert [until_eos(row) for row in output] == [until_eos(row) for row in wanted]
    assert len({tuple(row) for row in wanted}) > 6, "the miniature tells the questions apart"


def test_rows_leave_the_original_as_it_is(model):
    system = SharedPrefix.empty(model, 1).extend(model, ids(5, 1)[None])
    before = [(layer.keys.clone(), layer.values.clone()) for layer in system.cache.layers]
    for turn in range(2):
        rows = system.rows([0, 0]).extend(model, torch.stack([ids(3, turn), ids(3, turn + 5)]))
        assert rows.lengths == [8, 8]
        model.generate_after(rows, torch.stack([ids(2, 8), ids(2, 9)]), max_new_tokens=2)
    assert system.cache.get_seq_length() == 5
    for layer, (keys, values) in zip(system.cache.layers, before, strict=True):
        assert torch.equal(layer.keys, keys)
        assert torch.equal(layer.values, values)


def test_a_prefix_in_steps_is_the_prefix_at_once(model):
    text = torch.stack([ids(9, 3), ids(9, 4)])
    once = SharedPrefix.empty(model, 2).extend(model, text)
    steps = SharedPrefix.empty(model, 2)
    for start in range(0, 9, 3):
        steps = steps.extend(model, text[:, start : start + 3])
    for one, other in zip(once.cache.layers, steps.cache.layers, strict=True):
        torch.testing.assert_close(one.keys, other.keys)
        torch.testing.assert_close(one.values, other.values)
    question = ids(4, 5)[None]
    answers = [model.generate_after(p, question.expand(2, -1), max_new_tokens=6).tolist() for p in (once, steps)]
    assert answers[0] == answers[1] == [whole(model, torch.cat((row, question[0])), None, 6) for row in text]


def test_from_nothing(model):
    question = ids(6, 6)
    output = model.generate_after(SharedPrefix.empty(model, 1), question[None], max_new_tokens=5)
    assert output[0].tolist() == whole(model, question, None, 5)
    empty = SharedPrefix.empty(model, 1).rows([0, 0, 0])
    assert (empty.mask.shape, empty.lengths) == ((3, 0), [0, 0, 0])


def test_sampling_settings_pass_through(model):
    prefix = SharedPrefix.empty(model, 1).extend(model, ids(5, 1)[None])
    torch.manual_seed(3)
    drawn = {
        tuple(
            model.generate_after(
                prefix.rows([0]), ids(3, 2)[None], do_sample=True, temperature=2.0, top_p=0.9, max_new_tokens=5
            )[0].tolist()
        )
        for _ in range(4)
    }
    assert len(drawn) > 1
