"""The call sequences of lmms-eval, VLMEvalKit and the scripts written for LLaVA run against this package.

The harnesses themselves are not installed: what they import, which keywords they pass and what they do with the result
is written down here, so that a change which would break them shows.
"""

import argparse
import copy
import json
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from llava.compress.trace import Trace
from llava.constants import DEFAULT_IMAGE_TOKEN, IGNORE_INDEX, IMAGE_TOKEN_INDEX, InputError
from llava.conversation import SeparatorStyle, conv_templates
from llava.mm_utils import (
    KeywordsStoppingCriteria,
    get_model_name_from_path,
    process_images,
    tokenizer_image_token,
)
from llava.model.builder import load_pretrained_model
from llava.model.miniature import SIDE, TILE
from tests.conftest import picture

Load = Callable[..., Any]

# --- names ---

NAMES = {
    "llava.constants": [
        "IGNORE_INDEX", "IMAGE_TOKEN_INDEX", "DEFAULT_IMAGE_TOKEN", "DEFAULT_IMAGE_PATCH_TOKEN",
        "DEFAULT_IM_START_TOKEN", "DEFAULT_IM_END_TOKEN", "IMAGE_PLACEHOLDER",
    ],
    "llava.conversation": ["conv_templates", "SeparatorStyle", "Conversation", "default_conversation"],
    "llava.mm_utils": [
        "get_model_name_from_path", "process_images", "tokenizer_image_token", "KeywordsStoppingCriteria",
        "select_best_resolution", "resize_and_pad_image", "divide_to_patches", "get_anyres_image_grid_shape",
        "process_anyres_image", "load_image_from_base64", "expand2square",
    ],
    "llava.model.builder": ["load_pretrained_model"],
    "llava.model": ["LlavaLlamaForCausalLM", "LlavaConfig", "LlavaMistralForCausalLM", "LlavaMistralConfig"],
    "llava.model.llava_arch": [
        "LlavaMetaModel", "LlavaMetaForCausalLM", "retention_ratio", "generate_scale_for_crop_features",
        "interpolate_and_split_cls_attn_scores",
    ],
    "llava.model.multimodal_encoder.builder": ["build_vision_tower"],
    "llava.model.multimodal_encoder.clip_encoder": ["CLIPVisionTower"],
    "llava.model.multimodal_projector.builder": ["build_vision_projector"],
    "llava.utils": ["disable_torch_init"],
    "llava": ["LlavaLlamaForCausalLM"],
}  # fmt: skip


@pytest.mark.parametrize(("module", "name"), [(module, name) for module, names in NAMES.items() for name in names])
def test_names_that_others_import(module: str, name: str) -> None:
    scope: dict[str, Any] = {}
    exec(f"from {module} import {name}", scope)
    assert scope[name] is not None


def test_the_package_has_a_path() -> None:
    # VLMEvalKit looks at it to tell which llava is installed.
    assert Path(next(iter(import_module("llava").__path__)), "model").is_dir()


def test_disable_torch_init(monkeypatch: pytest.MonkeyPatch) -> None:
    for layer in (torch.nn.Linear, torch.nn.LayerNorm):
        monkeypatch.setattr(layer, "reset_parameters", layer.reset_parameters)  # put back afterwards
    draws = torch.get_rng_state()
    torch.nn.Linear(2, 2)
    assert not torch.equal(torch.get_rng_state(), draws)
    import_module("llava.utils").disable_torch_init()
    draws = torch.get_rng_state()
    linear, norm = torch.nn.Linear(2, 2), torch.nn.LayerNorm(2)
    assert torch.equal(torch.get_rng_state(), draws)
    for layer in (linear, norm):
        layer.weight.data.fill_(7)
        layer.reset_parameters()
        assert (layer.weight == 7).all()


# --- helpers that do what the harnesses do ---


def lmms_load(path: Path, **kwargs: Any) -> Any:
    """lmms-eval's way to load: everything beyond the first three by keyword, `multimodal` among it."""
    name = get_model_name_from_path(str(path))
    settings = {"device_map": "auto", "multimodal": True, "attn_implementation": "sdpa", **kwargs}
    return load_pretrained_model(str(path), None, name, **settings)


def half(images: Any) -> Any:
    """Images are cast to float16 whatever the model is; a list stays a list."""
    if isinstance(images, list):
        return [image.to(dtype=torch.float16, device="cpu") for image in images]
    return images.to(dtype=torch.float16, device="cpu")


def question(text: str, images: int, template: str = "vicuna_v1") -> Any:
    conversation = copy.deepcopy(conv_templates[template])
    content = " ".join([DEFAULT_IMAGE_TOKEN] * images) + "\n" + text if images else text
    conversation.append_message(conversation.roles[0], content)
    conversation.append_message(conversation.roles[1], None)
    return conversation


def to_ids(prompt: str, tokenizer: Any) -> Tensor:
    ids = tokenizer_image_token(prompt, tokenizer, IMAGE_TOKEN_INDEX, return_tensors="pt")
    assert isinstance(ids, Tensor)
    return ids


def lmms_generate(loaded: Any, asks: list[tuple[str, list[Image.Image]]], **settings: Any) -> list[str]:
    """lmms-eval's `generate_until`: one batch, padded as the tokenizer says, decoded whole."""
    tokenizer, model, processor, _ = loaded
    pictures = [image for _, images in asks for image in images]
    views = half(process_images(pictures, processor, model.config)) if pictures else None
    rows = [to_ids(question(text, len(images)).get_prompt(), tokenizer) for text, images in asks]
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    left = tokenizer.padding_side == "left"
    ids = torch.nn.utils.rnn.pad_sequence([row.flip(0) if left else row for row in rows], True, pad)
    ids = ids.flip(1) if left else ids
    output = model.generate(
        ids,
        attention_mask=ids.ne(pad),
        pad_token_id=pad,
        images=views,
        image_sizes=[image.size for image in pictures],
        do_sample=False,
        temperature=0,
        top_p=None,
        num_beams=1,
        max_new_tokens=8,
        use_cache=True,
        **settings,
    )
    return [text.strip() for text in tokenizer.batch_decode(output, skip_special_tokens=True)]


@pytest.fixture(scope="module")
def lmms(checkpoint: Callable[..., Path]) -> Any:
    return lmms_load(checkpoint("v1.6-vicuna"))


ASKS = [
    ("what is shown?", [picture(300, 200)]),
    ("describe the colour of the dog and the cat", [picture(90, 400), picture(120, 60)]),
    ("is 7 more than 3?", []),
    ("left or right", [picture(80, 60)]),
]


# --- lmms-eval ---


@pytest.mark.parametrize("version", ["v1.5", "v1.6-vicuna", "v1.6-mistral"])
def test_lmms_eval_loads(checkpoint: Callable[..., Path], version: str) -> None:
    tokenizer, model, processor, max_length = lmms_load(checkpoint(version))
    assert max_length == 2048
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.eval()
    model.tie_weights()
    model.to("cpu")
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not model.training
    assert model.device == torch.device("cpu")
    assert model.config.image_aspect_ratio == ("pad" if version == "v1.5" else "anyres")
    assert tokenizer.padding_side in ("left", "right")
    assert tokenizer.decode(tokenizer.encode("yes")[1:]) == "yes"
    assert tokenizer.eos_token_id == 2
    assert processor.crop_size["height"] == TILE


PLACES = [
    {"device_map": "cpu"},
    {"device_map": "auto", "device": "cpu"},
    {"device_map": "cpu", "device": "cpu"},
    {"device_map": {"": "cpu"}},
    {"device_map": None, "device": "cpu"},
]


@pytest.mark.parametrize("place", PLACES, ids=str)
def test_places_to_load_to(checkpoint: Callable[..., Path], lmms: Any, place: dict[str, Any]) -> None:
    loaded = lmms_load(checkpoint("v1.6-vicuna"), **place, dtype="float32")
    model = loaded[1]
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert lmms_generate(loaded, ASKS[:1]) == lmms_generate(lmms, ASKS[:1])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_the_attention_asked_for_reaches_model_and_tower(
    checkpoint: Callable[..., Path], lmms: Any, attention: str
) -> None:
    model = lmms_load(checkpoint("v1.6-vicuna"), attn_implementation=attention)[1]
    assert model.config._attn_implementation == attention
    assert model.get_vision_tower().config._attn_implementation == attention
    pixels = process_images([picture(300, 200)], lmms[2], model.config)
    given = {"input_ids": torch.tensor([[1, IMAGE_TOKEN_INDEX, 9]]), "images": pixels, "image_sizes": [(300, 200)]}
    torch.testing.assert_close(model(**given).logits, lmms[1](**given).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("side", ["right", "left"])
def test_lmms_eval_generates(lmms: Any, monkeypatch: pytest.MonkeyPatch, side: str) -> None:
    """Answers hold new tokens only, and do not depend on the batch nor on the side the harness pads."""
    monkeypatch.setattr(lmms[0], "padding_side", side)
    answers = lmms_generate(lmms, ASKS)
    assert answers == [lmms_generate(lmms, [ask])[0] for ask in ASKS]
    assert len(set(answers)) == len(answers)
    assert not any("ASSISTANT" in answer for answer in answers)


def test_lmms_eval_passes_sizes_without_images(lmms: Any) -> None:
    # A question without a picture comes with `images=None` and an empty list of sizes.
    trace = Trace()
    lmms_generate(lmms, ASKS[2:3], trace=trace)
    assert trace.images == []


def test_images_of_different_grids_stay_a_list_of_half_tensors(lmms: Any) -> None:
    views = half(process_images([picture(300, 200), picture(90, 400)], lmms[2], lmms[1].config))
    assert isinstance(views, list)
    assert [tuple(v.shape) for v in views] == [(5, 3, TILE, TILE), (4, 3, TILE, TILE)]
    same = half(process_images([picture(300, 200), picture(250, 250)], lmms[2], lmms[1].config))
    assert same.shape == (2, 5, 3, TILE, TILE)


@torch.no_grad()
def test_lmms_eval_scores_continuations(lmms: Any) -> None:
    """`loglikelihood`: labels hide the context, the loss is the mean over the continuation, whatever was compressed."""
    tokenizer, model, processor, _ = lmms
    image, continuation = picture(300, 200), "the cat is left"
    pixels = half(process_images([image], processor, model.config))
    conversation = question("what is shown?", 1)
    context = to_ids(conversation.get_prompt(), tokenizer)[None]
    conversation.messages[1][1] = continuation
    ids = to_ids(conversation.get_prompt(), tokenizer)[None]
    labels = ids.clone()
    labels[0, : context.shape[1]] = IGNORE_INDEX
    outputs = model(input_ids=ids, labels=labels, images=pixels, use_cache=True, image_sizes=[image.size])
    n = ids.shape[1] - context.shape[1]
    assert n > 3
    expected = F.cross_entropy(outputs["logits"][0, -n - 1 : -1], ids[0, -n:])
    torch.testing.assert_close(outputs["loss"], expected, atol=1e-5, rtol=1e-5)
    assert outputs["logits"].shape[1] < ids.shape[1] - 1 + (1 + 4) * SIDE**2  # fewer than uncompressed
    assert outputs["logits"].argmax(dim=-1).ndim == 2


@torch.no_grad()
def test_lmms_eval_scores_continuations_without_an_image(lmms: Any) -> None:
    ids = to_ids(question("is 7 more than 3?", 0).get_prompt() + " yes", lmms[0])[None]
    outputs = lmms[1](input_ids=ids, labels=ids.clone(), images=None, use_cache=True, image_sizes=[])
    expected = F.cross_entropy(outputs["logits"][0, :-1], ids[0, 1:])
    torch.testing.assert_close(outputs["loss"], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("as_folder", [False, True])
@pytest.mark.parametrize(
    ("custom", "method"),
    [
        ({"retention_ratio": 0.5}, "globalcom2(retention_ratio=0.5)"),
        ({"method": "none"}, "none()"),
        (
            {"method": "globalcom2", "profile": "paper", "retention_ratio": 0.75},
            "globalcom2(retention_ratio=0.75, profile='paper')",
        ),
        ({"method": "globalcom2(temperature=5.0)", "retention_ratio": 0.1},
         "globalcom2(retention_ratio=0.1, temperature=5.0)"),
    ],
)  # fmt: skip
def test_customized_config_is_the_channel_of_the_ratio(
    checkpoint: Callable[..., Path], tmp_path: Path, custom: dict[str, Any], method: str, as_folder: bool
) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(custom))
    loaded = lmms_load(checkpoint("v1.6-vicuna"), customized_config=str(tmp_path if as_folder else file))
    assert str(loaded[1].method) == method
    trace = Trace()
    lmms_generate(loaded, ASKS[:1], trace=trace)
    (image,) = trace.ledger()["images"]
    assert image["requested_ratio"] == custom.get("retention_ratio", 1.0)
    assert abs(image["kept_ratio"] - image["requested_ratio"]) < 0.05


def test_customized_config_changes_other_keys_too(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    file = tmp_path / "pad.json"
    file.write_text(json.dumps({"image_aspect_ratio": "pad"}))
    model = lmms_load(checkpoint("v1.6-vicuna"), customized_config=str(file))[1]
    assert model.config.image_aspect_ratio == "pad"
    assert model.config.mm_patch_merge_type == "spatial_unpad"


@pytest.mark.parametrize(
    ("content", "match"),
    [('{"retention_ratio": 1.5}', r"1\.5"), ('{"method": "nosuch"}', "nosuch"), ("{", "custom.json"), (None, "custom")],
)
def test_a_bad_customized_config_is_named(
    checkpoint: Callable[..., Path], tmp_path: Path, content: str | None, match: str
) -> None:
    file = tmp_path / "custom.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(InputError, match=match):
        lmms_load(checkpoint("v1.6-vicuna"), customized_config=str(file))


def test_the_environment_is_the_other_channel(lmms: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAVA_RETENTION_RATIO", "0.5")
    trace = Trace()
    lmms_generate(lmms, ASKS[:1], trace=trace)
    assert trace.ledger()["images"][0]["requested_ratio"] == 0.5


def test_conversations_are_copied_not_shared() -> None:
    before = {name: template.get_prompt() for name, template in conv_templates.items()}
    for template in conv_templates.values():
        for own in (template.copy(), copy.deepcopy(template)):
            own.append_message(own.roles[0], "what?")
            own.append_message(own.roles[1], None)
            own.messages[1][1] = "this"
            assert "what?" in own.get_prompt()
            assert "this" in own.get_prompt()
    assert {name: template.get_prompt() for name, template in conv_templates.items()} == before
    assert all(template.messages == [] for template in conv_templates.values())


# --- VLMEvalKit ---


@pytest.fixture(scope="module")
def vlmeval(checkpoint: Callable[..., Path]) -> Any:
    path = str(checkpoint("v1.6-vicuna"))
    loaded = load_pretrained_model(
        model_path=path, model_base=None, model_name=get_model_name_from_path(path), device_map="cpu"
    )
    return loaded


def vlmeval_generate(loaded: Any, text: str, images: list[Image.Image], **settings: Any) -> Tensor:
    """VLMEvalKit's LLaVA: pads to squares with a bare namespace as config, sends no sizes."""
    tokenizer, model, processor, _ = loaded
    args = argparse.Namespace(image_aspect_ratio="pad")
    views = None
    if images:
        views = process_images(images, processor, args)
        assert isinstance(views, Tensor)
        views = views.to("cpu", dtype=torch.float16)
    prompt = f"USER: {' <image> ' * len(images)}{text}\nASSISTANT: "
    ids = to_ids(prompt, tokenizer).unsqueeze(0)
    return model.generate(
        ids,
        images=views,
        stopping_criteria=[KeywordsStoppingCriteria(["</s>"], tokenizer, ids)],
        do_sample=False,
        temperature=0,
        max_new_tokens=8,
        top_p=None,
        num_beams=1,
        use_cache=True,
        **settings,
    )


@pytest.mark.parametrize("images", [0, 1, 3])
def test_vlmevalkit_generates(vlmeval: Any, images: int) -> None:
    trace, sizes = Trace(), [(300, 200), (90, 400), (50, 50)][:images]
    output = vlmeval_generate(vlmeval, "what is shown?", [picture(*size) for size in sizes], trace=trace)
    assert output.shape[0] == 1
    assert 1 <= output.shape[1] <= 8
    answer = vlmeval[0].batch_decode(output, skip_special_tokens=True)[0].strip()
    assert "USER" not in answer
    # Single views by a 4-D tensor: no AnyRes, no newline, the thumbnail rule.
    assert [len(image.packed.origin) for image in trace.images] == [SIDE**2 // 4] * images


def test_vlmevalkit_squares_are_a_tensor_whatever_the_sizes(vlmeval: Any) -> None:
    pictures = [picture(300, 200), picture(90, 400), picture(40, 40)]
    views = process_images(pictures, vlmeval[2], argparse.Namespace(image_aspect_ratio="pad"))
    assert isinstance(views, Tensor)
    assert views.shape == (3, 3, TILE, TILE)


def test_several_views_without_sizes_are_refused(vlmeval: Any) -> None:
    views = process_images([picture(300, 200)], vlmeval[2], vlmeval[1].config)
    with pytest.raises(InputError, match="image_sizes"):
        vlmeval[1].generate(torch.tensor([[1, IMAGE_TOKEN_INDEX, 9]]), images=views, max_new_tokens=2)


def test_vlmevalkits_llava_next_variant(checkpoint: Callable[..., Path]) -> None:
    """Loads with `device_map=None`, reads separators off a copied template, preprocesses images one by one."""
    path = str(checkpoint("v1.6-mistral"))
    tokenizer, model, processor, _ = load_pretrained_model(path, None, "llava_mistral", device_map=None)
    model.eval()
    model.tie_weights()
    conversation = question("describe", 2, "mistral_instruct")
    stop = conversation.sep if conversation.sep_style != SeparatorStyle.TWO else conversation.sep2
    ids = to_ids(conversation.get_prompt(), tokenizer).unsqueeze(0)
    pictures = [picture(300, 200), picture(90, 400)]
    views = torch.stack([processor.preprocess(p, return_tensors="pt")["pixel_values"][0].half() for p in pictures])
    output = model.generate(
        ids,
        images=views,
        do_sample=False,
        temperature=0,
        max_new_tokens=8,
        stopping_criteria=[KeywordsStoppingCriteria([stop or "</s>"], tokenizer, ids)],
    )
    assert output.shape[0] == 1
    assert isinstance(tokenizer.batch_decode(output, skip_special_tokens=True)[0], str)


def test_an_empty_keyword_stops_nothing(vlmeval: Any) -> None:
    # `mistral_instruct` has the empty string as separator; callers pass it on, and every text contains it.
    tokenizer, model = vlmeval[:2]
    ids = to_ids("USER: yes", tokenizer).unsqueeze(0)
    criteria = KeywordsStoppingCriteria([conv_templates["mistral_instruct"].sep], tokenizer, ids)
    n = ids.shape[1] + 10  # the decoded tail is looked at once the output is longer than the prompt
    output = model.generate(ids, max_new_tokens=n, min_new_tokens=n, stopping_criteria=[criteria])
    assert output.shape == (1, n)


# --- scripts and other forks ---


def test_the_modules_that_patches_walk(vlmeval: Any) -> None:
    model = vlmeval[1]
    tower = model.get_vision_tower()
    assert model.get_model().get_vision_tower() is tower is model.model.vision_tower
    assert tower.is_loaded
    assert len(tower.vision_tower.encoder.layers) == 4
    assert tower(torch.zeros(2, 3, TILE, TILE)).shape == (2, SIDE**2, tower.hidden_size)
    assert tower(torch.zeros(2, 3, TILE, TILE).half()).dtype == torch.float16  # features in the dtype of the images
    assert [f.shape for f in tower([torch.zeros(3, TILE, TILE)])] == [(1, SIDE**2, tower.hidden_size)]
    assert tower.num_patches == SIDE**2 == tower.num_patches_per_side**2
    assert tower.dummy_feature.shape == (1, tower.hidden_size)
    assert tower.select_layer == -2
    assert tower.select_feature == "patch"
    assert (tower.dtype, tower.device) == (torch.float32, torch.device("cpu"))
    assert model.encode_images(torch.zeros(2, 3, TILE, TILE)).shape == (2, SIDE**2, 64)
    assert model.model.embed_tokens.weight.shape == (384, 64)
    assert model.model.image_newline.shape == (64,)


def test_the_quick_start_of_llavas_readme(
    checkpoint: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`eval_model` takes any object with these attributes and prints the answer."""
    picture(300, 200).save(tmp_path / "a.png")
    path = str(checkpoint("v1.6-vicuna"))
    attributes = {
        "model_path": path,
        "model_base": None,
        "model_name": get_model_name_from_path(path),
        "query": "what is shown?",
        "conv_mode": None,
        "image_file": str(tmp_path / "a.png"),
        "sep": ",",
        "temperature": 0,
        "top_p": None,
        "num_beams": 1,
        "max_new_tokens": 8,
    }
    import_module("llava.eval.run_llava").eval_model(type("Args", (), attributes)())
    assert capsys.readouterr().out.strip()
