"""The miniature is in the published format: keys and names are written out here, apart from the code under test."""

import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
from safetensors.torch import load_file
from torch import Tensor

from llava.constants import InputError
from llava.model.miniature import SIDE, TILE, VISION, write_miniature

VERSIONS = ["v1.5", "v1.6-vicuna", "v1.6-mistral"]
ANYRES = VERSIONS[1:]

# The table of published config keys (reference/llava_surface.md §2.1), the keys of its last row ("ignorable") included.
BOTH = {
    *("model_type", "architectures", "image_aspect_ratio", "mm_vision_tower", "mm_hidden_size", "mm_projector_type"),
    *("mm_vision_select_layer", "mm_vision_select_feature", "mm_use_im_start_end", "mm_use_im_patch_token"),
    *("unfreeze_mm_vision_tower", "torch_dtype", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "max_position_embeddings", "rope_theta", "vocab_size"),
    *("bos_token_id", "eos_token_id", "use_mm_proj", "max_length", "mm_resampler_type"),
}
ONLY_ANYRES = {
    *("image_grid_pinpoints", "mm_patch_merge_type", "tokenizer_model_max_length", "tokenizer_padding_side"),
    *("mm_vision_tower_lr", "mm_projector_lr", "image_crop_resolution", "image_split_resolution"),
}
TABLE = {
    "v1.5": BOTH | {"pad_token_id", "pretraining_tp"},
    "v1.6-vicuna": BOTH | ONLY_ANYRES | {"pad_token_id", "pretraining_tp"},
    "v1.6-mistral": BOTH | ONLY_ANYRES | {"sliding_window"},
}
PINPOINTS = [(336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008)]  # (width, height), in the published order
# What any Llama or Mistral config of that time has, and the `tune_*` and `freeze_*` the table does not spell out.
LLM_OWN = {
    *("hidden_act", "initializer_range", "rms_norm_eps", "tie_word_embeddings", "transformers_version", "use_cache"),
    *("_name_or_path", "rope_scaling", "attention_bias", "attention_dropout"),
}

LLM_LAYER = [
    "self_attn.q_proj.weight",
    "self_attn.k_proj.weight",
    "self_attn.v_proj.weight",
    "self_attn.o_proj.weight",
    "mlp.gate_proj.weight",
    "mlp.up_proj.weight",
    "mlp.down_proj.weight",
    "input_layernorm.weight",
    "post_attention_layernorm.weight",
]
CLIP_LAYER = [
    "self_attn.q_proj.weight",
    "self_attn.q_proj.bias",
    "self_attn.k_proj.weight",
    "self_attn.k_proj.bias",
    "self_attn.v_proj.weight",
    "self_attn.v_proj.bias",
    "self_attn.out_proj.weight",
    "self_attn.out_proj.bias",
    "layer_norm1.weight",
    "layer_norm1.bias",
    "mlp.fc1.weight",
    "mlp.fc1.bias",
    "mlp.fc2.weight",
    "mlp.fc2.bias",
    "layer_norm2.weight",
    "layer_norm2.bias",
]
CLIP_REST = [
    "vision_model.embeddings.class_embedding",
    "vision_model.embeddings.patch_embedding.weight",
    "vision_model.embeddings.position_embedding.weight",
    "vision_model.pre_layrnorm.weight",
    "vision_model.pre_layrnorm.bias",
    "vision_model.post_layernorm.weight",
    "vision_model.post_layernorm.bias",
]
REST = [
    "model.embed_tokens.weight",
    "model.norm.weight",
    "lm_head.weight",
    "model.mm_projector.0.weight",
    "model.mm_projector.0.bias",
    "model.mm_projector.2.weight",
    "model.mm_projector.2.bias",
]


def clip_names(layers: int) -> set[str]:
    return {*CLIP_REST, *(f"vision_model.encoder.layers.{i}.{name}" for i in range(layers) for name in CLIP_LAYER)}


def published_names(config: dict[str, Any], tower: bool, newline: bool, clip_layers: int) -> set[str]:
    """The names of a checkpoint's tensors; used by the loader's tests too."""
    names = {*REST, *(f"model.layers.{i}.{name}" for i in range(config["num_hidden_layers"]) for name in LLM_LAYER)}
    if newline:
        names.add("model.image_newline")
    if tower:
        names |= {f"model.vision_tower.vision_tower.{name}" for name in clip_names(clip_layers)}
    return names


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint's weight files, as named there."""
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    for file in sorted(folder.glob("pytorch_model*.bin")):
        tensors |= torch.load(file, weights_only=True)
    return tensors


def read_config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("version", VERSIONS)
def test_config_keys_are_the_published_ones(version: str, tmp_path: Path) -> None:
    keys = read_config(write_miniature(tmp_path, version)).keys()
    others = {key for key in keys - LLM_OWN if not key.startswith(("tune_mm_", "freeze_mm_"))}
    assert others == TABLE[version]


@pytest.mark.parametrize("version", VERSIONS)
def test_config_values_that_decide_something(version: str, tmp_path: Path) -> None:
    config = read_config(write_miniature(tmp_path, version))
    mistral, anyres = version == "v1.6-mistral", version != "v1.5"
    assert config["model_type"] == ("llava_mistral" if mistral else "llava")
    assert config["architectures"] == ["LlavaMistralForCausalLM" if mistral else "LlavaLlamaForCausalLM"]
    assert config["rope_theta"] == (1e6 if mistral else 1e4)
    assert config["image_aspect_ratio"] == ("anyres" if anyres else "pad")
    assert config["unfreeze_mm_vision_tower"] is anyres
    assert config["torch_dtype"] == ("bfloat16" if anyres else "float16")
    assert (config["mm_vision_select_layer"], config["mm_vision_select_feature"]) == (-2, "patch")
    assert config["mm_projector_type"] == "mlp2x_gelu"
    assert config["mm_use_im_start_end"] is config["mm_use_im_patch_token"] is False
    if anyres:
        assert config["image_grid_pinpoints"] == [[w // 336 * TILE, h // 336 * TILE] for w, h in PINPOINTS]
        assert config["mm_patch_merge_type"] == "spatial_unpad"
    if mistral:
        assert config["sliding_window"] is None


@pytest.mark.parametrize("file_format", ["safetensors", "bin"])
@pytest.mark.parametrize("version", VERSIONS)
def test_tensor_names_are_the_published_ones(version: str, file_format: str, tmp_path: Path) -> None:
    folder = write_miniature(tmp_path, version, file_format=file_format)
    anyres = version != "v1.5"
    expected = published_names(read_config(folder), anyres, anyres, VISION["num_hidden_layers"])
    assert read_weights(folder).keys() == expected


def test_names_of_a_layer_in_full(tmp_path: Path) -> None:
    """A few names to the letter, so that no helper of this file stands between them and the eye."""
    names = read_weights(write_miniature(tmp_path, "v1.6-vicuna")).keys()
    assert "model.vision_tower.vision_tower.vision_model.encoder.layers.3.self_attn.q_proj.weight" in names
    assert "model.vision_tower.vision_tower.vision_model.pre_layrnorm.bias" in names
    assert "model.vision_tower.vision_tower.vision_model.embeddings.class_embedding" in names
    assert {"model.image_newline", "model.mm_projector.0.weight", "model.mm_projector.2.bias"} <= names
    assert {"model.layers.2.self_attn.o_proj.weight", "lm_head.weight", "model.embed_tokens.weight"} <= names


def test_v15_leaves_its_tower_to_the_clip_folder(tmp_path: Path) -> None:
    folder = write_miniature(tmp_path, "v1.5")
    assert not [name for name in read_weights(folder) if "vision_tower" in name]
    assert read_weights(folder / "clip").keys() == clip_names(VISION["num_hidden_layers"])


@pytest.mark.parametrize("version", VERSIONS)
def test_clip_folder_loads_as_clip(version: str, tmp_path: Path) -> None:
    from transformers import CLIPVisionModel

    folder = write_miniature(tmp_path, version)
    model, report = CLIPVisionModel.from_pretrained(folder / "clip", output_loading_info=True)
    assert not any(report.values()), report
    assert model.config.image_size == TILE == SIDE * model.config.patch_size
    own = {name.removeprefix("vision_model."): t for name, t in read_weights(folder / "clip").items()}
    loaded = {name.removeprefix("vision_model."): t for name, t in model.state_dict().items()}
    assert own.keys() == loaded.keys()
    assert all(torch.equal(own[name], loaded[name]) for name in own)


def test_the_preprocessor_is_written_as_openai_did(tmp_path: Path) -> None:
    """Plain numbers for the sizes and the class name of 2023: the loader has to understand them."""
    given = json.loads((write_miniature(tmp_path) / "clip" / "preprocessor_config.json").read_text())
    assert given["size"] == given["crop_size"] == TILE
    assert given["feature_extractor_type"] == "CLIPFeatureExtractor"
    assert given["image_mean"] == [0.48145466, 0.4578275, 0.40821073]
    assert given["image_std"] == [0.26862954, 0.26130258, 0.27577711]


def test_the_tokenizer_is_a_bare_sentencepiece_model(tmp_path: Path) -> None:
    folder = write_miniature(tmp_path)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    assert [pieces.id_to_piece(i) for i in range(3)] == ["<unk>", "<s>", "</s>"]
    assert (pieces.unk_id(), pieces.bos_id(), pieces.eos_id(), pieces.pad_id()) == (0, 1, 2, -1)
    assert pieces.id_to_piece(3) == "<0x00>", "byte fallback starts where Llama's does"
    assert pieces.get_piece_size() == read_config(folder)["vocab_size"]
    assert not (folder / "tokenizer.json").exists()


@pytest.mark.parametrize("file_format", ["safetensors", "bin"])
def test_the_same_seed_writes_the_same_bytes(file_format: str, tmp_path: Path) -> None:
    one, two, other = (
        write_miniature(tmp_path / name, seed=seed, file_format=file_format)
        for name, seed in (("one", 0), ("two", 0), ("other", 1))
    )
    files = sorted(file.relative_to(one) for file in one.rglob("*") if file.is_file())
    assert files == sorted(file.relative_to(two) for file in two.rglob("*") if file.is_file())
    assert all((one / file).read_bytes() == (two / file).read_bytes() for file in files)
    assert not torch.equal(read_weights(one)["lm_head.weight"], read_weights(other)["lm_head.weight"])


@pytest.mark.parametrize("shards", [1, 2, 5])
@pytest.mark.parametrize(("file_format", "stem"), [("safetensors", "model"), ("bin", "pytorch_model")])
def test_shards_and_index_agree(file_format: str, stem: str, shards: int, tmp_path: Path) -> None:
    folder = write_miniature(tmp_path, file_format=file_format, shards=shards)
    index = json.loads((folder / f"{stem}.{file_format}.index.json").read_text())
    files = [f"{stem}-{i:05d}-of-{shards:05d}.{file_format}" for i in range(1, shards + 1)]
    assert sorted(set(index["weight_map"].values())) == files
    for file in files:
        held = load_file(folder / file) if file_format == "safetensors" else torch.load(folder / file)
        assert held.keys() == {name for name, where in index["weight_map"].items() if where == file}
    tensors = read_weights(folder)
    assert index["weight_map"].keys() == tensors.keys()
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())


def test_formats_hold_the_same_tensors(tmp_path: Path) -> None:
    one = read_weights(write_miniature(tmp_path / "a"))
    two = read_weights(write_miniature(tmp_path / "b", file_format="bin", shards=1))
    assert all(torch.equal(one[name], two[name]) for name in one.keys() | two.keys())


def test_writing_again_leaves_nothing_of_the_earlier_weights(tmp_path: Path) -> None:
    write_miniature(tmp_path, shards=3)
    write_miniature(tmp_path, "v1.5", file_format="bin", shards=1)
    weights = sorted(file.name for file in tmp_path.iterdir() if file.name.startswith(("model", "pytorch_model")))
    assert weights == ["pytorch_model-00001-of-00001.bin", "pytorch_model.bin.index.json"]


def test_attention_is_far_from_uniform(tmp_path: Path) -> None:
    """Otherwise a wrong choice of tokens would hardly change an answer, and tests would pass for the wrong reason."""
    from transformers import CLIPVisionModel

    model = CLIPVisionModel.from_pretrained(write_miniature(tmp_path) / "clip", attn_implementation="eager")
    rows = model(torch.randn(2, 3, TILE, TILE), output_attentions=True).attentions[-1][:, :, 0]
    assert rows.max(-1).values.mean() > 3 / rows.shape[-1]


def test_an_unknown_version_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"v1\.7.*v1\.6-vicuna"):
        write_miniature(tmp_path, "v1.7")
