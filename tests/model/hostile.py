"""Ways in which the files of a checkpoint can be wrong: seeded, for the fuzz of the loading path."""

import json
import os
import random
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from llava.model.miniature import write_miniature
from tests.model.test_miniature import read_weights

Fault = Callable[[Path], Any]
"""Spoils a checkpoint's folder."""

VALUES: list[Any] = [
    None,
    True,
    "x",
    "",
    -1,
    0,
    1,
    2,
    3,
    0.5,
    10**6,
    10**9,
    2**63,
    10**400,
    1e308,
    -1e308,
    [],
    {},
    [[]],
]
VALUES += [
    [1, 2],
    ["x"],
    {"x": 1},
    {"rope_type": "dynamic", "factor": 0},
    "\udc80",
    "é" * 9,
    float("nan"),
    float("inf"),
]
VALUES += ["0x" + "f" * 200_000, "9" * 5000, [[336, 672]] * 3, [[0, 0]], [[10**9, 84]], "[" * 3000]

SETTINGS = {
    "config.json": (
        "method retention_ratio profile s2 mm_vision_config max_sequence_length rope_parameters quantization_config "
        "head_dim attention_bias mlp_bias attention_dropout output_attentions output_hidden_states return_dict "
        "num_labels id2label per_layer_config is_encoder_decoder chunk_size_feed_forward attn_implementation to_dict "
        "_attn_implementation attribute_map base_model_tp_plan auto_map image_token_index text_config vision_config "
        "layer_types partial_rotary_factor tie_encoder_decoder name_or_path torchscript"
    ).split(),
    "generation_config.json": (
        "do_sample num_beams top_k max_new_tokens min_length min_new_tokens early_stopping max_time stop_strings use_cache "
        "cache_implementation min_p typical_p repetition_penalty length_penalty no_repeat_ngram_size bad_words_ids "
        "suppress_tokens guidance_scale num_return_sequences output_scores return_dict_in_generate penalty_alpha "
        "watermarking_config forced_eos_token_id sequence_bias dola_layers constraints prompt_lookup_num_tokens "
        "custom_generate compile_config exponential_decay_length_penalty num_beam_groups assistant_early_exit"
    ).split(),
    "tokenizer_config.json": (
        "additional_special_tokens added_tokens_decoder chat_template sp_model_kwargs use_default_system_prompt name_or_path "
        "tokenizer_file vocab_file extra_special_tokens auto_map clean_up_tokenization_spaces backend split_special_tokens"
    ).split(),
    "clip/config.json": "vision_config num_channels hidden_act layer_norm_eps attention_dropout".split(),
    "clip/preprocessor_config.json": ["rescale_factor", "do_rescale", "image_processor_type"],
}
FILES = [*SETTINGS, "tokenizer.model", "model.safetensors.index.json", "model-00001-of-00002.safetensors"]
BESIDE = ["model.safetensors", "tokenizer.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"]
BESIDE += ["adapter_config.json", "pytorch_model.bin", "clip/pytorch_model.bin", "processor_config.json", "config_clip"]


def answer(folder: Path, base: Path | None = None, **options: Any) -> Any:
    """Load a checkpoint and give one short answer about a picture; returns the new ids."""
    from llava.mm_utils import process_images, tokenizer_image_token
    from llava.model.builder import load_pretrained_model
    from tests.conftest import picture

    tokenizer, model, processor, _ = load_pretrained_model(str(folder), base and str(base), device="cpu", **options)
    ids = tokenizer_image_token("USER: <image>\nWhat? ASSISTANT:", tokenizer, return_tensors="pt")[None]
    if processor is None:
        return model.generate(ids.abs(), max_new_tokens=2)
    image = picture(90, 60)
    images = process_images([image], processor, model.config)
    return model.generate(ids, images=images, image_sizes=[image.size], max_new_tokens=2)


def _keys(folder: Path, name: str) -> list[str]:
    return [*json.loads((folder / name).read_text()), *SETTINGS[name]]


def _set(name: str, key: str, value: Any) -> Fault:
    def spoil(folder: Path) -> None:
        file = folder / name
        file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))

    return spoil


def _drop(name: str, key: str) -> Fault:
    def spoil(folder: Path) -> None:
        file = folder / name
        file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != key}))

    return spoil


def settings(folder: Path) -> Iterator[tuple[str, Fault]]:
    """Every key of every settings file with every odd value, and without the key."""
    for name in SETTINGS:
        for key in dict.fromkeys(_keys(folder, name)):
            yield f"{name} without {key}", _drop(name, key)
            for value in VALUES:
                yield f"{name} {key}={ascii(value)[:40]}", _set(name, key, value)


def _put(name: str, content: bytes) -> Fault:
    return lambda folder: (folder / name).write_bytes(content)


def _cut(name: str, share: float) -> Fault:
    return lambda folder: (folder / name).write_bytes(
        (content := (folder / name).read_bytes())[: int(len(content) * share)]
    )


def _flip(name: str, seed: int) -> Fault:
    def spoil(folder: Path) -> None:
        rng, content = random.Random(seed), bytearray((folder / name).read_bytes())
        for _ in range(rng.choice((1, 3, 20))):
            content[min(int(rng.expovariate(1 / 200)), len(content) - 1)] = rng.randrange(256)
        (folder / name).write_bytes(content)

    return spoil


def _replace(name: str, make: Callable[[Path], Any]) -> Fault:
    def spoil(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        make(folder / name)

    return spoil


TEXTS = [
    b"",
    b"{",
    b"null",
    b"[1]",
    b"{}",
    b"\xff\xfe{\x00}\x00",
    b"\xef\xbb\xbf{}",
    b'{"a": "\xe9"}',
    b"\x00" * 64,
    b"[" * 10**5,
]
TEXTS += [
    b'{"a":' * 10**5,
    b'{"a": ' + b"9" * 5000 + b"}",
    b'{"a": NaN}',
    b'{"a": "\\ud800"}',
    b'"' + b"x" * 10**6 + b'"',
]
PLACES: dict[str, Callable[[Path], Any]] = {
    "missing": lambda file: None,
    "a pipe": os.mkfifo,
    "a folder": Path.mkdir,
    "a dangling link": lambda file: file.symlink_to("nowhere"),
    "a link to itself": lambda file: file.symlink_to(file.name),
    "a device": lambda file: file.symlink_to("/dev/zero"),
    "a socket's folder": lambda file: file.symlink_to("/proc/self"),
}


def files(folder: Path) -> Iterator[tuple[str, Fault]]:
    """Every file as something else, and with other content."""
    for name in (*FILES, *BESIDE):
        for what, make in PLACES.items():
            yield f"{name} is {what}", _replace(name, make)
        for text in TEXTS:
            yield f"{name} holds {ascii(text[:12])}", _put(name, text)
    for name in FILES:
        for share in (0.1, 0.5, 0.99):
            yield f"{name} ends at {share}", _cut(name, share)
        for seed in range(12):
            yield f"{name} damaged by {seed}", _flip(name, seed)


def _header(change: Callable[[dict[str, Any]], Any]) -> Fault:
    """Rewrite the header of a weight file, its data left as they are."""

    def spoil(folder: Path) -> None:
        file = folder / "model-00001-of-00002.safetensors"
        content = file.read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        header = json.loads(content[8 : 8 + length])
        change(header)
        text = json.dumps(header).encode()
        file.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])

    return spoil


def _weights(change: Callable[[dict[str, Any]], Any], name: str = "model.safetensors") -> Fault:
    def spoil(folder: Path) -> None:
        from tests.model.test_builder import put_weights

        state = read_weights(folder)
        change(state)
        put_weights(folder, state, name)

    return spoil


def _index(change: Callable[[dict[str, Any]], Any]) -> Fault:
    def spoil(folder: Path) -> None:
        file = folder / "model.safetensors.index.json"
        index = json.loads(file.read_text())
        change(index)
        file.write_text(json.dumps(index))

    return spoil


TENSORS = ["model.embed_tokens.weight", "model.layers.1.self_attn.q_proj.weight", "model.mm_projector.0.weight"]
TENSORS += ["model.vision_tower.vision_tower.vision_model.encoder.layers.3.self_attn.q_proj.bias", "lm_head.weight"]


def _fill(name: str, value: float) -> Callable[[dict[str, Any]], Any]:
    return lambda state: state[name].view(-1)[-1:].fill_(value)


def _cast(name: str, dtype: torch.dtype) -> Callable[[dict[str, Any]], Any]:
    return lambda state: state.update({name: state[name].to(dtype)})


def weights(folder: Path) -> Iterator[tuple[str, Fault]]:
    """Weight files whose headers, numbers or index are wrong."""
    name = TENSORS[0]
    for key, values in {
        "dtype": ["I64", "U8", "F64", "BOOL", "F8_E4M3", "X", 3, None],
        "shape": [[], [10**9, 64], [2**62, 4], [-1, 64], "x", [384.0, 64], [0]],
        "data_offsets": [[0, 0], [0, 2**63], [5, 1], [0], "x", [0, 4]],
    }.items():
        for value in values:
            yield f"header {key}={value}", _header(lambda h, key=key, value=value: h[name].update({key: value}))
    yield "header metadata missing", _header(lambda h: h.pop("__metadata__"))
    for value in ({}, {"format": "tf"}, {"format": "x"}, 3, {"format": 3}):
        yield f"header metadata={value}", _header(lambda h, value=value: h.update({"__metadata__": value}))
    for length in (0, 1, 8, 10**8 + 1, 10**9, 2**63, 2**64 - 1):
        bomb = struct.pack("<Q", length) + b"{" * 64
        yield f"header of {length}", _put("model-00001-of-00002.safetensors", bomb)
    for tensor in TENSORS:
        for value in (float("nan"), float("inf"), -float("inf")):
            yield f"{tensor} with {value}", _weights(_fill(tensor, value))
        for dtype in (torch.int32, torch.uint8, torch.bool, torch.complex64):
            for file in ("model.safetensors", "pytorch_model.bin"):
                if dtype != torch.complex64 or file.endswith("bin"):
                    yield f"{tensor} as {dtype} in {file}", _weights(_cast(tensor, dtype), file)
    for odd in ([1], 3, "x", {"a": [1]}, {"state_dict": {}}, {3: torch.zeros(3)}, {"a": "x"}, None, {}):
        yield (
            f"a .bin of {odd}",
            lambda folder, odd=odd: [
                *(old.unlink() for old in folder.glob("model*.safetensors*")),
                torch.save(odd, folder / "pytorch_model.bin"),
            ],
        )
    first = next(iter(json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]))
    out: list[Any] = ["../outside.safetensors", "/etc/passwd", "clip/model.safetensors", "", ".", "..", None, 3, [], {}]
    for where in (*out, "x" * 300, "a\0b", "missing.safetensors", "config.json", "model.safetensors.index.json"):
        yield f"index names {ascii(where)[:30]}", _index(lambda i, where=where: i["weight_map"].update({first: where}))
    for value in (None, [], {}, "x", 3, {"a": 3}):
        yield f"index map {value}", _index(lambda i, value=value: i.update({"weight_map": value}))
        yield f"index metadata {value}", _index(lambda i, value=value: i.update({"metadata": value}))
    yield "index without a map", _index(lambda i: i.pop("weight_map"))
    yield "index without metadata", _index(lambda i: i.pop("metadata"))


def faults(folder: Path, seed: int, each: int) -> list[tuple[str, Fault]]:
    """Draw faults of a checkpoint's copies: at most `each` of every kind."""
    rng = random.Random(seed)
    kinds = ([*settings(folder)], [*files(folder)], [*weights(folder)])
    return [fault for kind in kinds for fault in rng.sample(kind, min(each, len(kind)))]


def spoilt(source: Path, target: Path, fault: Fault) -> Path:
    """Copy a checkpoint and spoil the copy."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)
    fault(target)
    return target


__all__ = ["answer", "faults", "spoilt", "write_miniature"]
