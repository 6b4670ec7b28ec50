"""Settings of config.json that would fail late, or silently mean something else, are refused before weights load."""

import json
import shutil

import pytest

from llava.constants import InputError
from llava.model.builder import load_pretrained_model


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("mm_patch_merge_type", "foo_unpad"),
        ("mm_patch_merge_type", "unpad"),
        ("image_aspect_ratio", "anyres_max_9"),
        ("mm_vision_select_layer", -9),
        ("mm_vision_select_layer", 9),
        ("image_grid_pinpoints", "[[336, 672"),
        ("image_grid_pinpoints", None),
        ("mm_projector_type", "qformer"),
        ("mm_vision_select_feature", "cls_patch"),
    ],
)
def test_refused_by_name(checkpoint, tmp_path, key, value):
    folder = shutil.copytree(checkpoint(), tmp_path / "broken")
    config = json.loads((folder / "config.json").read_text()) | {key: value}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=key) as error:
        load_pretrained_model(str(folder), device="cpu")
    assert "InputError" not in str(error.value)


def test_a_tokenizer_class_of_null_is_llamas(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint(), tmp_path / "null")
    settings = json.loads((folder / "tokenizer_config.json").read_text()) | {"tokenizer_class": None}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    assert type(load_pretrained_model(str(folder), device="cpu")[0]).__name__ == "LlamaTokenizer"
