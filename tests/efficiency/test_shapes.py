"""Sizes of models: against published parameter counts, real state dicts, and configs in both formats."""

import json
from collections.abc import Callable
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import pytest

from llava.constants import InputError
from llava.efficiency.shapes import MODELS, from_config, load
from llava.model.miniature import VISION, published_config, state_shapes


def test_published_parameter_counts() -> None:
    """Llama-2's own counts for 7B and 13B, Mistral-7B's, and CLIP-L/336's vision part."""
    counts = {name: model.language.parameters for name, model in MODELS.items()}
    assert counts["llava-1.5-7b"] == counts["llava-next-7b"] == 6_738_415_616
    assert counts["llava-1.5-13b"] == counts["llava-next-13b"] == 13_015_864_320
    assert counts["llava-next-mistral-7b"] == 7_241_732_096
    assert {model.tower.parameters for model in MODELS.values()} == {303_507_456}
    assert MODELS["llava-next-7b"].projector_parameters == 1024 * 4096 + 4096 + 4096 * 4096 + 4096


def test_the_tower_runs_23_of_24_layers() -> None:
    tower = MODELS["llava-next-7b"].tower
    assert (tower.side, tower.patches, tower.positions, tower.depth) == (24, 576, 577, 23)
    assert replace(tower, select_layer=-1).depth == 24
    assert replace(tower, select_layer=10).depth == 10


@pytest.mark.parametrize("version", ["v1.5", "v1.6-vicuna", "v1.6-mistral"])
def test_sizes_of_a_checkpoint_are_those_of_its_weights(checkpoint: Callable[[str], Path], version: str) -> None:
    folder = checkpoint(version)
    model = load(str(folder))
    assert replace(load(str(folder / "config.json")), name=model.name) == model
    shapes = state_shapes(published_config(version), VISION)
    assert model.parameters == sum(prod(shape) for shape in shapes.values())
    assert model.tower.side == 6
    assert model.language.kv_width == 32
    assert bool(model.pinpoints) == (version != "v1.5")
    assert model.merge == ("flat" if version == "v1.5" else "spatial_unpad")
    assert model.weight_bytes == 2 * model.parameters


def test_bytes_follow_the_dtype() -> None:
    config = published_config("v1.6-vicuna") | {"mm_vision_config": VISION, "torch_dtype": "float32"}
    model = from_config(config, "m")
    assert model.weight_bytes == 4 * model.parameters
    assert model.language.kv_bytes_per_token == 2 * 3 * 32 * 4


TRANSFORMERS = {
    "text_config": {"model_type": "mistral", "vocab_size": 32064, "rms_norm_eps": 1e-5},
    "vision_config": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 336,
        "patch_size": 14,
    },
    "vision_feature_layer": -2,
    "image_grid_pinpoints": [[336, 672], [672, 336]],
    "torch_dtype": "float16",
}


def test_transformers_format() -> None:
    model = from_config(TRANSFORMERS, "hf")
    known = MODELS["llava-next-mistral-7b"]
    assert model.tower == known.tower
    assert model.language == replace(known.language, vocabulary=32064)
    assert (model.rule, model.merge, model.pinpoints) == ("hf", "spatial_unpad", ((336, 672), (672, 336)))
    llama = from_config(TRANSFORMERS | {"text_config": {"vocab_size": 32000}, "image_grid_pinpoints": None}, "hf")
    assert llama.language == MODELS["llava-1.5-7b"].language
    assert (llama.merge, llama.pinpoints) == ("flat", ())


def without(config: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name != key}


NEXT = published_config("v1.6-vicuna") | {"mm_vision_config": VISION}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (without(NEXT, "num_hidden_layers"), "must give num_hidden_layers as a positive integer, got null"),
        (NEXT | {"hidden_size": "wide"}, 'must give hidden_size as a positive integer, got "wide"'),
        (NEXT | {"vocab_size": 0}, "must give vocab_size"),
        (NEXT | {"num_attention_heads": True}, "must give num_attention_heads"),
        (NEXT | {"mm_vision_config": without(VISION, "patch_size")}, "must give patch_size"),
        (NEXT | {"mm_vision_select_layer": -9}, "must select one of 4 vision layers, got -9"),
        (NEXT | {"mm_vision_select_layer": [-2, -5]}, "must select one of 4 vision layers"),
        (NEXT | {"mm_projector_type": "resampler"}, "unknown mm_projector_type 'resampler'"),
        (NEXT | {"image_grid_pinpoints": "(1x1)"}, "image_grid_pinpoints as pairs"),
        (without(NEXT, "image_grid_pinpoints"), "image_grid_pinpoints as pairs"),
        (without(NEXT, "mm_vision_tower"), "names no mm_vision_tower"),
    ],
)
def test_configs_that_do_not_say_all(config: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as error:
        from_config(config, "m")
    assert message in str(error.value)


@pytest.mark.parametrize("kind", ["linear", "identity", "mlp3x_gelu"])
def test_projectors(kind: str) -> None:
    layers = {"linear": 1, "identity": 0, "mlp3x_gelu": 3}
    assert from_config(NEXT | {"mm_projector_type": kind}, "m").projector == layers[kind]


def test_where_a_model_may_be(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"unknown model 'llava-next-70b'; give a folder, a config.json, or one of"):
        load("llava-next-70b")
    with pytest.raises(InputError, match=r"no config\.json"):
        load(str(tmp_path))
    with pytest.raises(InputError, match="there is no folder"):
        load(str(tmp_path / "no" / "such"))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match="no readable JSON"):
        load(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps(NEXT))
    assert load(str(tmp_path)).tower.side == 6
