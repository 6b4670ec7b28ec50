"""The naive arrangement selects what the release does, in its order, and its tower is transformers' own."""

from collections.abc import Callable

import pytest
import torch

from llava.anyres import AnyResGrid, choose_grid
from llava.efficiency import naive
from llava.mm_utils import process_images
from llava.model.miniature import GRIDS, SIDE, TILE
from tests.compress.reference_released import NL, Entry, released_sequence
from tests.conftest import Loaded, picture

PINPOINTS = [[TILE * cols, TILE * rows] for cols, rows in GRIDS]
SIZES = [(168, 168), (160, 120), (120, 160), (250, 125), (500, 75), (75, 400)]


@pytest.mark.parametrize("ratio", [0.75, 0.5, 0.25, 0.1])
@pytest.mark.parametrize("size", SIZES)
def test_the_sequence_is_the_released_one(size: tuple[int, int], ratio: float) -> None:
    crops = choose_grid(size, PINPOINTS, TILE)
    grid = AnyResGrid(image_size=size, crops=crops, side=SIDE)
    v, n = grid.n_views, SIDE**2
    # Every token is its own number, which half precision holds; a newline is -1.
    features = torch.arange(v * n, dtype=torch.float32).reshape(v, n, 1).expand(-1, -1, 4)
    for seed in range(5):
        scores = torch.randn(v, n, generator=torch.Generator().manual_seed(seed)).double()
        sequence, kept = naive.compress(features, scores, grid, ratio, -torch.ones(4))
        found: list[Entry] = [NL if at < 0 else divmod(int(at), n) for at in sequence[:, 0]]
        assert found == released_sequence(scores.tolist(), size, crops, SIDE, ratio)
        assert sorted((view, patch) for view, patches in enumerate(kept) for patch in patches) == sorted(
            entry for entry in found if entry != NL
        )


def test_features_and_scores_are_those_of_transformers_written_out_attention(loaded: Callable[[], Loaded]) -> None:
    _, model, processor, _ = loaded()
    tower = model.get_vision_tower()
    pixels = process_images([picture(160, 120)], processor, model.config)[0]
    asked: list[torch.Tensor] = []
    last = tower.vision_tower.encoder.layers[-1].self_attn
    hooks = [p.register_forward_hook(lambda m, a, out: asked.append(out)) for p in (last.q_proj, last.k_proj)]
    with torch.no_grad():
        whole = tower.vision_tower(pixels, output_hidden_states=True)
        for hook in hooks:
            hook.remove()
        features, scores = naive.encode(tower, pixels)
    torch.testing.assert_close(features, whole.hidden_states[-2][:, 1:], rtol=1e-4, atol=1e-5)
    query, keys = asked[0][:, 0], asked[1][:, 1:]
    expected = torch.einsum("vc,vnc->vn", query, keys) / (last.num_heads * last.head_dim**0.5)  # mean over heads
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-5)


def test_pixels_are_those_of_the_processor(loaded: Callable[[], Loaded]) -> None:
    _, model, processor, _ = loaded()
    image = picture(200, 90)
    views = process_images([image], processor, model.config)[0]
    assert torch.equal(naive.preprocess(image, processor, model.config.image_grid_pinpoints), views)
