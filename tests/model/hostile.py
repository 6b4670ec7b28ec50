"""Ways in which the files of a checkpoint can be wrong, and a seeded draw of them, for the fuzz of the loading path."""

import json
import os
import random
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

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

# Keys that are read from each file where they are there, beside those that the miniature has.
MORE_KEYS = {
    "config.json": """
        method retention_ratio profile s2 mm_vision_config max_sequence_length rope_parameters quantization_config
        head_dim attention_bias mlp_bias attention_dropout output_attentions output_hidden_states return_dict num_labels
        id2label per_layer_config is_encoder_decoder chunk_size_feed_forward attn_implementation to_dict text_config
        _attn_implementation attribute_map base_model_tp_plan auto_map image_token_index vision_config layer_types
        partial_rotary_factor name_or_path torchscript transformers_weights""",
    "generation_config.json": """
        do_sample num_beams top_k max_new_tokens min_length min_new_tokens early_stopping max_time stop_strings min_p
        use_cache cache_implementation typical_p repetition_penalty length_penalty no_repeat_ngram_size bad_words_ids
        suppress_tokens guidance_scale num_return_sequences output_scores return_dict_in_generate penalty_alpha
        watermarking_config forced_eos_token_id sequence_bias dola_layers constraints prompt_lookup_num_tokens
        custom_generate compile_config exponential_decay_length_penalty num_beam_groups assistant_early_exit""",
    "tokenizer_config.json": """
        additional_special_tokens added_tokens_decoder chat_template sp_model_kwargs use_default_system_prompt backend
        name_or_path tokenizer_file vocab_file extra_special_tokens auto_map clean_up_tokenization_spaces
        split_special_tokens""",
    "clip/config.json": "vision_config num_channels hidden_act layer_norm_eps attention_dropout",
    "clip/preprocessor_config.json": "rescale_factor do_rescale image_processor_type",
}
SHARD, INDEX = "model-00001-of-00002.safetensors", "model.safetensors.index.json"
FILES = [*MORE_KEYS, "tokenizer.model", INDEX, SHARD, "clip/model.safetensors"]
BESIDE = ["model.safetensors", "tokenizer.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"]
BESIDE += ["adapter_config.json", "pytorch_model.bin", "clip/pytorch_model.bin", "clip/model.safetensors.index.json"]


def answer(folder: Path) -> torch.Tensor:
    """Load a checkpoint and give one short answer about a picture; returns the new ids."""
    from llava.mm_utils import process_images, tokenizer_image_token
    from llava.model.builder import load_pretrained_model
    from tests.conftest import picture

    tokenizer, model, processor, _ = load_pretrained_model(str(folder), device="cpu")
    ids = tokenizer_image_token("USER: <image>\nWhat? ASSISTANT:", tokenizer, return_tensors="pt")[None]
    image = picture(90, 60)
    images = process_images([image], processor, model.config)
    return model.generate(ids, images=images, image_sizes=[image.size], max_new_tokens=2)


def spoilt(source: Path, target: Path, fault: Fault) -> Path:
    """Copy a checkpoint and spoil the copy."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)
    fault(target)
    return target


def faults(folder: Path, seed: int, each: int) -> list[tuple[str, Fault]]:
    """Draw faults of a checkpoint's copies: at most `each` of every kind."""
    rng = random.Random(seed)
    kinds = ([*settings(folder)], [*files()], [*headers()], [*indices(folder)], [*tensors(folder)])
    return [fault for kind in kinds for fault in rng.sample(kind, min(each, len(kind)))]


def settings(folder: Path) -> Iterator[tuple[str, Fault]]:
    """Every key of every settings file with every odd value, and without the key."""
    for name, more in MORE_KEYS.items():
        for key in dict.fromkeys([*json.loads((folder / name).read_text()), *more.split()]):
            yield f"{name} without {key}", _json(name, lambda found, key=key: found.pop(key, None))
            for value in VALUES:
                change = _json(name, lambda found, key=key, value=value: found.update({key: value}))
                yield f"{name} {key}={ascii(value)[:40]}", change


def _json(name: str, change: Callable[[dict[str, Any]], Any]) -> Fault:
    def spoil(folder: Path) -> None:
        found = json.loads((folder / name).read_text())
        change(found)
        (folder / name).write_text(json.dumps(found))

    return spoil


# ---------------------------------------------------------------------------------------------------------- whole files

TEXTS = [b"", b"{", b"null", b"[1]", b"{}", b"\xff\xfe{\x00}\x00", b"\xef\xbb\xbf{}", b'{"a": "\xe9"}', b"\x00" * 64]
TEXTS += [b"[" * 10**5, b'{"a":' * 10**5, b'{"a": ' + b"9" * 5000 + b"}", b'{"a": NaN}', b'{"a": "\\ud800"}']
TEXTS += [b'"' + b"x" * 10**6 + b'"', b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 499723\n"]
PLACES: dict[str, Callable[[Path], Any]] = {
    "missing": lambda file: None,
    "a pipe": os.mkfifo,
    "a folder": Path.mkdir,
    "a dangling link": lambda file: file.symlink_to("nowhere"),
    "a link to itself": lambda file: file.symlink_to(file.name),
    "a device": lambda file: file.symlink_to("/dev/zero"),
}


def files() -> Iterator[tuple[str, Fault]]:
    """Every file as something else, and with other content."""
    for name in (*FILES, *BESIDE):
        for what, make in PLACES.items():
            yield f"{name} is {what}", _replace(name, make)
        for text in TEXTS:
            yield (
                f"{name} holds {text[:12]!a}",
                lambda folder, name=name, text=text: (folder / name).write_bytes(text),
            )
    for name in FILES:
        for share in (0.1, 0.5, 0.99):
            yield f"{name} ends at {share}", _cut(name, share)
        for seed in range(12):
            yield f"{name} damaged by {seed}", _flip(name, seed)


def _replace(name: str, make: Callable[[Path], Any]) -> Fault:
    def spoil(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        make(folder / name)

    return spoil


def _cut(name: str, share: float) -> Fault:
    def spoil(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(len(content) * share)])

    return spoil


def _flip(name: str, seed: int) -> Fault:
    """Change some bytes, most of them near the start, where headers are."""

    def spoil(folder: Path) -> None:
        rng, content = random.Random(seed), bytearray((folder / name).read_bytes())
        for _ in range(rng.choice((1, 3, 20))):
            content[min(int(rng.expovariate(1 / 200)), len(content) - 1)] = rng.randrange(256)
        (folder / name).write_bytes(content)

    return spoil


# ------------------------------------------------------------------------------------------------------------- weights

HEADERS = {
    "dtype": ["I64", "U8", "F64", "BOOL", "F8_E4M3", "X", 3, None],
    "shape": [[], [10**9, 64], [2**62, 4], [-1, 64], "x", [384.0, 64], [0]],
    "data_offsets": [[0, 0], [0, 2**63], [5, 1], [0], "x", [0, 4]],
}
TENSORS = ["model.embed_tokens.weight", "model.layers.1.self_attn.q_proj.weight", "model.mm_projector.0.weight"]
TENSORS += ["lm_head.weight", "model.vision_tower.vision_tower.vision_model.encoder.layers.3.self_attn.q_proj.bias"]


def headers() -> Iterator[tuple[str, Fault]]:
    """A weight file whose header says what its data are not."""
    for key, values in HEADERS.items():
        for value in values:
            yield f"header {key}={value}", _header(lambda h, key=key, value=value: h[TENSORS[0]].update({key: value}))
    for value in ({}, {"format": "tf"}, {"format": "x"}, 3, {"format": 3}):
        yield f"header metadata={value}", _header(lambda h, value=value: h.update({"__metadata__": value}))
    for length in (0, 1, 8, 10**8 + 1, 10**9, 2**63, 2**64 - 1):
        bomb = struct.pack("<Q", length) + b"{" * 64
        yield f"header of {length}", lambda folder, bomb=bomb: (folder / SHARD).write_bytes(bomb)


def _header(change: Callable[[dict[str, Any]], Any]) -> Fault:
    def spoil(folder: Path) -> None:
        content = (folder / SHARD).read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        header = json.loads(content[8 : 8 + length])
        change(header)
        text = json.dumps(header).encode()
        (folder / SHARD).write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])

    return spoil


def indices(folder: Path) -> Iterator[tuple[str, Fault]]:
    """An index that names what it must not, or is none."""
    first = next(iter(json.loads((folder / INDEX).read_text())["weight_map"]))
    names: list[Any] = [
        "../outside.safetensors",
        "/etc/passwd",
        "clip/model.safetensors",
        "",
        ".",
        "..",
        None,
        3,
        [],
        {},
    ]
    for name in (*names, "x" * 300, "a\0b", "missing.safetensors", "config.json", INDEX):
        change = _json(INDEX, lambda index, name=name: index["weight_map"].update({first: name}))
        yield f"index names {ascii(name)[:30]}", change
    for key in ("weight_map", "metadata"):
        yield f"index without {key}", _json(INDEX, lambda index, key=key: index.pop(key))
        for value in (None, [], {}, "x", 3, {"a": 3}):
            change = _json(INDEX, lambda index, key=key, value=value: index.update({key: value}))
            yield f"index {key}={value}", change


def tensors(folder: Path) -> Iterator[tuple[str, Fault]]:
    """Numbers that are no weights, and files of what is no tensor."""
    for name in TENSORS[: 5 if "unpad" in (folder / "config.json").read_text() else 4]:  # v1.5 has no tower
        for value in (float("nan"), float("inf"), -float("inf")):
            yield f"{name} with {value}", _weights(lambda s, name=name, value=value: s[name].view(-1)[-1:].fill_(value))
        for dtype in (torch.int32, torch.uint8, torch.bool, torch.complex64):
            for file in ("model.safetensors", "pytorch_model.bin"):
                change = _weights(lambda s, name=name, dtype=dtype: s.update({name: s[name].to(dtype)}), file)
                yield f"{name} as {dtype} in {file}", change
    for odd in ([1], 3, "x", {"a": [1]}, {"state_dict": {}}, {3: torch.zeros(3)}, {"a": "x"}, None, {}):
        yield f"a .bin of {odd}", lambda folder, odd=odd: write_bin(folder, odd)


def _weights(change: Callable[[dict[str, Any]], Any], file: str = "model.safetensors") -> Fault:
    def spoil(folder: Path) -> None:
        state = read_weights(folder)
        change(state)
        if file.endswith("bin"):
            write_bin(folder, state)
        else:
            save_file(state, folder / file, metadata={"format": "pt"})

    return spoil


def write_bin(folder: Path, content: Any) -> None:
    """Put a `.bin` file in the place of a checkpoint's weights."""
    for old in folder.glob("model*.safetensors*"):
        old.unlink()
    torch.save(content, folder / "pytorch_model.bin")
