"""What every method keeps to in a model: images of every grid, padded batches, several images; both precisions."""

from collections.abc import Callable
from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from llava.anyres import AnyResGrid
from llava.compress import available, get, method_class
from llava.compress.trace import Trace
from llava.constants import IMAGE_TOKEN_INDEX
from llava.mm_utils import process_images
from llava.model.builder import load_pretrained_model
from llava.model.miniature import GRIDS, SIDE
from tests.conftest import picture
from tests.methods import fitted

IMG = IMAGE_TOKEN_INDEX
# One of every grid, padded at the sides, above, or not at all; and of no grid, for models of single views.
SIZES = {(2, 2): (160, 120), (1, 2): (70, 160), (2, 1): (168, 84), (3, 1): (500, 150), (1, 3): (90, 400)}
PROMPTS = [torch.tensor(ids) for ids in ([1, 9, IMG, 5, 6, 7], [1, IMG, 8, 8, 30, 31, 5, 60], [1, 44, IMG, 5])]
BATCH = [(160, 120), (500, 150), (70, 160)]
GREEDY = {"do_sample": False, "max_new_tokens": 3, "pad_token_id": 0}

every_method = pytest.mark.parametrize("name", available())
every_model = pytest.mark.parametrize("version", ["v1.5", "v1.6-vicuna"])
every_dtype = pytest.mark.parametrize("dtype", ["float32", "bfloat16"])


class Answered(NamedTuple):
    ids: Tensor
    trace: Trace


@pytest.fixture(scope="module")
def ask(checkpoint: Callable[[str], Any]) -> Callable[..., Answered]:
    """Answer prompts about pictures with a method, on a miniature of some version and precision."""

    @cache
    def loaded(version: str, dtype: str) -> Any:
        return load_pretrained_model(str(checkpoint(version)), device="cpu", dtype=dtype)

    def answer(version: str, dtype: str, method: Any, rows: list[Tensor], sizes: list[tuple[int, int]]) -> Answered:
        _, model, processor, _ = loaded(version, dtype)
        model.method = get(method) if isinstance(method, str) else method
        views = [process_images([picture(*size)], processor, model.config)[0] for size in sizes]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=0)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        trace = Trace()
        images = torch.stack(views) if version == "v1.5" else views
        given: dict[str, Any] = {"images": images, "image_sizes": sizes, "attention_mask": mask, "trace": trace}
        out = model.generate(ids, **given, **GREEDY)
        assert not any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in model.modules())
        return Answered(out, trace)

    return answer


def kept_are_valid_and_as_planned(trace: Trace) -> None:
    for image in trace.images:
        valid = image.grid.valid(image.unpad)
        patches = image.packed.origin[image.packed.origin >= 0]
        assert patches.unique().numel() == patches.numel()
        assert valid.flatten()[patches].all()
        assert image.plan.at_least <= image.packed.patches <= image.plan.at_most
        assert image.ledger()["tokens"] == len(image.packed.origin)


@every_method
@every_model
@every_dtype
def test_single_images_of_every_grid(ask: Any, name: str, version: str, dtype: str) -> None:
    method = fitted(name, 0.5)
    for grid, size in SIZES.items():
        out, trace = ask(version, dtype, method, PROMPTS[:1], [size])
        (image,) = trace.images
        assert image.grid.crops == (grid if version != "v1.5" else None)
        kept_are_valid_and_as_planned(trace)
        assert 1 <= out.shape[1] <= 3
        (ran,) = trace.visual_per_layer
        assert list(ran) == sorted(ran, reverse=True)
        assert ran[0] == len(image.packed.origin)
    again = ask(version, dtype, method, PROMPTS[:1], [size])
    assert torch.equal(out, again.ids)


@every_method
@every_model
@every_dtype
def test_a_padded_batch_of_different_images(ask: Any, name: str, version: str, dtype: str) -> None:
    method = fitted(name, 0.5)
    out, trace = ask(version, dtype, method, PROMPTS, BATCH)
    kept_are_valid_and_as_planned(trace)
    for row, (prompt, size) in enumerate(zip(PROMPTS, BATCH, strict=True)):
        one, alone = ask(version, dtype, method, [prompt], [size])
        assert trace.visual_per_layer[row] == alone.visual_per_layer[0]
        assert trace.sequence_lengths[row] == alone.sequence_lengths[0]
        if dtype == "float32":  # in half precision products of another shape round otherwise
            assert trim(out[row]) == trim(one[0])
            assert torch.equal(trace.images[row].packed.origin, alone.images[0].packed.origin)


def trim(row: Tensor) -> list[int]:
    """Ids up to the end of the answer."""
    ids: list[int] = row.tolist()
    return ids[: ids.index(2)] if 2 in ids else ids


@every_method
@every_model
@every_dtype
def test_two_images_in_one_prompt(ask: Any, name: str, version: str, dtype: str) -> None:
    method, sizes = fitted(name, 0.5), BATCH[:2]
    prompt = torch.tensor([1, 9, IMG, 5, 6, IMG, 7, 8])
    _, trace = ask(version, dtype, method, [prompt], sizes)
    kept_are_valid_and_as_planned(trace)
    assert [image.grid.image_size for image in trace.images] == sizes
    for image, size in zip(trace.images, sizes, strict=True):
        (alone,) = ask(version, dtype, method, PROMPTS[:1], [size]).trace.images
        assert len(image.packed.origin) == len(alone.packed.origin)
        if dtype == "float32":
            assert torch.equal(image.packed.origin, alone.packed.origin)
    (ran,) = trace.visual_per_layer
    assert all(after <= before for before, after in pairwise(ran))
    assert ran[0] == sum(len(image.packed.origin) for image in trace.images)
    assert trace.sequence_lengths == [len(prompt) - 2 + ran[0]]


@pytest.mark.parametrize("name", [name for name in available() if method_class(name).has_ratio])
@every_model
@every_dtype
def test_keeping_everything_is_no_method(ask: Any, name: str, version: str, dtype: str) -> None:
    out, trace = ask(version, dtype, fitted(name, 1.0), PROMPTS, BATCH)
    plain, without = ask(version, dtype, "none", PROMPTS, BATCH)
    assert torch.equal(out, plain)
    assert trace.visual_per_layer == without.visual_per_layer


def test_the_pictures_have_the_grids_they_stand_for() -> None:
    assert set(SIZES) == set(GRIDS)
    grids = [AnyResGrid(image_size=size, crops=crops, side=SIDE) for crops, size in SIZES.items()]
    assert {grid.n_patches() < grid.n_views * SIDE**2 for grid in grids} == {True, False}
