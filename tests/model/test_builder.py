"""Loading: every tensor of every published format arrives where it belongs; what does not fit is refused by name."""

import importlib.util
import json
import logging
import os
import re
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from llava.constants import InputError
from llava.mm_utils import get_model_name_from_path, process_images, tokenizer_image_token
from llava.model.builder import choose_method, load_pretrained_model
from llava.model.miniature import SIDE, TILE, VISION, write_miniature
from llava.model.multimodal_encoder.builder import image_processor, vision_config
from tests.conftest import picture
from tests.model.test_miniature import published_names, read_config, read_weights

VERSIONS = ["v1.5", "v1.6-vicuna", "v1.6-mistral"]
TOWER = "model.vision_tower.vision_tower."
CLIP = "openai/clip-vit-large-patch14-336"


def load(folder: str | Path, base: Path | str | None = None, **kwargs: Any) -> tuple[Any, Any, Any, int]:
    """Load on the CPU, so that these tests mean the same on a machine with CUDA."""
    name = get_model_name_from_path(str(folder))
    return load_pretrained_model(str(folder), base and str(base), name, **{"device_map": "cpu"} | kwargs)


def refusal(folder: str | Path, base: Path | str | None = None, **kwargs: Any) -> str:
    """The one line with which a checkpoint is refused."""
    with pytest.raises(InputError) as caught:
        load(folder, base, **kwargs)
    return str(caught.value)


def edit_config(folder: Path, *absent: str, **values: Any) -> Path:
    config = {key: value for key, value in (read_config(folder) | values).items() if key not in absent}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def put_weights(folder: Path, state: dict[str, Tensor], file: str = "model.safetensors") -> Path:
    """Replace a checkpoint's weights by one file."""
    for old in (*folder.glob("model*.safetensors*"), *folder.glob("pytorch_model*.bin*")):
        old.unlink()
    if file.endswith("bin"):
        torch.save(state, folder / file)
    else:
        save_file(state, folder / file, metadata={"format": "pt"})
    return folder


def state_of(model: Any) -> dict[str, Tensor]:
    """The weights of a loaded model under their published names."""
    state = model.state_dict()
    return {
        name.replace(TOWER, f"{TOWER}vision_model.") if "vision_model." not in name else name: tensor
        for name, tensor in state.items()
    }


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(actual[name], expected[name])] == []


def clip_weights(folder: Path) -> dict[str, Tensor]:
    """The weights of a CLIP folder under the names they have inside a LLaVA checkpoint."""
    return {TOWER + name: tensor for name, tensor in read_weights(folder).items() if name.startswith("vision_model.")}


def logits(model: Any, tokenizer: Any, processor: Any) -> Tensor:
    image = picture(150, 100)
    ids = tokenizer_image_token("USER: <image>\nWhat is shown? ASSISTANT:", tokenizer, return_tensors="pt")[None]
    images = process_images([image], processor, model.config)
    with torch.no_grad():
        return model(input_ids=ids, images=images, image_sizes=[image.size]).logits


@pytest.fixture
def spoken() -> Iterator[list[str]]:
    """What transformers logs (its logger does not propagate) and Python warns while a test runs."""
    lines: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("transformers").addHandler(handler)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = lambda message, *_, **__: lines.append(str(message))
        yield lines
    logging.getLogger("transformers").removeHandler(handler)


# ---------------------------------------------------------------------------------------------- the published formats


@pytest.mark.parametrize("layout", ["shards.safetensors", "shards.bin", "model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("version", VERSIONS)
def test_every_tensor_equals_the_files(version: str, layout: str, tmp_path: Path) -> None:
    folder = write_miniature(tmp_path, version, file_format=layout.split(".")[1], shards=3)
    expected = read_weights(folder)
    if not layout.startswith("shards"):
        put_weights(folder, expected, layout)
    if version == "v1.5":
        expected |= clip_weights(folder / "clip")
    _, model, _, _ = load(folder)
    assert_same(state_of(model), expected)
    assert {tensor.dtype for tensor in state_of(model).values()} == {torch.float32}
    assert not [name for name, t in (*model.named_parameters(), *model.named_buffers()) if t.is_meta]


@pytest.mark.parametrize("version", VERSIONS)
def test_half_precision_files_are_widened_exactly(version: str, tmp_path: Path) -> None:
    """Published weights are float16 or bfloat16; the config's torch_dtype must not decide what we get."""
    folder = write_miniature(tmp_path, version)
    half = {
        name: t.to(torch.float16 if version == "v1.5" else torch.bfloat16) for name, t in read_weights(folder).items()
    }
    _, model, _, _ = load(put_weights(folder, half))
    state = state_of(model)
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    assert all(torch.equal(state[name], tensor.float()) for name, tensor in half.items())


def test_the_tuned_tower_is_the_checkpoints_not_clips(tmp_path: Path) -> None:
    """OpenAI's weights in the place of a tuned tower give no error, only wrong answers."""
    folder = write_miniature(tmp_path / "a", seed=0)
    shutil.copytree(write_miniature(tmp_path / "b", seed=1) / "clip", folder / "clip", dirs_exist_ok=True)
    own, other = read_weights(folder), clip_weights(folder / "clip")
    assert not any(torch.equal(own[name], other[name]) for name in other)
    assert_same(state_of(load(folder)[1]), own)


@pytest.mark.parametrize("version", VERSIONS)
def test_features_are_clips_second_to_last_hidden_states(version: str, tmp_path: Path) -> None:
    """Also shows that CLIP's position ids, a buffer no file holds, survive being built on the meta device."""
    from transformers import CLIPVisionModel

    folder = write_miniature(tmp_path, version)
    tower = load(folder)[1].get_vision_tower()
    pixels = torch.randn(3, 3, TILE, TILE)
    with torch.no_grad():
        clip = CLIPVisionModel.from_pretrained(folder / "clip", dtype=torch.float32)
        expected = clip(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
        torch.testing.assert_close(tower(pixels), expected, rtol=0, atol=1e-6)
    buffers = dict(tower.named_buffers())
    assert [b.tolist() for n, b in buffers.items() if n.endswith("position_ids")] == [[list(range(SIDE**2 + 1))]]
    assert tower.is_loaded


@pytest.mark.parametrize(("version", "theta"), [("v1.5", 1e4), ("v1.6-vicuna", 1e4), ("v1.6-mistral", 1e6)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_rotary_frequencies(version: str, theta: float, dtype: torch.dtype, tmp_path: Path) -> None:
    _, model, _, _ = load(write_miniature(tmp_path, version), dtype=dtype)
    assert model.config.rope_parameters["rope_theta"] == theta
    width = model.config.hidden_size // model.config.num_attention_heads
    expected = 1 / theta ** (torch.arange(0, width, 2).double() / width)
    frequencies = model.get_model().rotary_emb.inv_freq
    assert frequencies.dtype == torch.float32, "in half precision, far positions would run together"
    torch.testing.assert_close(frequencies, expected.float(), rtol=1e-6, atol=0)


def test_a_null_in_the_config_is_a_value(tmp_path: Path) -> None:
    """`sliding_window: null` turns Mistral's window off; its default of 4096 would cut off what lies further back."""
    assert load(write_miniature(tmp_path, "v1.6-mistral"))[1].config.sliding_window is None


def test_tokens_per_layer_go_before_a_ratio_of_the_config() -> None:
    config = {"retention_ratio": 0.3, "method": "uniform", "other": 1}
    assert str(choose_method(config.copy(), "tome(r=5)")) == "tome(r=5)"
    assert str(choose_method(config.copy(), "tome")) == "tome(retention_ratio=0.3)"
    assert str(choose_method(config)) == "uniform(retention_ratio=0.3)"
    assert config == {"other": 1}
    with pytest.raises(InputError, match="either r or retention_ratio"):
        choose_method({}, "tome(r=5)", 0.3)


@pytest.mark.parametrize("version", VERSIONS)
def test_config_values_reach_the_model(version: str, tmp_path: Path) -> None:
    folder = write_miniature(tmp_path, version)
    given, config = read_config(folder), load(folder)[1].config
    same = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    same += ("vocab_size", "max_position_embeddings", "rms_norm_eps", "mm_hidden_size", "mm_projector_type")
    same += ("mm_vision_select_layer", "image_aspect_ratio", "unfreeze_mm_vision_tower", "mm_use_im_start_end")
    assert {key: getattr(config, key) for key in same} == {key: given[key] for key in same}
    assert config.mm_patch_merge_type == given.get("mm_patch_merge_type", "flat")
    assert config.image_grid_pinpoints == given.get("image_grid_pinpoints")
    assert config.model_type == ("llava_mistral" if version == "v1.6-mistral" else "llava_llama")


@pytest.mark.parametrize("version", VERSIONS)
def test_a_good_checkpoint_loads_without_a_complaint(version: str, tmp_path: Path, spoken: list[str]) -> None:
    """A report of "missing, newly initialized" tensors would frighten users of v1.5, whose tower is filled later."""
    load(write_miniature(tmp_path, version))
    assert spoken == []


@pytest.mark.parametrize("version", VERSIONS)
def test_rotary_tables_and_position_ids_in_the_file_are_ignored(version: str, tmp_path: Path) -> None:
    folder = write_miniature(tmp_path, version)
    good = state_of(load(folder)[1])
    state = read_weights(folder)
    state |= {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.zeros(8) for i in range(3)}
    state["model.rotary_emb.inv_freq"] = torch.zeros(8)
    if version != "v1.5":
        state[f"{TOWER}vision_model.embeddings.position_ids"] = torch.zeros(1, SIDE**2 + 1, dtype=torch.long)
    _, model, _, _ = load(put_weights(folder, state))
    assert_same(state_of(model), good)
    assert model.get_model().rotary_emb.inv_freq[0] == 1
    assert max(b.max() for n, b in model.named_buffers() if n.endswith("position_ids")) == SIDE**2


# --------------------------------------------------------------------------------------------- what decides the class


@pytest.mark.parametrize("name", ["llava-next-7b", "foo-mpt-prompt", "mistral-like", "vicuna-like", "plain-lora", "x"])
@pytest.mark.parametrize("version", VERSIONS)
def test_the_config_decides_the_class_not_the_name(version: str, name: str, tmp_path: Path) -> None:
    from transformers import LlamaTokenizer

    tokenizer, model, processor, _ = load(write_miniature(tmp_path / "liuhaotian" / name, version))
    mistral = version == "v1.6-mistral"
    assert type(model).__name__ == ("LlavaMistralForCausalLM" if mistral else "LlavaLlamaForCausalLM")
    assert type(tokenizer) is LlamaTokenizer
    assert type(processor).__name__ == "CLIPImageProcessorPil"
    assert not model.training


@pytest.mark.parametrize("name", [None, "mpt", "llava-mistral", "some-lora"])
def test_the_name_argument_decides_nothing(name: str | None, checkpoint: Callable[[str], Path]) -> None:
    _, model, _, _ = load_pretrained_model(str(checkpoint("v1.6-vicuna")), None, name, device_map="cpu")
    assert type(model).__name__ == "LlavaLlamaForCausalLM"


@pytest.mark.parametrize("settings", [True, False], ids=["tokenizer_config.json", "tokenizer.model alone"])
def test_the_tokenizer_is_llamas(settings: bool, tmp_path: Path) -> None:
    """`AutoTokenizer` goes by `model_type: llava` and picks a class without the leading word mark."""
    folder = write_miniature(tmp_path)
    if not settings:
        (folder / "tokenizer_config.json").unlink()
    tokenizer = load(folder)[0]
    assert type(tokenizer).__name__ == "LlamaTokenizer"
    assert tokenizer("\nWhat").input_ids[:3] == [1, tokenizer.convert_tokens_to_ids("▁"), 13]
    assert tokenizer.pad_token_id is not None


def test_a_plain_language_model_has_no_image_processor(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    base = language_model(checkpoint("v1.5"), tmp_path / "vicuna")
    tokenizer, model, processor, length = load(base)
    assert type(tokenizer).__name__ == "LlamaTokenizer"
    assert (type(model).__name__, processor, length) == ("LlamaForCausalLM", None, 2048)
    assert_same(dict(model.state_dict()), read_weights(base))


@pytest.mark.parametrize("given", [None, 4096, 777])
@pytest.mark.parametrize("version", ["v1.5", "v1.6-vicuna"])
def test_context_length(version: str, given: int | None, tmp_path: Path) -> None:
    """Upstream's number: 2048 where the config is silent, although the window is larger."""
    folder = write_miniature(tmp_path, version)
    if given:
        edit_config(folder, max_sequence_length=given)
    assert load(folder)[3] == (given or 2048)


# ------------------------------------------------------------------------------------------- dtype, device, attention


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("keyword", ["dtype", "torch_dtype", "text"])
@pytest.mark.parametrize("version", VERSIONS)
def test_all_parts_have_one_dtype(version: str, keyword: str, dtype: str, tmp_path: Path) -> None:
    wanted = getattr(torch, dtype)
    option = {"dtype": dtype} if keyword == "text" else {keyword: wanted}
    tokenizer, model, processor, _ = load(write_miniature(tmp_path, version), **option)
    assert {parameter.dtype for parameter in model.parameters()} == {wanted}
    assert model.dtype == model.get_vision_tower().dtype == wanted
    out = logits(model, tokenizer, processor)
    assert out.dtype == wanted
    assert out.isfinite().all()


@pytest.mark.parametrize("dtype", ["float17", "tensor"])
def test_an_unknown_dtype_is_refused(dtype: str, checkpoint: Callable[[str], Path]) -> None:
    assert dtype in refusal(checkpoint("v1.6-vicuna"), dtype=dtype)


@pytest.mark.parametrize(
    "placement",
    [
        {"device_map": "auto", "device": "cpu"},
        {"device_map": "cpu"},
        {"device_map": {"": "cpu"}},
        {"device_map": None, "device": "cpu"},
        pytest.param(
            {"device_map": None},
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="None may mean CUDA there"),
        ),
        pytest.param({}, marks=pytest.mark.skipif(torch.cuda.is_available(), reason="the default is CUDA there")),
    ],
    ids=str,
)
@pytest.mark.parametrize("version", ["v1.5", "v1.6-vicuna"])
def test_every_way_to_say_cpu(version: str, placement: dict[str, Any], checkpoint: Callable[[str], Path]) -> None:
    folder = checkpoint(version)
    _, model, _, _ = load_pretrained_model(str(folder), None, "llava", **placement)
    held = [*model.parameters(), *model.buffers()]
    assert {str(tensor.device) for tensor in held} == {"cpu"}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert all(torch.equal(state_of(model)[name], tensor) for name, tensor in read_weights(folder).items())


@pytest.mark.parametrize(
    "placement",
    [{"device_map": "cpu"}, {"device_map": {"": "cpu"}}, {"device_map": {"": torch.device("cpu")}}, {"device": "cpu"}],
    ids=str,
)
def test_on_the_cpu_of_a_machine_with_cuda(
    placement: dict[str, Any], checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """float16 is the default of CUDA; a model that goes to the CPU is in float32 there too."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    _, model, _, _ = load_pretrained_model(str(checkpoint("v1.6-vicuna")), None, "llava", **placement)
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("cpu", torch.float32)}


@pytest.mark.parametrize("kind", [None, "eager", "sdpa"])
def test_attention_is_set_for_both_halves(kind: str | None, checkpoint: Callable[[str], Path]) -> None:
    _, model, _, _ = load(checkpoint("v1.6-vicuna"), **({"attn_implementation": kind} if kind else {}))
    assert model.config._attn_implementation == (kind or "sdpa")
    assert model.get_vision_tower().config._attn_implementation == (kind or "sdpa")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("placement", [{}, {"device_map": "cuda:0"}, {"device_map": {"": 0}}], ids=str)
@pytest.mark.parametrize("version", VERSIONS)
def test_cuda_means_float16_everywhere(version: str, placement: dict[str, Any], tmp_path: Path) -> None:
    folder = write_miniature(tmp_path, version)
    _, model, _, _ = load_pretrained_model(str(folder), None, "llava", **placement)
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("cuda", torch.float16)}
    assert {buffer.device.type for buffer in model.buffers()} == {"cuda"}
    expected = read_weights(folder) | (clip_weights(folder / "clip") if version == "v1.5" else {})
    assert_same({name: t.cpu() for name, t in state_of(model).items()}, {n: t.half() for n, t in expected.items()})


# ----------------------------------------------------------------------------------------- where the tower comes from


def write_openai_clip(folder: Path, source: Path) -> Path:
    """A CLIP folder as OpenAI's is: both halves of CLIP in one .bin, the vision config nested, position ids saved."""
    folder.mkdir()
    shutil.copy(source / "preprocessor_config.json", folder)
    config = {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": 16,
        "logit_scale_init_value": 2.6592,
        "text_config": {"model_type": "clip_text_model", "hidden_size": 16, "num_hidden_layers": 1, "vocab_size": 99},
        "vision_config": {"model_type": "clip_vision_model", **VISION},
        "torch_dtype": "float32",
        "transformers_version": "4.21.3",
    }
    (folder / "config.json").write_text(json.dumps(config))
    state = read_weights(source) | {
        "logit_scale": torch.tensor(4.6),
        "text_projection.weight": torch.ones(16, 16),
        "visual_projection.weight": torch.ones(16, VISION["hidden_size"]),
        "text_model.embeddings.token_embedding.weight": torch.ones(99, 16),
        "text_model.encoder.layers.0.self_attn.q_proj.weight": torch.ones(16, 16),
        "text_model.embeddings.position_ids": torch.arange(77)[None],
        "vision_model.embeddings.position_ids": torch.arange(SIDE**2 + 1)[None],
    }
    torch.save(state, folder / "pytorch_model.bin")
    return folder


@pytest.mark.parametrize("place", ["inside", "beside", "absolute", "override", "relative override"])
@pytest.mark.parametrize("version", ["v1.5", "v1.6-vicuna"])
def test_the_tower_can_be_given_offline(version: str, place: str, tmp_path: Path) -> None:
    folder = write_miniature(tmp_path / "hub" / "llava", version)
    expected = state_of(load(folder)[1])
    kwargs: dict[str, Any] = {}
    if place == "beside":
        shutil.move(folder / "clip", tmp_path / "hub" / "clip")
    elif place == "absolute":
        shutil.move(folder / "clip", tmp_path / "elsewhere")
        edit_config(folder, mm_vision_tower=str(tmp_path / "elsewhere"))
    elif place == "override":
        shutil.move(folder / "clip", tmp_path / "elsewhere")
        edit_config(folder, mm_vision_tower="nobody/has-this-tower")
        kwargs["vision_tower"] = str(tmp_path / "elsewhere")
    elif place == "relative override":
        edit_config(folder, mm_vision_tower="nobody/has-this-tower")
        kwargs["vision_tower"] = "clip"
    _, model, processor, _ = load(folder, **kwargs)
    assert_same(state_of(model), expected)
    assert processor.crop_size["height"] == processor.size["shortest_edge"] == TILE


@pytest.mark.parametrize("version", ["v1.5", "v1.6-vicuna"])
def test_the_clip_folder_as_openai_publishes_it(version: str, tmp_path: Path) -> None:
    folder = write_miniature(tmp_path / "llava", version)
    expected = state_of(load(folder)[1])
    clip = write_openai_clip(tmp_path / "clip-vit", folder / "clip")
    shutil.rmtree(folder / "clip")
    _, model, processor, _ = load(folder, vision_tower=str(clip))
    assert_same(state_of(model), expected)
    assert processor.crop_size["height"] == TILE


def test_the_published_tower_needs_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import CLIPVisionConfig

    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("asked for a config")

    monkeypatch.setattr(CLIPVisionConfig, "from_pretrained", fail)
    shape = CLIPVisionConfig(**vision_config(CLIP))
    sizes = (shape.hidden_size, shape.intermediate_size, shape.num_hidden_layers, shape.num_attention_heads)
    assert sizes == (1024, 4096, 24, 16)
    assert (shape.image_size, shape.patch_size, shape.hidden_act, shape.layer_norm_eps) == (336, 14, "quick_gelu", 1e-5)
    processor = image_processor(CLIP, 336)
    assert (processor.size["shortest_edge"], processor.crop_size["height"], processor.crop_size["width"]) == (336,) * 3
    assert tuple(processor.image_mean) == (0.48145466, 0.4578275, 0.40821073)
    assert tuple(processor.image_std) == (0.26862954, 0.26130258, 0.27577711)
    assert processor.resample == 3, "bicubic"


def test_a_changed_shape_description_is_not_shared() -> None:
    vision_config(CLIP)["hidden_size"] = 0
    assert vision_config(CLIP)["hidden_size"] == 1024


@pytest.mark.parametrize("version", VERSIONS)
def test_preprocessing_follows_the_towers_folder(version: str, tmp_path: Path) -> None:
    folder = write_miniature(tmp_path, version)
    file = folder / "clip" / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"image_mean": [0.5, 0.25, 0.125]}))
    assert list(load(folder)[2].image_mean) == [0.5, 0.25, 0.125]


# ------------------------------------------------------------------------------------------------------- the hub's ids


@pytest.fixture
def publish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Path], str]:
    """Put a folder into a download cache under a hub id, as if it had been fetched earlier."""
    cache = tmp_path / "cache"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))

    def put(repo: str, folder: Path) -> str:
        entry = cache / f"models--{repo.replace('/', '--')}"
        shutil.copytree(folder, entry / "snapshots" / "0123abc")
        (entry / "refs").mkdir()
        (entry / "refs" / "main").write_text("0123abc")
        return repo

    return put


@pytest.mark.parametrize("version", VERSIONS)
def test_hub_ids_of_checkpoint_and_tower(version: str, tmp_path: Path, publish: Callable[[str, Path], str]) -> None:
    folder = write_miniature(tmp_path / "llava", version)
    expected = state_of(load(folder)[1])
    publish("acme/clip", folder / "clip")
    shutil.rmtree(folder / "clip")
    edit_config(folder, mm_vision_tower="acme/clip")
    tokenizer, model, processor, _ = load(publish("acme/llava", folder))
    assert_same(state_of(model), expected)
    assert type(tokenizer).__name__ == "LlamaTokenizer"
    assert processor.crop_size["height"] == TILE


def test_preprocessing_follows_the_towers_hub_repository(tmp_path: Path, publish: Callable[[str, Path], str]) -> None:
    folder = edit_config(write_miniature(tmp_path / "llava"), mm_vision_tower="acme/clip")
    file = folder / "clip" / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"image_mean": [0.5, 0.25, 0.125]}))
    publish("acme/clip", folder / "clip")
    shutil.rmtree(folder / "clip")
    assert list(load(folder)[2].image_mean) == [0.5, 0.25, 0.125]


@pytest.mark.parametrize("kind", ["lora", "projector"])
def test_hub_ids_of_additions(kind: str, adapter: Any, tmp_path: Path, publish: Callable[[str, Path], str]) -> None:
    """The published LoRAs (liuhaotian/llava-v1.5-7b-lora) are given by hub id in upstream's documentation."""
    folder = adapter.write(tmp_path / kind, lora=kind == "lora")
    _, model, _, _ = load(publish(f"acme/llava-{kind}", folder), publish("acme/vicuna", adapter.base))
    assert_close(state_of(model), adapter.merged() if kind == "lora" else adapter.projected())


# ------------------------------------------------------------------------------------------ generation and saving


@pytest.mark.parametrize("version", VERSIONS)
def test_the_generation_config_is_tidy(version: str, tmp_path: Path, spoken: list[str]) -> None:
    """Hub files carry temperature and top_p without do_sample, and the window of pre-training as max_length."""
    from transformers.utils import logging as transformers_logging

    tokenizer, model, processor, _ = load(write_miniature(tmp_path, version))
    spoken.clear()
    getattr(transformers_logging.warning_once, "cache_clear", lambda: None)()
    image = picture(90, 90)
    ids = tokenizer_image_token("<image>\nWhat?", tokenizer, return_tensors="pt")[None]
    images = process_images([image], processor, model.config)
    greedy = {"do_sample": False, "temperature": 0, "top_p": None, "num_beams": 1}
    for options in ({}, greedy, {"do_sample": True, "temperature": 0.5, "top_p": 0.9}):
        out = model.generate(ids, images=images, image_sizes=[image.size], max_new_tokens=2, **options)
        assert 1 <= out.shape[1] <= 2
    model.save_pretrained(tmp_path / "saved")
    assert spoken == []


@pytest.mark.parametrize("version", VERSIONS)
def test_save_and_load_again(version: str, tmp_path: Path) -> None:
    folder = write_miniature(tmp_path / "one" / "llava", version)
    tokenizer, model, processor, length = load(folder)
    before, state = logits(model, tokenizer, processor), state_of(model)
    model.save_pretrained(tmp_path / "two")
    tokenizer.save_pretrained(tmp_path / "two")
    names = published_names(read_config(folder), True, version != "v1.5", VISION["num_hidden_layers"])
    assert read_weights(tmp_path / "two").keys() == names
    shutil.rmtree(tmp_path / "one")  # a saved model stands alone, CLIP folder or not
    again, copy, processor, other = load(tmp_path / "two")
    assert type(copy) is type(model)
    assert type(again).__name__ == "LlamaTokenizer"
    assert other == length
    assert_same(state_of(copy), state)
    text = "USER: \nWhat's  this?</s> é\t"
    assert again(text).input_ids == tokenizer(text).input_ids
    assert torch.equal(logits(copy, again, processor), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_survives_saving(dtype: torch.dtype, tmp_path: Path) -> None:
    tokenizer, model, _, _ = load(write_miniature(tmp_path / "one"), dtype=dtype)
    model.save_pretrained(tmp_path / "two", max_shard_size="100KB")
    tokenizer.save_pretrained(tmp_path / "two")
    assert len(list((tmp_path / "two").glob("*.safetensors"))) > 1
    assert_same(state_of(load(tmp_path / "two", dtype=dtype)[1]), state_of(model))


# -------------------------------------------------------------------------------------------------- image tokens


@pytest.mark.parametrize(
    ("flags", "tokens"),
    [
        ({"mm_use_im_patch_token": False, "mm_use_im_start_end": False}, []),
        ({"mm_use_im_patch_token": True}, ["<im_patch>"]),
        ({}, ["<im_patch>"]),  # absent means true, as upstream
        ({"mm_use_im_patch_token": False, "mm_use_im_start_end": True}, ["<im_start>", "<im_end>"]),
        ({"mm_use_im_patch_token": True, "mm_use_im_start_end": True}, ["<im_patch>", "<im_start>", "<im_end>"]),
    ],
)
def test_image_tokens_of_early_checkpoints(flags: dict[str, bool], tokens: list[str], tmp_path: Path) -> None:
    folder = write_miniature(tmp_path)
    edit_config(edit_config(folder, "mm_use_im_patch_token", "mm_use_im_start_end"), **flags)
    tokenizer, model, _, _ = load(folder)
    rows = 384 + len(tokens)
    assert tokenizer.convert_tokens_to_ids(tokens) == list(range(384, rows))
    assert model.get_input_embeddings().num_embeddings == model.lm_head.out_features == model.config.vocab_size == rows
    published = read_weights(folder)
    assert torch.equal(model.get_input_embeddings().weight[:384], published["model.embed_tokens.weight"])
    assert torch.equal(model.lm_head.weight[:384], published["lm_head.weight"])


def test_a_padded_vocabulary_is_not_cut(tmp_path: Path) -> None:
    folder = write_miniature(tmp_path)
    state = read_weights(folder)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        state[name] = torch.cat((state[name], torch.ones(16, 64)))
    edit_config(put_weights(folder, state), "mm_use_im_patch_token", vocab_size=400)
    assert_same(state_of(load(folder)[1]), state)


# ------------------------------------------------------------------------------------------ method, ratio, profile


def method_of(folder: Path, **kwargs: Any) -> str:
    return str(load(folder, **kwargs)[1].method)


def test_globalcom2_is_the_default(tmp_path: Path) -> None:
    assert method_of(write_miniature(tmp_path)) == "globalcom2()"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"method": "none"}, "none()"),
        ({"retention_ratio": 0.5}, "globalcom2(retention_ratio=0.5)"),
        ({"profile": "released"}, "globalcom2(profile='released')"),
        ({"method": "globalcom2(temperature=5)", "retention_ratio": 0.75}, None),
        ({"method": "random", "retention_ratio": 0.1}, "random(retention_ratio=0.1)"),
        ({"method": "uniform", "retention_ratio": "0.3"}, "uniform(retention_ratio=0.3)"),
    ],
)
@pytest.mark.parametrize("way", ["argument", "config", "file", "folder"])
def test_every_channel_for_the_method(way: str, options: dict[str, Any], expected: str | None, tmp_path: Path) -> None:
    """Harnesses pass no keywords of their own; config.json and customized_config are what they leave open."""
    folder = write_miniature(tmp_path / "llava")
    kwargs = options if way == "argument" else {}
    if way == "config":
        edit_config(folder, **options)
    elif way in ("file", "folder"):
        file = tmp_path / "config.json"
        file.write_text(json.dumps(options))
        kwargs = {"customized_config": str(file if way == "file" else tmp_path)}
    got = method_of(folder, **kwargs)
    if expected is None:
        assert "temperature=5" in got
        assert "retention_ratio=0.75" in got
    else:
        assert got == expected


def test_arguments_go_before_the_file_and_the_file_before_the_config(tmp_path: Path) -> None:
    folder = edit_config(write_miniature(tmp_path / "llava"), retention_ratio=0.1, profile="paper")
    file = tmp_path / "own.json"
    file.write_text('{"retention_ratio": 0.2, "image_aspect_ratio": "pad"}')
    assert method_of(folder) == "globalcom2(retention_ratio=0.1, profile='paper')"
    _, model, _, _ = load(folder, customized_config=str(file))
    assert str(model.method) == "globalcom2(retention_ratio=0.2, profile='paper')"
    assert model.config.image_aspect_ratio == "pad"
    got = method_of(folder, customized_config=str(file), retention_ratio=0.3)
    assert got == "globalcom2(retention_ratio=0.3, profile='paper')"


@pytest.mark.parametrize("way", ["argument", "config"])
@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"retention_ratio": 0}, "0"),
        ({"retention_ratio": 0.0}, "0.0"),
        ({"retention_ratio": -1}, "-1"),
        ({"retention_ratio": 1.5}, "1.5"),
        ({"retention_ratio": "abc"}, "abc"),
        ({"retention_ratio": float("nan")}, "nan"),
        ({"method": "nonsense"}, "nonsense"),
        ({"method": "globalcom2(gamma=1)"}, "gamma"),
        ({"profile": "nonsense"}, "nonsense"),
    ],
    ids=str,
)
def test_bad_methods_are_refused(way: str, options: dict[str, Any], named: str, tmp_path: Path) -> None:
    """A ratio of 0 must not read as "not given"."""
    folder = write_miniature(tmp_path)
    if way == "config":
        assert named in refusal(edit_config(folder, **options))
    else:
        assert named in refusal(folder, **options)


def test_the_harness_keyword_is_ignored(checkpoint: Callable[[str], Path]) -> None:
    """lmms-eval passes `multimodal=True` and its choice of attention."""
    _, model, _, _ = load(checkpoint("v1.6-vicuna"), multimodal=True, attn_implementation="sdpa")
    model.tie_weights()
    assert not torch.equal(model.lm_head.weight, model.get_input_embeddings().weight)


# ------------------------------------------------------------------------------------------ weights that do not fit

ATTENTION = f"{TOWER}vision_model.encoder.layers.1.self_attn"


@pytest.mark.parametrize(
    ("version", "name"),
    [
        ("v1.6-vicuna", f"{ATTENTION}.q_proj.weight"),
        ("v1.6-vicuna", f"{ATTENTION}.out_proj.bias"),
        ("v1.6-vicuna", f"{TOWER}vision_model.embeddings.class_embedding"),
        ("v1.6-mistral", f"{TOWER}vision_model.post_layernorm.weight"),
        ("v1.6-mistral", f"{TOWER}vision_model.pre_layrnorm.bias"),
        ("v1.5", "model.mm_projector.0.weight"),
        ("v1.6-vicuna", "model.mm_projector.2.bias"),
        ("v1.6-vicuna", "model.image_newline"),
        ("v1.6-mistral", "model.image_newline"),
        ("v1.5", "lm_head.weight"),
        ("v1.6-vicuna", "model.embed_tokens.weight"),
        ("v1.6-mistral", "model.layers.2.mlp.down_proj.weight"),
    ],
)
@pytest.mark.parametrize("fault", ["missing", "renamed", "misshapen", "additional"])
def test_a_tensor_that_does_not_fit_is_named(fault: str, version: str, name: str, tmp_path: Path) -> None:
    folder = write_miniature(tmp_path, version)
    state = read_weights(folder)
    odd = name.replace("layers.1", "layers.9").replace("layers.2", "layers.9") + "_odd"
    if fault == "additional":
        state[odd] = torch.zeros(3)
    else:
        tensor = state.pop(name)
        if fault == "renamed":
            state[odd] = tensor
        elif fault == "misshapen":
            state[name] = torch.zeros(7, *tensor.shape[1:])
    put_weights(folder, state)
    # Either spelling of a tower tensor will do: the file's, or the module's without `vision_model.`.
    named = {word.strip(".") for word in re.findall(r"[\w.]+", refusal(folder).replace("vision_model.", ""))}
    expected = {name} if fault in ("missing", "misshapen") else {odd} if fault == "additional" else {name, odd}
    assert {word.replace("vision_model.", "") for word in expected} <= named


def test_a_newline_where_none_belongs_is_refused(tmp_path: Path) -> None:
    folder = write_miniature(tmp_path, "v1.5")
    assert "model.image_newline" in refusal(
        put_weights(folder, read_weights(folder) | {"model.image_newline": torch.zeros(64)})
    )


@pytest.mark.parametrize("version", ["v1.6-vicuna", "v1.6-mistral"])
def test_a_tuned_tower_must_come_with_the_checkpoint(version: str, tmp_path: Path) -> None:
    """The CLIP folder beside it would fill the gap with other weights than the projector was trained on."""
    folder = write_miniature(tmp_path, version)
    state = {name: tensor for name, tensor in read_weights(folder).items() if not name.startswith(TOWER)}
    assert "missing model.vision_tower" in refusal(put_weights(folder, state))


def test_half_a_tower_is_no_tower(tmp_path: Path) -> None:
    """Also where the tower is not tuned: half of the checkpoint's and half of CLIP's is neither."""
    folder = write_miniature(tmp_path, "v1.5")
    tower = clip_weights(folder / "clip")
    half = dict(list(tower.items())[: len(tower) // 2])
    assert TOWER in refusal(put_weights(folder, read_weights(folder) | half))


@pytest.mark.parametrize("file_format", ["safetensors", "bin"])
@pytest.mark.parametrize("fault", ["truncated", "emptied", "removed", "text", "no weights at all", "index"])
def test_damaged_weight_files_are_refused(fault: str, file_format: str, tmp_path: Path) -> None:
    folder = write_miniature(tmp_path / "llava-damaged", file_format=file_format)
    file = next(folder.glob(f"*-00002-of-00002.{file_format}"))
    if fault == "truncated":
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    elif fault == "emptied":
        file.write_bytes(b"")
    elif fault == "removed":
        file.unlink()
    elif fault == "text":
        file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 4976699688\n")
    elif fault == "index":
        next(folder.glob("*.index.json")).write_text("{")
    else:
        for old in folder.glob("*model*0000*"):
            old.unlink()
        next(folder.glob("*.index.json")).unlink()
    assert "llava-damaged" in refusal(folder)


def test_a_checkpoint_of_another_size_is_refused(tmp_path: Path) -> None:
    folder = edit_config(write_miniature(tmp_path), intermediate_size=96)
    assert "mlp" in refusal(folder)


class Payload:
    """Something a pickle can carry that acts when it is loaded."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


def test_the_payload_would_act(tmp_path: Path) -> None:
    torch.save({"x": Payload(tmp_path / "mark")}, tmp_path / "x.bin")
    torch.load(tmp_path / "x.bin", weights_only=False)
    assert (tmp_path / "mark").exists()


@pytest.mark.parametrize(
    "file", ["shard", "single", "clip", "mm_projector.bin", "non_lora_trainables.bin", "adapter_model.bin"]
)
def test_a_pickle_payload_is_refused_and_not_run(file: str, adapter: Any, tmp_path: Path) -> None:
    mark, base = tmp_path / "mark", None
    evil = {"model.mm_projector.0.weight": torch.zeros(64, 32), "x": Payload(mark)}
    if file == "shard":
        folder = write_miniature(tmp_path / "llava", file_format="bin")
        torch.save(evil, folder / "pytorch_model-00002-of-00002.bin")
    elif file == "single":
        folder = put_weights(write_miniature(tmp_path / "llava"), evil, "pytorch_model.bin")
    elif file == "clip":
        folder = write_miniature(tmp_path / "llava", "v1.5")
        put_weights(folder / "clip", evil, "pytorch_model.bin")
    else:
        base = adapter.base
        folder = adapter.write(tmp_path / "llava", lora=file != "mm_projector.bin")
        (folder / "adapter_model.safetensors").unlink(missing_ok=file != "adapter_model.bin")
        torch.save(evil, folder / file)
        if file == "non_lora_trainables.bin":
            adapter.write_lora(folder)
    message = refusal(folder, base)
    assert not mark.exists()
    assert str(tmp_path / "llava") in message


# --------------------------------------------------------------------------------- configs, tokenizers and towers


@pytest.mark.parametrize("text", ["", "{", "{}", "[]", "null", '"x"', "[1]", "\x00"])
def test_unusable_configs_are_refused(text: str, tmp_path: Path) -> None:
    folder = write_miniature(tmp_path / "llava-config")
    (folder / "config.json").write_text(text)
    assert "llava-config" in refusal(folder)


@pytest.mark.parametrize("what", ["config.json", "the folder", "all files"])
def test_a_missing_config_is_refused(what: str, tmp_path: Path) -> None:
    folder = write_miniature(tmp_path / "llava-config")
    if what == "config.json":
        (folder / what).unlink()
    else:
        shutil.rmtree(folder)
    if what == "all files":
        folder.mkdir()
    message = refusal(folder)
    assert str(folder) in message
    assert "folder" in message


@pytest.mark.parametrize("text", [None, "", "{", "[1]", "7"])
def test_unusable_customized_configs_are_refused(text: str | None, tmp_path: Path) -> None:
    file = tmp_path / "own.json"
    if text is not None:
        file.write_text(text)
    assert "own.json" in refusal(write_miniature(tmp_path / "llava"), customized_config=str(file))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "llava_mpt", "architectures": ["LlavaMptForCausalLM"]}, "mpt"),
        ({"model_type": "llava_qwen", "architectures": ["LlavaQwenForCausalLM"]}, "qwen"),
        ({"model_type": "llava_gemma", "architectures": ["LlavaGemmaForCausalLM"]}, "gemma"),
        ({"mm_projector_type": "qformer"}, "qformer"),
        ({"mm_vision_select_feature": "cls_patch"}, "cls_patch"),
        ({"hidden_size": "large"}, "hidden_size"),
    ],
    ids=str,
)
def test_what_is_not_supported_is_named(changes: dict[str, Any], named: str, tmp_path: Path) -> None:
    assert named in refusal(edit_config(write_miniature(tmp_path), **changes)).lower()


def test_transformers_own_llava_next_is_named(tmp_path: Path) -> None:
    """llava-hf's checkpoints are the same models under other names; many users will try them."""
    folder = write_miniature(tmp_path)
    keep = {"model_type": "llava_next", "architectures": ["LlavaNextForConditionalGeneration"]}
    (folder / "config.json").write_text(json.dumps(keep))
    assert "llava_next" in refusal(folder).lower()


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("fault", ["missing", "missing with its config", "empty", "truncated", "text"])
def test_unusable_tokenizers_are_refused(fault: str, version: str, tmp_path: Path) -> None:
    """transformers makes up an empty tokenizer where the file is missing; every word would be unknown."""
    folder = write_miniature(tmp_path / "llava-words", version)
    file = folder / "tokenizer.model"
    if fault == "empty":
        file.write_bytes(b"")
    elif fault == "truncated":
        file.write_bytes(file.read_bytes()[:1000])
    elif fault == "text":
        file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 499723\n")
    else:
        file.unlink()
    if fault == "missing with its config":
        (folder / "tokenizer_config.json").unlink()
    message = refusal(folder)
    assert "llava-words" in message
    assert "tokenizer" in message


@pytest.mark.parametrize("text", ["{", "[]", ""])
def test_unusable_tokenizer_configs_are_refused(text: str, tmp_path: Path) -> None:
    folder = write_miniature(tmp_path / "llava-words")
    (folder / "tokenizer_config.json").write_text(text)
    assert "llava-words" in refusal(folder)


@pytest.mark.parametrize("version", ["v1.5", "v1.6-vicuna"])
def test_a_missing_clip_folder_is_named_with_the_remedy(version: str, tmp_path: Path) -> None:
    folder = write_miniature(tmp_path, version)
    shutil.rmtree(folder / "clip")
    message = refusal(edit_config(folder, mm_vision_tower="acme/no-such-clip"))
    assert "acme/no-such-clip" in message
    assert "vision_tower" in message


@pytest.mark.parametrize("fault", ["removed", "truncated", "emptied", "misshapen", "incomplete"])
def test_damaged_clip_weights_are_refused(fault: str, tmp_path: Path) -> None:
    folder = write_miniature(tmp_path, "v1.5")
    clip = folder / "clip"
    file = clip / "model.safetensors"
    state = read_weights(clip)
    name = "vision_model.encoder.layers.1.mlp.fc1.bias"
    if fault == "removed":
        file.unlink()
    elif fault == "truncated":
        file.write_bytes(file.read_bytes()[:5000])
    elif fault == "emptied":
        file.write_bytes(b"")
    elif fault == "misshapen":
        put_weights(clip, state | {name: torch.zeros(3)})
    else:
        state.pop(name)
        put_weights(clip, state)
    message = refusal(folder)
    assert str(clip) in message
    if fault in ("misshapen", "incomplete"):
        assert "encoder.layers.1.mlp.fc1.bias" in message


@pytest.mark.parametrize("file", ["config.json", "preprocessor_config.json"])
@pytest.mark.parametrize("text", ["{", ""])
@pytest.mark.parametrize("version", ["v1.5", "v1.6-vicuna"])
def test_unreadable_clip_settings_are_refused(version: str, file: str, text: str, tmp_path: Path) -> None:
    folder = write_miniature(tmp_path, version)
    (folder / "clip" / file).write_text(text)
    assert "clip" in refusal(folder)


# ---------------------------------------------------------------------------------------- LoRA and projector folders


def language_model(checkpoint: Path, folder: Path) -> Path:
    """The Llama inside a v1.5 checkpoint, as the base of a LoRA or a projector is published."""
    folder.mkdir(parents=True)
    marks = ("mm_", "image_", "tune_", "freeze_", "unfreeze_", "use_mm")
    config = {key: value for key, value in read_config(checkpoint).items() if not key.startswith(marks)}
    config |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config))
    for file in ("tokenizer.model", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(checkpoint / file, folder)
    plain = {
        k: t for k, t in read_weights(checkpoint).items() if "mm_" not in k and "image_" not in k and "vision" not in k
    }
    save_file(plain, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    wrong = [name for name in expected if not torch.allclose(actual[name], expected[name], rtol=0, atol=1e-6)]
    assert wrong == []


class Adapter:
    """A tiny LoRA with its projector, made without PEFT, and what it should become."""

    rank, alpha = 4, 12
    # LLaVA's own training names the last parts of the modules, which CLIP's layers have as well.
    targets = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

    def __init__(self, full: Path, base: Path) -> None:
        generator = torch.Generator().manual_seed(5)
        self.full, self.base, self.weights = full, base, read_weights(full) | clip_weights(full / "clip")
        adapted = [n for n in self.weights if n.startswith("model.layers.") and n.split(".")[-2] in self.targets]
        self.factors = {}
        for name in adapted:
            rows, columns = self.weights[name].shape
            down = 0.3 * torch.randn(self.rank, columns, generator=generator)
            self.factors[name] = (down, 0.3 * torch.randn(rows, self.rank, generator=generator))
        names = [name for name in self.weights if "mm_projector" in name]
        self.projector = {n: torch.randn(self.weights[n].shape, generator=generator) for n in names}

    def write(self, folder: Path, *, lora: bool = True, prefix: str = "base_model.model.") -> Path:
        folder.mkdir(exist_ok=True)
        config = read_config(self.full) | {"mm_vision_tower": str(self.full / "clip")}
        (folder / "config.json").write_text(json.dumps(config))
        if not lora:
            torch.save(self.projector, folder / "mm_projector.bin")
            return folder
        torch.save(
            {prefix + name: tensor for name, tensor in self.projector.items()}, folder / "non_lora_trainables.bin"
        )
        return self.write_lora(folder)

    def write_lora(
        self, folder: Path, change: Callable[[dict[str, Tensor]], Any] = lambda _: None, **more: Any
    ) -> Path:
        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": "lmsys/vicuna-7b-v1.5",
            "r": self.rank,
            "lora_alpha": self.alpha,
            "lora_dropout": 0.05,
            "bias": "none",
            "target_modules": list(self.targets),
            "inference_mode": True,
            **more,
        }
        (folder / "adapter_config.json").write_text(json.dumps(config))
        state = {}
        for name, (down, up) in self.factors.items():
            stem = f"base_model.model.{name.removesuffix('.weight')}"
            state |= {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up}
        change(state)
        save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        return folder

    def projected(self) -> dict[str, Tensor]:
        return self.weights | self.projector

    def merged(self) -> dict[str, Tensor]:
        scale = self.alpha / self.rank
        return self.projected() | {n: self.weights[n] + scale * (up @ down) for n, (down, up) in self.factors.items()}


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Adapter:
    root = tmp_path_factory.mktemp("adapter")
    full = write_miniature(root / "full", "v1.5")
    return Adapter(full, language_model(full, root / "vicuna"))


@pytest.mark.parametrize("base", ["plain", "full"])
@pytest.mark.parametrize("prefix", ["base_model.model.", "base_model.", ""], ids=["peft", "once", "bare"])
def test_a_lora_is_merged_as_by_hand(prefix: str, base: str, adapter: Adapter, tmp_path: Path) -> None:
    folder = adapter.write(tmp_path / "llava-v1.5-7b-lora", prefix=prefix)
    tokenizer, model, processor, length = load(folder, adapter.base if base == "plain" else adapter.full)
    assert type(model).__name__ == "LlavaLlamaForCausalLM", "nothing of PEFT is left around the model"
    state, expected = state_of(model), adapter.merged()
    assert_close(state, expected)
    untouched = expected.keys() - adapter.factors.keys()
    assert_same({name: state[name] for name in untouched}, {name: expected[name] for name in untouched})
    assert length == 2048
    assert not model.training
    assert not hasattr(model, "peft_config") or not model.peft_config
    assert logits(model, tokenizer, processor).isfinite().all()


def test_the_tower_is_left_alone_by_a_lora_with_the_same_module_names(adapter: Adapter, tmp_path: Path) -> None:
    """CLIP has a q_proj too; PEFT would give it factors of its own, random ones with `init_lora_weights: false`."""
    folder = adapter.write_lora(adapter.write(tmp_path / "lora"), init_lora_weights=False)
    assert_close(state_of(load(folder, adapter.base)[1]), adapter.merged())


def test_a_lora_on_a_checkpoint_with_its_own_tower(tmp_path: Path) -> None:
    full = write_miniature(tmp_path / "full", "v1.6-vicuna")
    shutil.copytree(write_miniature(tmp_path / "other", seed=1) / "clip", full / "clip", dirs_exist_ok=True)
    own = Adapter(full, full)
    own.weights |= read_weights(full)
    own.projector["model.image_newline"] = torch.randn(64)
    folder = own.write(tmp_path / "lora")
    assert_close(state_of(load(folder, full)[1]), own.merged())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_merged_lora_has_one_dtype_and_can_be_saved(dtype: torch.dtype, adapter: Adapter, tmp_path: Path) -> None:
    tokenizer, model, processor, _ = load(adapter.write(tmp_path / "lora"), adapter.base, dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert model.get_model().rotary_emb.inv_freq.dtype == torch.float32, "casting the module would cast its buffers"
    model.save_pretrained(tmp_path / "merged")
    tokenizer.save_pretrained(tmp_path / "merged")
    names = published_names(read_config(adapter.full), True, False, VISION["num_hidden_layers"])
    assert read_weights(tmp_path / "merged").keys() == names
    again, copy, _, _ = load(tmp_path / "merged", dtype=dtype)
    assert torch.equal(logits(copy, again, processor), logits(model, tokenizer, processor))


@pytest.mark.parametrize("base", ["plain", "full"])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_a_projector_alone(stored: torch.dtype, base: str, adapter: Adapter, tmp_path: Path) -> None:
    folder = adapter.write(tmp_path / "llava-pretrain", lora=False)
    projector = {name: tensor.to(stored) for name, tensor in adapter.projector.items()}
    torch.save(projector, folder / "mm_projector.bin")
    _, model, processor, _ = load(folder, adapter.base if base == "plain" else adapter.full, dtype=torch.float32)
    assert_same(state_of(model), adapter.weights | {name: tensor.float() for name, tensor in projector.items()})
    assert processor is not None


def test_the_tokenizer_comes_from_the_base(adapter: Adapter, tmp_path: Path) -> None:
    folder = adapter.write(tmp_path / "lora")
    assert not list(folder.glob("tokenizer*"))
    assert load(folder, adapter.base)[0]("a cat").input_ids == load(adapter.full)[0]("a cat").input_ids


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "projector"])
@pytest.mark.parametrize(
    ("fault", "named"),
    [
        ("missing", "mm_projector.2.bias"),
        ("superfluous", "mm_projector.7.weight"),
        ("misshapen", "mm_projector.0.weight"),
        ("no dictionary", ".bin"),
        ("truncated", ".bin"),
        ("emptied", ".bin"),
        ("no file", ".bin"),
        ("newline", "image_newline"),
    ],
)
def test_additions_that_do_not_fit_are_named(
    fault: str, named: str, lora: bool, adapter: Adapter, tmp_path: Path
) -> None:
    folder = adapter.write(tmp_path / "llava-part", lora=lora, prefix="")
    file = folder / ("non_lora_trainables.bin" if lora else "mm_projector.bin")
    tensors: Any = dict(adapter.projector)
    if fault == "missing":
        tensors.pop("model.mm_projector.2.bias")
    elif fault == "superfluous":
        tensors["model.mm_projector.7.weight"] = torch.zeros(3)
    elif fault == "misshapen":  # a 7B projector on a 13B model
        tensors["model.mm_projector.0.weight"] = torch.zeros(80, 32)
    elif fault == "no dictionary":
        tensors = [torch.zeros(3)]
    elif fault == "newline":  # an unpadding model needs one, and a plain base cannot give it
        edit_config(folder, mm_patch_merge_type="spatial_unpad")
    torch.save(tensors, file)
    if fault == "truncated":
        file.write_bytes(file.read_bytes()[:2000])
    elif fault == "emptied":
        file.write_bytes(b"")
    elif fault == "no file":
        file.unlink()
    message = refusal(folder, adapter.base)
    assert named in message
    assert "llava-part" in message


def test_a_lora_that_adapts_the_tower_too_is_merged_there(adapter: Adapter, tmp_path: Path) -> None:
    """Where training saw the tower, peft found layers of the same names in it; a part of them is enough."""
    own = Adapter(adapter.full, adapter.base)
    generator = torch.Generator().manual_seed(6)
    for name in (f"{ATTENTION}.q_proj.weight", f"{TOWER}vision_model.encoder.layers.2.self_attn.v_proj.weight"):
        width = VISION["hidden_size"]
        own.factors[name] = tuple(0.3 * torch.randn(s, generator=generator) for s in ((4, width), (width, 4)))
    state = state_of(load(own.write(tmp_path / "lora"), adapter.base)[1])
    assert_close(state, own.merged())
    assert not torch.equal(state[f"{ATTENTION}.q_proj.weight"], own.weights[f"{ATTENTION}.q_proj.weight"])


def test_factors_for_a_layer_the_tower_has_not_are_named(adapter: Adapter, tmp_path: Path) -> None:
    odd = (
        "base_model.model.model.vision_tower.vision_tower.vision_model.encoder.layers.9.self_attn.q_proj.lora_A.weight"
    )
    folder = adapter.write_lora(adapter.write(tmp_path / "lora"), lambda state: state.update({odd: torch.zeros(4, 32)}))
    assert "encoder.layers.9.self_attn.q_proj" in refusal(folder, adapter.base)


def test_an_adapter_alone_loads_on_a_whole_llava(adapter: Adapter, tmp_path: Path) -> None:
    """Where the projector was not trained further, there is no non_lora_trainables.bin."""
    folder = adapter.write(tmp_path / "llava-lora")
    (folder / "non_lora_trainables.bin").unlink()
    expected = adapter.merged() | {name: adapter.weights[name] for name in adapter.projector}
    assert_close(state_of(load(folder, adapter.full)[1]), expected)


def test_a_rank_beyond_the_file_takes_no_memory(adapter: Adapter, tmp_path: Path) -> None:
    """A rank of 65536 on a 7B model would be 480 GB of random numbers."""
    message = refusal(adapter.write_lora(adapter.write(tmp_path / "llava-lora"), r=2**16), adapter.base)
    assert "llava-lora" in message
    assert "lora_A" in message
    assert "r is 1000000000, not an integer" in refusal(
        adapter.write_lora(tmp_path / "llava-lora", r=10**9), adapter.base
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["adapter", "projector"])
def test_additions_that_are_not_finite_are_named(where: str, value: float, adapter: Adapter, tmp_path: Path) -> None:
    folder = adapter.write(tmp_path / "lora")
    if where == "adapter":
        name = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"
        adapter.write_lora(folder, lambda state: state.update({name: torch.full_like(state[name], value)}))
        named = "model.layers.1.mlp.up_proj.weight"
    else:
        named = "model.mm_projector.2.bias"
        torch.save(adapter.projector | {named: torch.full((64,), value)}, folder / "non_lora_trainables.bin")
    message = refusal(folder, adapter.base)
    assert "NaN or infinite" in message
    assert named in message


def drop_one(state: dict[str, Tensor]) -> None:
    state.pop("base_model.model.model.layers.1.mlp.up_proj.lora_B.weight")


def add_layer(state: dict[str, Tensor]) -> None:
    state["base_model.model.model.layers.39.mlp.up_proj.lora_B.weight"] = torch.zeros(128, 4)


def reshape_one(state: dict[str, Tensor]) -> None:
    state["base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"] = torch.zeros(99, 4)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (drop_one, "layers.1.mlp.up_proj.lora_B"),
        (add_layer, "layers.39.mlp.up_proj.lora_B"),
        (reshape_one, "layers.1.mlp.up_proj.lora_B"),
    ],
)
def test_adapters_that_do_not_fit_are_named(change: Any, named: str, adapter: Adapter, tmp_path: Path) -> None:
    """PEFT only warns of missing tensors and passes over superfluous ones: a LoRA on the wrong base would load."""
    assert named in refusal(adapter.write_lora(adapter.write(tmp_path / "lora"), change), adapter.base)


@pytest.mark.parametrize("fault", ["no weights", "truncated", "config"])
def test_damaged_adapters_are_refused(fault: str, adapter: Adapter, tmp_path: Path) -> None:
    folder = adapter.write(tmp_path / "llava-lora")
    file = folder / "adapter_model.safetensors"
    if fault == "no weights":
        file.unlink()
    elif fault == "truncated":
        file.write_bytes(file.read_bytes()[:4000])
    else:
        (folder / "adapter_config.json").write_text("{")
    assert "llava-lora" in refusal(folder, adapter.base)


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "projector"])
def test_an_addition_without_its_base_asks_for_it(lora: bool, adapter: Adapter, tmp_path: Path) -> None:
    folder = adapter.write(tmp_path / "llava-part", lora=lora)
    for file in ("tokenizer.model", "tokenizer_config.json"):  # some have their own
        shutil.copy(adapter.base / file, folder)
    assert "model_base" in refusal(folder)


def test_a_projector_file_beside_whole_weights_changes_nothing(tmp_path: Path) -> None:
    """liuhaotian/llava-v1.5-7b carries one; the weights proper hold the same projector, trained further."""
    folder = write_miniature(tmp_path, "v1.5")
    expected = read_weights(folder) | clip_weights(folder / "clip")
    torch.save({"model.mm_projector.0.weight": torch.zeros(64, 32)}, folder / "mm_projector.bin")
    assert_same(state_of(load(folder)[1]), expected)


def test_a_base_for_a_whole_checkpoint_is_refused(adapter: Adapter) -> None:
    assert "model_base" in refusal(adapter.full, adapter.base)


@pytest.mark.parametrize("base", ["missing", "empty"])
def test_a_missing_base_is_named(base: str, adapter: Adapter, tmp_path: Path) -> None:
    folder = adapter.write(tmp_path / "lora")
    if base == "empty":
        (tmp_path / "vicuna").mkdir()
    assert str(tmp_path / "vicuna") in refusal(folder, tmp_path / "vicuna")


# ----------------------------------------------------------------------------------------------- optional packages


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Make a package look as if it were not installed."""

    real = importlib.util.find_spec

    def hide(package: str) -> None:
        def fake(name: str, *rest: Any) -> Any:
            return None if name == package else real(name, *rest)

        monkeypatch.setattr(importlib.util, "find_spec", fake)
        for module in [module for name, module in sys.modules.items() if name.startswith("llava.")]:
            if vars(module).get("find_spec") is real:
                monkeypatch.setattr(module, "find_spec", fake)

    return hide


@pytest.mark.parametrize(
    ("package", "options", "remedy"),
    [
        ("bitsandbytes", {"load_8bit": True}, "globalcom2[quant]"),
        ("bitsandbytes", {"load_4bit": True}, "globalcom2[quant]"),
        ("flash_attn", {"use_flash_attn": True}, "flash-attn"),
    ],
    ids=str,
)
@pytest.mark.parametrize("version", ["v1.5", "v1.6-vicuna"])
def test_missing_packages_are_named(
    version: str, package: str, options: dict[str, Any], remedy: str, checkpoint: Any, without: Callable[[str], None]
) -> None:
    without(package)
    message = refusal(checkpoint(version), **options)
    assert package in message
    assert f"pip install '{remedy}'" in message or f"pip install {remedy}" in message


def test_a_missing_peft_is_named(adapter: Adapter, tmp_path: Path, without: Callable[[str], None]) -> None:
    without("peft")
    message = refusal(adapter.write(tmp_path / "lora"), adapter.base)
    assert "peft" in message
    assert "pip install 'globalcom2[lora]'" in message


def test_a_projector_needs_no_peft(adapter: Adapter, tmp_path: Path, without: Callable[[str], None]) -> None:
    without("peft")
    _, model, _, _ = load(adapter.write(tmp_path / "projector", lora=False), adapter.base, dtype=torch.float32)
    assert_same(state_of(model), adapter.weights | adapter.projector)
