"""The uncompressed model equals transformers' own LLaVA-NeXT on the same weights: pixels, logits, greedy tokens."""

import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CLIPImageProcessorPil
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, unpad_image

from llava.anyres import AnyResGrid, choose_grid
from llava.compress import get
from llava.constants import IMAGE_TOKEN_INDEX
from llava.efficiency.transformers_next import around, processor
from llava.mm_utils import process_images
from llava.model.miniature import GRIDS, SIDE, TILE
from tests.conftest import Loaded, picture

PINPOINTS = [[TILE * cols, TILE * rows] for cols, rows in GRIDS]
PUBLISHED = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
# HF marks image tokens by an id of the vocabulary: one that no prompt here uses.
PLACEHOLDER = 3


@pytest.fixture(scope="module")
def make_hf(loaded: Callable[..., Loaded]) -> Callable[[list[list[int]]], Any]:
    """Build transformers' model around the miniature's weights; it reads pinpoints as (H, W)."""
    return lambda pinpoints: around(loaded().model, PLACEHOLDER, pinpoints)


@pytest.fixture(scope="module")
def hf(make_hf: Callable[[list[list[int]]], Any]) -> Any:
    return make_hf(PINPOINTS)  # as converted checkpoints have them


@pytest.fixture
def ours(loaded: Callable[..., Loaded], monkeypatch: pytest.MonkeyPatch) -> Loaded:
    monkeypatch.setattr(loaded().model, "method", get("none"))
    return loaded()


def prompt(seed: int, length: int = 8) -> tuple[Tensor, Tensor]:
    """Ids before and after the image; 4 and up, so that neither special ids nor the placeholder occur."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, 384, (length,), generator=generator)
    return torch.cat((torch.tensor([1]), ids[:3])), ids[3:]


def hf_ids(before: Tensor, after: Tensor, tokens: int) -> Tensor:
    return torch.cat((before, torch.full((tokens,), PLACEHOLDER), after))


def our_ids(before: Tensor, after: Tensor) -> Tensor:
    return torch.cat((before, torch.tensor([IMAGE_TOKEN_INDEX]), after))


@torch.no_grad()
def compare(ours: Loaded, hf: Any, theirs: Any, size: tuple[int, int], seed: int = 0) -> tuple[float, bool]:
    """Send one image through both, end to end: greatest difference of logits, and whether the pixels are equal.

    Neither the pixels nor the number of tokens is handed over: HF refuses a number of placeholders it does not expect.
    """
    image = picture(*size)
    pixels = process_images([image], ours.processor, ours.model.config)
    batch = theirs([image], return_tensors="pt")
    assert batch["image_sizes"].tolist() == [[size[1], size[0]]]
    before, after = prompt(seed)
    logits = ours.model(input_ids=our_ids(before, after)[None], images=pixels, image_sizes=[size]).logits
    ids = hf_ids(before, after, logits.shape[1] - len(before) - len(after))
    expected = hf(input_ids=ids[None], **batch).logits
    return (logits - expected).abs().max().item(), torch.equal(pixels[0], batch["pixel_values"][0])


def rules_agree(size: tuple[int, int], tile: int = TILE, side: int = SIDE, pinpoints: Any = PINPOINTS) -> bool:
    """Whether the image is away from both documented differences of geometry."""
    crops = choose_grid(size, pinpoints, tile)
    box, hf_box = (AnyResGrid(image_size=size, crops=crops, side=side, rule=rule).box for rule in ("llava", "hf"))
    return crops == choose_grid(size, pinpoints, tile, rule="hf") and box == hf_box


def sample_sizes(n: int, seed: int, top: int) -> list[tuple[int, int]]:
    """Half of the sizes uniform, half of them log-uniform, which favours long and thin ones."""
    rng = random.Random(seed)
    sizes = [(rng.randint(4, top), rng.randint(4, top)) for _ in range(n // 2)]
    logs = [(int(4 * (top / 4) ** rng.random()), int(4 * (top / 4) ** rng.random())) for _ in range(n - n // 2)]
    return sizes + logs


EXTREME = [(1000, 10), (20, 900), (10, 1000), (900, 20), (2000, 37), (37, 2000), (85, 4), (4, 85), (1200, 5), (5, 1200)]
EDGES = [(84, 85), (85, 84), (85, 85), (84, 168), (168, 84), (168, 168), (169, 168), (252, 84), (84, 252), (252, 85)]
PHOTOS = [(640, 480), (480, 640), (640, 427), (1024, 768), (336, 336), (1000, 300), (300, 1000), (672, 672)]
SIZES = [size for size in EXTREME + EDGES + PHOTOS + sample_sizes(270, 0, 420) if rules_agree(size)]
CHUNKS = [SIZES[start : start + 20] for start in range(0, len(SIZES), 20)]


def test_there_are_sizes_enough() -> None:
    assert len(set(SIZES)) >= 200
    assert {choose_grid(size, PINPOINTS, TILE) for size in SIZES} == set(GRIDS)
    assert set(EXTREME) <= set(SIZES)


@pytest.mark.parametrize("chunk", range(len(CHUNKS)))
def test_logits_equal_transformers(ours: Loaded, hf: Any, chunk: int) -> None:
    theirs = processor(TILE, PINPOINTS)
    for number, size in enumerate(CHUNKS[chunk]):
        difference, same_pixels = compare(ours, hf, theirs, size, seed=number)
        assert same_pixels, size
        assert difference <= 1e-4, size


def test_the_logits_depend_on_the_image(ours: Loaded) -> None:
    # Otherwise the comparisons above would show nothing.
    ids = our_ids(*prompt(0))[None]
    one, other = (
        ours.model(
            input_ids=ids,
            images=process_images([picture(300, 200, seed)], ours.processor, ours.model.config),
            image_sizes=[(300, 200)],
        ).logits[0, -1]
        for seed in (0, 1)
    )
    assert (one - other).abs().max() > 0.05


# --- the two documented differences of geometry ---


def test_ties_get_the_transposed_canvas() -> None:
    """HF reads pinpoints as (H, W). The lists are symmetric, so that shows only where two canvases tie.

    They do for images that fit into one tile, all pixels of which every canvas keeps, and for images so thin that no
    canvas keeps a whole pixel across.
    """
    sizes = [(w, h) for w in range(1, 2 * TILE, 3) for h in range(1, 2 * TILE, 3)]
    thin = [(short, long) for short in (1, 2, 3, 4) for long in range(200, 1200, 7)]
    sizes += thin + [size[::-1] for size in thin]
    differ = set()
    for width, height in sizes:
        rows, cols = get_anyres_image_grid_shape((height, width), PINPOINTS, TILE)
        assert (cols, rows) == choose_grid((width, height), PINPOINTS, TILE, rule="hf")
        if (cols, rows) != choose_grid((width, height), PINPOINTS, TILE):
            differ.add((width, height))
    assert differ == {size for size in sizes if max(size) <= TILE or max(size) > 3 * TILE * min(size)}
    # (cols, rows): ours takes the first listed, (1, 2); HF reads the same entry as one row of two.
    assert {choose_grid(size, PINPOINTS, TILE) for size in differ} == {(1, 2)}
    assert {choose_grid(size, PINPOINTS, TILE, rule="hf") for size in differ} == {(2, 1)}


@pytest.mark.parametrize("size", [(84, 84), (40, 47), (47, 40), (84, 30), (30, 84), (12, 5), (1500, 5), (5, 1500)])
def test_tied_images_agree_once_pinpoints_are_transposed(
    ours: Loaded, make_hf: Callable[..., Any], size: tuple[int, int]
) -> None:
    transposed = [pinpoint[::-1] for pinpoint in PINPOINTS]
    difference, same_pixels = compare(ours, make_hf(transposed), processor(TILE, transposed), size)
    assert same_pixels
    assert difference <= 1e-4


def hf_unpadded(size: tuple[int, int], crops: tuple[int, int], side: int) -> tuple[int, int]:
    """(width, height) of what transformers leaves of a canvas."""
    canvas = torch.zeros(1, side * crops[1], side * crops[0])
    kept = unpad_image(canvas, (size[1], size[0]))
    return kept.shape[2], kept.shape[1]


def test_rounding_is_the_other_difference() -> None:
    """Where w·scale is an integer that floats miss, HF rounds to it; LLaVA truncates and, if so, cuts a row less."""
    sizes = [(w, h) for w in range(TILE + 1, 420) for h in range(20, 420)]
    differ = {size for size in sizes if not rules_agree(size)}
    assert 0 < len(differ) < len(sizes) / 1000
    for size in differ:
        crops = choose_grid(size, PINPOINTS, TILE)
        own, hf = (AnyResGrid(image_size=size, crops=crops, side=SIDE, rule=rule).unpadded for rule in ("llava", "hf"))
        assert hf == hf_unpadded(size, crops, SIDE)
        # Truncation makes the length smaller by one, so the padding of both ends may grow by a patch.
        assert tuple(b - a for a, b in zip(own, hf, strict=True)) in {(2, 0), (0, 2)}


ROUNDED = [(w, h) for w in range(TILE + 1, 300) for h in range(20, 300) if not rules_agree((w, h))][:6]


@pytest.mark.parametrize("size", ROUNDED)
def test_rounded_images_agree_once_the_rule_is_transformers(
    ours: Loaded, hf: Any, monkeypatch: pytest.MonkeyPatch, size: tuple[int, int]
) -> None:
    theirs = processor(TILE, PINPOINTS)
    with pytest.raises(ValueError, match="tokens"):  # HF expects another number of placeholders
        compare(ours, hf, theirs, size)
    monkeypatch.setattr("llava.model.views.AnyResGrid", lambda **fields: AnyResGrid(rule="hf", **fields))
    difference, same_pixels = compare(ours, hf, theirs, size)
    assert same_pixels  # the pixels never differ by rounding
    assert difference <= 1e-4


def test_geometry_at_the_published_scale() -> None:
    # The miniature has 6 patches a side; the same functions at 24 and 336 pixels.
    for size in sample_sizes(1000, 1, 2000):
        crops = choose_grid(size, PUBLISHED, 336)
        if not rules_agree(size, 336, 24, PUBLISHED):
            continue
        assert get_anyres_image_grid_shape(size[::-1], PUBLISHED, 336)[::-1] == crops
        assert hf_unpadded(size, crops, 24) == AnyResGrid(image_size=size, crops=crops).unpadded


@pytest.mark.parametrize(
    ("size", "own", "hf"),
    [((205, 656), (14, 48), (16, 48)), ((55, 176), (14, 48), (16, 48)), ((88, 99), (24, 26), (24, 28))],
)
def test_published_examples_of_rounding(size: tuple[int, int], own: tuple[int, int], hf: tuple[int, int]) -> None:
    assert AnyResGrid(image_size=size, crops=(1, 2)).unpadded == own
    assert AnyResGrid(image_size=size, crops=(1, 2), rule="hf").unpadded == hf == hf_unpadded(size, (1, 2), 24)


@pytest.mark.parametrize("size", [(640, 480), (300, 1000), (2000, 400), (337, 336)])
def test_pixels_at_the_published_scale(size: tuple[int, int]) -> None:
    own = CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})
    image = picture(*size)
    views = process_images([image], own, SimpleNamespace(image_aspect_ratio="anyres", image_grid_pinpoints=PUBLISHED))
    assert torch.equal(views, processor(336, PUBLISHED)([image], return_tensors="pt")["pixel_values"])


# --- greedy search ---

QUERIES = [(300, 200), (90, 400), (400, 90), (250, 250), (120, 60), (1000, 10)]


def greedy_inputs(ours: Loaded, sizes: list[tuple[int, int]]) -> tuple[list[Tensor], list[Tensor], list[Any]]:
    """Prompts of different lengths for both models, and the images."""
    images = [picture(*size) for size in sizes]
    prompts = [prompt(seed, 6 + 3 * seed) for seed in range(len(sizes))]
    pixels = [process_images([image], ours.processor, ours.model.config) for image in images]
    tokens = [len(ours.model.compress_images(p, [size])[0].origin) for p, size in zip(pixels, sizes, strict=True)]
    theirs = [hf_ids(*parts, count) for parts, count in zip(prompts, tokens, strict=True)]
    return [our_ids(*parts) for parts in prompts], theirs, images


def pad_left(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=0, padding_side="left")
    ones = [torch.ones_like(row) for row in rows]
    return ids, torch.nn.utils.rnn.pad_sequence(ones, batch_first=True, padding_value=0, padding_side="left")


def answers(ours: Loaded, hf: Any, sizes: list[tuple[int, int]], rows: slice) -> tuple[Tensor, Tensor]:
    own, theirs, images = (part[rows] for part in greedy_inputs(ours, sizes))
    ids, mask = pad_left(own)
    wanted, wanted_mask = pad_left(theirs)
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": 2}
    pixels = process_images(images, ours.processor, ours.model.config)
    got = ours.model.generate(ids, images=pixels, image_sizes=sizes[rows], attention_mask=mask, **settings)
    batch = processor(TILE, PINPOINTS)(images, return_tensors="pt")
    expected = hf.generate(input_ids=wanted, attention_mask=wanted_mask, **batch, **settings)
    return got, expected[:, wanted.shape[1] :]


@pytest.mark.parametrize("row", range(len(QUERIES)))
def test_greedy_tokens_equal_transformers(ours: Loaded, hf: Any, row: int) -> None:
    got, expected = answers(ours, hf, QUERIES, slice(row, row + 1))
    assert torch.equal(got, expected)


@pytest.mark.parametrize("rows", [slice(0, 2), slice(2, 6), slice(0, 6)])
def test_batched_greedy_tokens_equal_transformers(ours: Loaded, hf: Any, rows: slice) -> None:
    got, expected = answers(ours, hf, QUERIES, rows)
    assert torch.equal(got, expected)
    assert len({tuple(row) for row in got.tolist()}) == len(got)  # rows that are all alike would show little
