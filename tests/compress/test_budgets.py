"""Equal budgets: the share of visual tokens that a model really runs on is the one that was asked for."""

import re
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from llava.anyres import choose_grid
from llava.compress import available, get, method_class
from llava.compress.__main__ import BETWEEN, stages_of
from llava.compress.trace import Trace
from llava.constants import IMAGE_TOKEN_INDEX, InputError
from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM
from llava.model.miniature import GRIDS, PATCH, published_config

# Layers as LLaVA-NeXT-7B has them, so that methods work where they were made for; widths as small as they go.
SIDE, TOWER_LAYERS, LAYERS, WIDTH, HEADS = 8, 24, 32, 32, 2
TILE = SIDE * PATCH
PINPOINTS = [[TILE * cols, TILE * rows] for cols, rows in GRIDS]
RATIOS = (0.75, 0.5, 0.25, 0.1)
# Every grid; without padding, with some, with almost nothing but padding.
SIZES = [
    (224, 224),
    (640, 480),
    (480, 640),
    (1000, 400),
    (300, 900),
    (220, 100),
    (97, 401),
    (1500, 130),
    (50, 40),
    (1280, 720),
]
# Inside the language model counts are shared out over layers and rounded there.
TOLERANCE = 0.005


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    vision = {
        "hidden_size": WIDTH,
        "intermediate_size": WIDTH,
        "num_hidden_layers": TOWER_LAYERS,
        "num_attention_heads": HEADS,
        "image_size": TILE,
        "patch_size": PATCH,
        "projection_dim": WIDTH,
    }
    config = published_config("v1.6-vicuna") | {
        "hidden_size": WIDTH,
        "intermediate_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "mm_hidden_size": WIDTH,
        "image_grid_pinpoints": PINPOINTS,
        "initializer_range": 0.2,  # so narrow a model attends evenly otherwise
        "mm_vision_config": vision,
        "attn_implementation": "sdpa",
    }
    config.pop("model_type")
    model = LlavaLlamaForCausalLM(LlavaConfig(**config)).eval()
    assert model.get_vision_tower().depth == TOWER_LAYERS - 1
    return model


def run(model: Any, sizes: Sequence[tuple[int, int]]) -> Trace:
    """Answer one question about each of some images, in one padded batch."""
    draw, trace = torch.Generator().manual_seed(0), Trace()
    views = [1 + cols * rows for cols, rows in (choose_grid(size, PINPOINTS, TILE) for size in sizes)]
    images = [torch.randn(count, 3, TILE, TILE, generator=draw) for count in views]
    ids = torch.tensor([[1, 5, 6, IMAGE_TOKEN_INDEX, 7, 8, 9, 10]]).expand(len(sizes), -1)
    model.generate(ids, images=images, image_sizes=sizes, max_new_tokens=1, do_sample=False, trace=trace)
    return trace


@pytest.fixture(scope="module")
def uncompressed(model: Any) -> list[tuple[int, int]]:
    """Patches and all tokens of every image."""
    model.method = get("none")
    trace = run(model, SIZES)
    assert len(trace.visual_per_layer) == len(SIZES)
    assert all(set(layers) == {layers[0]} for layers in trace.visual_per_layer)
    return [
        (image.packed.patches, layers[0]) for image, layers in zip(trace.images, trace.visual_per_layer, strict=True)
    ]


@pytest.mark.parametrize(
    ("spec", "depth"),
    [
        *(("sparsevlm(recycle=False)", depth) for depth in (40, 80)),
        *(("sparsevlm", 32), ("fastv", 32), ("fastv(layer=29)", 50), ("ficoco_l", 32), ("ficoco_l", 40)),
    ],
)
def test_what_a_refusal_offers_is_accepted(spec: str, depth: int) -> None:
    for n in range(40, 3000, 97):
        with pytest.raises(InputError) as refused:
            get(spec, retention_ratio=0.01).visual_per_layer(n, depth)
        (percent,) = re.findall(r"at least ([\d.]+)%", str(refused.value))
        offered = get(spec, retention_ratio=float(percent) / 100).visual_per_layer(n, depth)
        assert 100 * sum(offered) / (n * depth) == pytest.approx(float(percent), abs=0.5)


def test_the_images_differ(uncompressed: list[tuple[int, int]]) -> None:
    assert len({width / height for width, height in SIZES}) == len(SIZES) == 10
    assert {choose_grid(size, PINPOINTS, TILE) for size in SIZES} == set(GRIDS)
    assert uncompressed[0] == (5 * 64, 5 * 64 + 16)


def assert_refusal(name: str, ratio: float, error: InputError) -> None:
    """A method may refuse a ratio below what its layers can reach; it says what that is, and what to do."""
    assert stages_of(method_class(name)) != [BETWEEN], f"{name} can keep any number of patches"
    text = str(error)
    assert len(text.splitlines()) == 1
    assert name in text
    assert "ask for " in text
    in_language, in_encoder = (re.search(p, text) for p in (r"keeps ([\d.]+)% of the image", r"at least ([\d.]+)"))
    assert in_language or in_encoder, text
    reached = float(in_language[1]) / 100 if in_language else float(in_encoder[1])
    assert reached > ratio, text


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("name", [name for name in available() if method_class(name).has_ratio])
def test_what_runs_is_the_share_that_was_asked_for(
    name: str, ratio: float, model: Any, uncompressed: list[tuple[int, int]]
) -> None:
    stages = stages_of(method_class(name))
    model.method, ran = get(name, retention_ratio=ratio), []
    hook = model.get_model().layers[0].register_forward_pre_hook(lambda *_: ran.append(1))
    with hook:
        try:
            measured = [(run(model, SIZES), range(len(SIZES)))]
        except InputError:  # of one of them: which?
            measured = []
            for i, size in enumerate(SIZES):
                ran.clear()
                try:
                    measured.append((run(model, [size]), range(i, i + 1)))
                except InputError as error:
                    assert_refusal(name, ratio, error)
                    assert not ran, "it refused after the language model had begun"
    for trace, indices in measured:
        for i, image, layers in zip(indices, trace.images, trace.visual_per_layer, strict=True):
            patches, tokens = uncompressed[i]
            entered, inside = image.packed.visual / patches, sum(layers) / len(layers) / layers[0]
            # Before the language model all counts are of patches; inside, newlines are image tokens like them.
            allowed = 0.0
            if stages != ["language model"]:
                assert entered == pytest.approx(image.ledger()["kept_ratio"], abs=1e-4)
                allowed += image.grid.n_views / patches
            if "language model" in stages:
                allowed += TOLERANCE
            else:
                assert set(layers) == {len(image.packed.origin)}
            share = entered * inside
            assert abs(share - ratio) <= allowed, f"{SIZES[i]}: {share:.4f} of {patches} patches ({tokens} tokens)"


@pytest.mark.parametrize("name", [name for name in available() if not method_class(name).has_ratio])
def test_what_runs_without_a_ratio_is_what_was_planned(
    name: str, model: Any, uncompressed: list[tuple[int, int]]
) -> None:
    model.method = get(name)
    trace = run(model, SIZES)
    for image, layers, (patches, _) in zip(trace.images, trace.visual_per_layer, uncompressed, strict=True):
        assert image.plan.exact
        assert image.packed.visual == image.plan.at_least <= patches
        assert set(layers) == {len(image.packed.origin)}
