"""Random models have the sizes they were asked for."""

from dataclasses import replace

import pytest
import torch

from llava.constants import InputError
from llava.efficiency.build import image_processor, random_model
from llava.efficiency.shapes import MODELS, Language, Model, Tower, from_config

SMALL = Model(
    name="small",
    tower=Tower(width=32, inner=48, layers=3, heads=4, image_size=56, patch_size=14, element_bytes=4),
    language=Language(
        width=64, inner=96, layers=2, heads=4, kv_heads=2, head_width=16, vocabulary=128, element_bytes=4
    ),
    pinpoints=((56, 112), (112, 56), (112, 112)),
    merge="spatial_unpad",
)


@pytest.mark.parametrize(
    "shape",
    [
        SMALL,
        replace(SMALL, pinpoints=(), merge="flat"),
        replace(SMALL, language=replace(SMALL.language, kv_heads=4, head_width=32, tied=True)),
    ],
)
def test_the_config_says_the_sizes_and_the_weights_are_as_many(shape: Model) -> None:
    model = random_model(shape, dtype=torch.float32)
    given = model.config.to_dict() | {"torch_dtype": "float32"}
    assert from_config(given, "small") == shape
    assert sum(p.numel() for p in model.parameters()) == shape.parameters
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not model.training


def test_dtype_and_default_dtype() -> None:
    assert random_model(SMALL, dtype=torch.bfloat16).dtype == torch.bfloat16
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize("name", MODELS)
def test_known_models_can_be_built(name: str) -> None:
    shape = MODELS[name]
    model = random_model(shape, dtype=torch.bfloat16, device="meta")
    assert sum(p.numel() for p in model.parameters()) == shape.parameters


def test_widths_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InputError, match="30 and 4"):
        random_model(replace(SMALL, tower=replace(SMALL.tower, width=30)), dtype=torch.float32)


def test_preprocessing_has_the_towers_size() -> None:
    assert image_processor(SMALL).crop_size["height"] == image_processor(SMALL).size["shortest_edge"] == 56
