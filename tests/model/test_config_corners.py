"""Settings that would fail late, or silently mean something else, are refused at load; published ones pass."""

import json
import shutil
from dataclasses import asdict

import pytest
import torch

from llava.compress import get
from llava.compress.base import parse_ratio
from llava.constants import InputError
from llava.model.builder import load_pretrained_model, read_config
from llava.model.language_model.llava_llama import LlavaConfig
from llava.model.miniature import TILE, VERSIONS, VISION, published_config, write_clip_shape, write_miniature
from llava.model.multimodal_encoder.builder import vision_config
from llava.model.settings import check_config, generation_settings, known_settings
from llava.model.stored import language_size, tower_size
from llava.model.vision import check_vision

CLIP = "openai/clip-vit-large-patch14-336"


@pytest.fixture
def broken(checkpoint, tmp_path):
    """A copy of the miniature that may be changed."""
    return shutil.copytree(checkpoint(), tmp_path / "broken")


def edit(folder, name="config.json", **values):
    file = folder / name
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def refusal(folder, *, base=None, **options):
    with pytest.raises(InputError) as error:
        load_pretrained_model(str(folder), base, device="cpu", **options)
    assert len(str(error.value)) < 500
    return str(error.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("mm_patch_merge_type", "foo_unpad"),
        ("mm_patch_merge_type", "unpad"),
        ("mm_patch_merge_type", None),
        ("image_aspect_ratio", "anyres_max_9"),
        ("image_aspect_ratio", ["pad"]),
        ("mm_vision_select_layer", -9),
        ("mm_vision_select_layer", 9),
        ("mm_vision_select_layer", -2.0),
        ("mm_vision_select_layer", [-2, -5]),
        ("image_grid_pinpoints", "[[336, 672"),
        ("image_grid_pinpoints", "(1x1),...,(6x6)"),
        ("image_grid_pinpoints", "[" * 5000),
        ("image_grid_pinpoints", None),
        ("image_grid_pinpoints", []),
        ("image_grid_pinpoints", [[TILE, TILE + 1]]),
        ("image_grid_pinpoints", [[0, TILE]]),
        ("image_grid_pinpoints", [[TILE * 10**6, TILE]]),
        ("image_grid_pinpoints", [[TILE, TILE]] * 20_000),
        ("image_grid_pinpoints", [[TILE]]),
        ("mm_projector_type", "qformer"),
        ("mm_projector_type", f"mlp{'9' * 5000}x_gelu"),
        ("mm_projector_type", "mlp1000000000x_gelu"),
        ("mm_projector_type", None),
        ("mm_vision_select_feature", "cls_patch"),
        ("mm_hidden_size", 64),
        ("mm_hidden_size", 3 * VISION["hidden_size"]),
        ("s2", True),
        ("s2", "yes"),
        ("method", 5),
        ("method", ["uniform"]),
        ("method", f"globalcom2(alpha=0x{'f' * 200_000})"),
        ("profile", 3),
        ("retention_ratio", [0.5]),
        ("retention_ratio", 10**400),
        ("num_hidden_layers", 10**9),
        ("num_hidden_layers", 512),
        ("hidden_size", 2**16),
        ("vocab_size", 2**22),
        ("intermediate_size", 2**18),
        ("num_attention_heads", 0),
        ("num_key_value_heads", 3),
        ("head_dim", 3),
        ("pad_token_id", 384),
        ("hidden_act", "cubic"),
        ("rope_theta", 0),
        ("rope_scaling", {"rope_type": "linear", "factor": 0}),
        ("architectures", 3),
        ("unfreeze_mm_vision_tower", "yes"),
        ("mm_vision_config", 3),
        ("mm_vision_config", VISION | {"image_size": 10**9}),
    ],
    ids=lambda value: str(value)[:40],
)
def test_refused_by_name(broken, key, value):
    edit(broken, **{key: value})
    message = refusal(broken)
    sizes = ("num_hidden_layers", "hidden_size", "vocab_size", "intermediate_size", "mm_projector_type")
    infinite = key == "rope_scaling"
    assert key in message or ("asks for" in message and key in sizes) or ("inv_freq" in message and infinite)
    assert "InputError" not in message


def test_s2_is_refused_for_what_it_is(broken):
    """Its mm_hidden_size is three times the tower's width, which must not be named as the fault."""
    edit(broken, s2=True, mm_hidden_size=3 * VISION["hidden_size"], s2_scales="336,672,1008")
    assert "s2 is true, not false" in refusal(broken)


def test_a_tower_of_another_width_is_named(tmp_path):
    folder = write_miniature(tmp_path / "llava", "v1.5")
    write_clip_shape(tmp_path / "wide", VISION | {"hidden_size": 48})
    message = refusal(folder, vision_tower=str(tmp_path / "wide"))
    assert str(tmp_path / "wide") in message
    assert "48 wide" in message
    assert "mm_hidden_size is 32" in message


def test_a_tower_given_to_a_saved_model_has_its_own_shape(broken, tmp_path):
    """A saved model carries its tower's shape; what is given instead must be looked at all the same."""
    edit(broken, mm_vision_config=VISION, mm_vision_tower="gone")
    assert load_pretrained_model(str(broken), device="cpu")[1].config.mm_vision_config["hidden_size"] == 32
    write_clip_shape(tmp_path / "wide", VISION | {"hidden_size": 48})
    assert "48 wide" in refusal(broken, vision_tower=str(tmp_path / "wide"))


def test_a_tower_of_other_views_is_named(tmp_path):
    """Crops of 84 pixels cannot be cut for a tower that looks at 56: the first image would fail."""
    folder = write_miniature(tmp_path / "llava")
    write_clip_shape(tmp_path / "small", VISION | {"image_size": 56})
    message = refusal(folder, vision_tower=str(tmp_path / "small"))
    assert "multiples of the 56 pixels" in message


@pytest.mark.parametrize(
    "sizes",
    [
        {"size": 224, "crop_size": 224},
        {"size": 112},
        {"crop_size": 56},
        {"crop_size": {"height": 84, "width": 56}},
        {"size": {"height": 84, "width": 84}},
    ],
    ids=str,
)
@pytest.mark.parametrize("version", ["v1.5", "v1.6-vicuna"])
def test_a_preprocessor_that_does_not_fit_its_tower(version, sizes, tmp_path):
    folder = write_miniature(tmp_path, version)
    edit(folder / "clip", "preprocessor_config.json", **sizes)
    message = refusal(folder)
    assert "preprocessor_config.json" in message
    assert "image_size 84" in message


def test_sizes_of_a_preprocessor_as_transformers_saves_them(broken):
    edit(broken / "clip", "preprocessor_config.json", size={"shortest_edge": 84}, crop_size={"height": 84, "width": 84})
    load_pretrained_model(str(broken), device="cpu")


@pytest.mark.parametrize(("heads", "width"), [(5, 32), (64, 32)])
def test_heads_that_do_not_divide_the_tower(heads, width, broken):
    edit(broken / "clip", "config.json", num_attention_heads=heads)
    assert f"{heads} heads for a width of {width}" in refusal(broken)


def test_views_smaller_than_a_patch(tmp_path):
    folder = write_miniature(tmp_path, "v1.5")
    edit(folder / "clip", "config.json", image_size=10)
    assert "views of 10 pixels, patches of 14" in refusal(folder)


def test_views_that_patches_do_not_fill_are_cut_as_clip_does(tmp_path):
    """CLIP's convolution leaves the rest of a view out; that is a setting that works."""
    folder = write_miniature(tmp_path, "v1.5")
    edit(folder / "clip", "config.json", image_size=90)
    edit(folder / "clip", "preprocessor_config.json", size=90, crop_size=90)
    model = load_pretrained_model(str(folder), device="cpu")[1]
    assert model.get_vision_tower().num_patches == 36
    assert model.encode_images(torch.zeros(1, 3, 90, 90)).shape == (1, 36, 64)


def test_a_projector_that_does_not_fit_is_named_with_both_shapes(tmp_path):
    from safetensors.torch import save_file

    from tests.model.test_miniature import read_weights

    folder = write_miniature(tmp_path, "v1.5", shards=1)
    state = read_weights(folder) | {"model.mm_projector.0.weight": torch.zeros(64, 48)}
    save_file(state, folder / "model-00001-of-00001.safetensors", metadata={"format": "pt"})
    assert "model.mm_projector.0.weight [64, 48] for [64, 32]" in refusal(folder)


def test_a_projector_that_is_none_needs_equal_widths(broken):
    edit(broken, mm_projector_type="identity")
    assert "'identity' needs a tower as wide as the model: 32, 64" in refusal(broken)


def test_a_tokenizer_with_more_words_than_the_model(broken, tmp_path):
    from safetensors.torch import save_file

    from tests.model.test_miniature import read_weights

    state = read_weights(broken)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        state[name] = state[name][:300].clone()
    for old in broken.glob("model*"):
        old.unlink()
    save_file(state, broken / "model.safetensors", metadata={"format": "pt"})
    edit(broken, vocab_size=300)
    assert "the tokenizer has 384 words, the model 300" in refusal(broken)


def test_a_llava_without_its_tower_is_named(broken):
    edit(broken, mm_vision_tower=None)
    assert "without mm_vision_tower" in refusal(broken)


def test_what_a_checkpoint_must_not_set_does_not_reach_the_config(broken):
    """transformers takes outputs, labels, names of files and ways to run from any config; 10⁹ labels are a bomb."""
    odd = {
        "num_labels": 10**9,
        "output_attentions": True,
        "return_dict": False,
        "is_encoder_decoder": True,
        "transformers_weights": "../other.safetensors",
        "text_config": 3,
        "per_layer_config": {"0": {"hidden_size": 3}},
        "attn_implementation": "nonsense",
        "_attn_implementation": "nonsense",
        "base_model_tp_plan": 3,
        "whatever": "x",
    }
    edit(broken, **odd)
    config = load_pretrained_model(str(broken), device="cpu")[1].config
    assert config.return_dict
    assert not config.is_encoder_decoder
    assert config._attn_implementation == "sdpa"
    assert not hasattr(config, "transformers_weights")


def test_of_a_generation_config_what_a_language_model_has(broken):
    edit(broken, "generation_config.json", top_k=7, cache_implementation="nonsense", watermarking_config=3, x=1)
    settings = load_pretrained_model(str(broken), device="cpu")[1].generation_config
    assert settings.eos_token_id == 2
    assert settings.cache_implementation is None
    given = generation_settings({"do_sample": True, "temperature": 0.2, "top_p": None, "eos_token_id": [2, 7]}, "x")
    assert (given.do_sample, given.temperature, given.top_p, given.eos_token_id) == (True, 0.2, None, [2, 7])


@pytest.mark.parametrize(
    "values",
    [
        {"num_beams": 0},
        {"num_beams": "4"},
        {"temperature": -1},
        {"top_p": 2},
        {"eos_token_id": "</s>"},
        {"max_length": 0},
        {"max_new_tokens": "x"},
        {"do_sample": True, "temperature": 0},
        {"suppress_tokens": ["x"]},
    ],
    ids=str,
)
def test_unusable_generation_configs_are_refused(values, broken):
    edit(broken, "generation_config.json", **values)
    message = refusal(broken)
    assert "generation_config.json" in message
    assert list(values)[-1] in message


def test_a_given_generation_config_goes_before_the_files(broken):
    from transformers import GenerationConfig

    model = load_pretrained_model(str(broken), device="cpu", generation_config=GenerationConfig(num_beams=3))[1]
    assert model.generation_config.num_beams == 3


def test_a_tokenizer_class_of_null_is_llamas(broken):
    edit(broken, "tokenizer_config.json", tokenizer_class=None)
    assert type(load_pretrained_model(str(broken), device="cpu")[0]).__name__ == "LlamaTokenizer"


@pytest.mark.parametrize("spec", [None, 5, ["uniform"], b"uniform"])
def test_a_method_is_given_in_text(spec):
    with pytest.raises(InputError, match=f"got {type(spec).__name__}"):
        get(spec)


def test_numbers_of_too_many_digits_are_refused():
    with pytest.raises(InputError, match="200012 characters"):
        get(f"hired(alpha={'9' * 200_000})"[:200_012])
    with pytest.raises(InputError, match=r"got an integer of about \d+ digits"):
        parse_ratio(1 << 800_000)


# ----------------------------------------------------------------------------------------------- what is published

SEVEN = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
SEVEN |= {"num_key_value_heads": 32, "vocab_size": 32000, "mm_hidden_size": 1024, "mm_vision_tower": CLIP}
THIRTEEN = SEVEN | {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40}
THIRTEEN |= {"num_key_value_heads": 40}
MISTRAL = SEVEN | {"intermediate_size": 14336, "num_key_value_heads": 8, "max_position_embeddings": 32768}
YI = {"hidden_size": 7168, "intermediate_size": 20480, "num_hidden_layers": 60, "num_attention_heads": 56}
YI = SEVEN | YI | {"num_key_value_heads": 8, "vocab_size": 64000, "rope_theta": 5e6, "attention_bias": False}
PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]


@pytest.mark.parametrize(
    ("version", "sizes", "billions"),
    [
        ("v1.5", SEVEN, 6.76),
        ("v1.5", THIRTEEN, 13.05),
        ("v1.6-vicuna", SEVEN, 6.76),
        ("v1.6-vicuna", THIRTEEN, 13.05),
        ("v1.6-mistral", MISTRAL, 7.27),
        ("v1.6-vicuna", YI, 34.4),
    ],
)
def test_published_configs_pass(version, sizes, billions):
    raw = published_config(version) | sizes
    if version != "v1.5":
        raw["image_grid_pinpoints"] = PINPOINTS
    raw |= {"mm_vision_config": vision_config(CLIP), "some_new_key": {"a": 1}, "rope_scaling": None}
    check_config(raw)
    config = LlavaConfig(**known_settings(LlavaConfig, raw))
    check_vision(config, CLIP)
    # About as many as the model card says: twice that is let pass, so the formula need not count norms.
    assert language_size(config) / 1e9 + (0.26 if version == "v1.6-vicuna" and sizes is YI else 0) == pytest.approx(
        billions, rel=0.03
    )
    assert tower_size(config.mm_vision_config) / 1e6 == pytest.approx(303.5, rel=0.01)


@pytest.mark.parametrize("form", [list, str], ids=["list", "text"])
def test_pinpoints_in_both_forms(form, broken):
    edit(broken, image_grid_pinpoints=form([[TILE, 2 * TILE], [2 * TILE, TILE]]))
    load_pretrained_model(str(broken), device="cpu")


@pytest.mark.parametrize("version", VERSIONS)
def test_a_saved_config_is_one_that_loads(version, checkpoint, tmp_path):
    """What `save_pretrained` writes, with every field of transformers' own, passes the rules."""
    model = load_pretrained_model(str(checkpoint(version)), device="cpu")[1]
    model.config.save_pretrained(tmp_path)
    again = read_config(str(tmp_path))
    kept = known_settings(type(model.config), again)
    assert asdict(type(model.config)(**kept))["mm_vision_config"] == model.config.mm_vision_config
