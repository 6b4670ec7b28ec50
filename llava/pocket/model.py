"""The pocket checkpoint's shape, tokenizer and files: those of a published LLaVA-NeXT, small."""

import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors.torch import save
from transformers import CLIPVisionConfig, CLIPVisionModel

from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM
from llava.model.miniature import published_config, write_clip_shape, write_tokenizer
from llava.output import write_whole
from llava.pocket.scenes import CANVASES, CELL, CHARACTERS, TILE

HEAD = 32
"""Width of an attention head of the tower."""
LANGUAGE_HEAD = 64
"""Width of an attention head of the language model: on a CPU attention costs by the number of heads."""
INITIAL = 0.06
"""Spread of the random weights: CLIP's and Llama's 0.02 is meant for models ten times as wide."""


def vision_shape(width: int, layers: int) -> dict[str, int]:
    """Return the config of the vision tower."""
    return {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": width // HEAD,
        "image_size": TILE,
        "patch_size": CELL,
        "projection_dim": width,
    }


def build_tower(width: int, layers: int) -> CLIPVisionModel:
    """Return an untrained vision tower."""
    return CLIPVisionModel(CLIPVisionConfig(**vision_shape(width, layers)))


def pocket_config(vision: tuple[int, int], language: tuple[int, int], vocabulary: int) -> dict[str, Any]:
    """Return the checkpoint's config.json: LLaVA-NeXT's keys, its own sizes.

    Args:
        vision: width and layers of the tower.
        language: width and layers of the language model.
        vocabulary: size of the tokenizer.
    """
    width, layers = language
    return published_config("v1.6-vicuna") | {
        "hidden_size": width,
        "intermediate_size": 8 * width // 3 // 16 * 16,
        "num_hidden_layers": layers,
        "num_attention_heads": width // LANGUAGE_HEAD,
        "num_key_value_heads": width // LANGUAGE_HEAD,
        "mm_hidden_size": vision[0],
        "image_grid_pinpoints": [[TILE * cols, TILE * rows] for cols, rows in CANVASES],
        "vocab_size": vocabulary,
        "torch_dtype": "float16",
    }


def build_model(vision: tuple[int, int], language: tuple[int, int], vocabulary: int) -> LlavaLlamaForCausalLM:
    """Return an untrained model; see `pocket_config`."""
    given = pocket_config(vision, language, vocabulary)
    given.pop("model_type")
    given |= {"initializer_range": INITIAL, "mm_vision_config": vision_shape(*vision), "attn_implementation": "sdpa"}
    return LlavaLlamaForCausalLM(LlavaConfig(**given))


def train_tokenizer(lines: Iterable[str]) -> bytes:
    """Return a SentencePiece model of whole words, digits, single characters and bytes, with Llama's special ids.

    Args:
        lines: what it must spell well; words that are to be spelt by letters must not be among them.
    """
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*lines, *[" ".join(CHARACTERS)] * 50]),
        model_writer=model,
        model_type="bpe",
        vocab_size=640,
        hard_vocab_limit=False,
        split_digits=True,
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        minloglevel=2,
    )
    return model.getvalue()


def save_checkpoint(folder: Path, model: LlavaLlamaForCausalLM, tokenizer: bytes) -> None:
    """Write a trained model as a published LLaVA-NeXT checkpoint in float16."""
    vision = model.config.mm_vision_config
    language = model.config.hidden_size, model.config.num_hidden_layers
    shape = vision["hidden_size"], vision["num_hidden_layers"]
    write_clip_shape(folder / "clip", vision)
    write_tokenizer(folder, tokenizer)
    config = pocket_config(shape, language, model.config.vocab_size)
    write_whole(folder / "config.json", json.dumps(config, indent=2) + "\n")
    settings = {"bos_token_id": 1, "eos_token_id": 2, "max_length": 4096, "pad_token_id": 0}
    write_whole(folder / "generation_config.json", json.dumps(settings, indent=2) + "\n")
    ours, published = "vision_tower.vision_tower.", "vision_tower.vision_tower.vision_model."
    state = {name.replace(ours, published): t.half().contiguous() for name, t in model.state_dict().items()}
    write_whole(folder / "model.safetensors", save(state, metadata={"format": "pt"}))
