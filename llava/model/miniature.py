"""A tiny random LLaVA in the published format, so that the real loading path runs where no weights are at hand.

`python -m llava.model.miniature DIR` writes `DIR` (the checkpoint) and `DIR/clip` (its CLIP folder). The answers are
noise; names of files, config keys and tensors are those of the published checkpoints.
"""

import io
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llava.constants import InputError
from llava.output import check_output, make_folder, write_whole
from llava.utils import OneLineParser, run_command

SIDE, PATCH = 6, 14
TILE = SIDE * PATCH
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": TILE,
    "patch_size": PATCH,
    "projection_dim": 16,
}
GRIDS = [(1, 2), (2, 1), (2, 2), (3, 1), (1, 3)]
VERSIONS = ("v1.5", "v1.6-vicuna", "v1.6-mistral")

_WORDS = (
    "a chat between curious user and an artificial intelligence assistant the gives helpful detailed polite answers to "
    "questions what is shown in this image describe picture color of cat dog car left right yes no number sign read"
)


def write_miniature(
    folder: str | Path,
    version: str = "v1.6-vicuna",
    *,
    seed: int = 0,
    file_format: str = "safetensors",
    shards: int = 2,
) -> Path:
    """Write a miniature checkpoint and its CLIP folder.

    Args:
        folder: created if missing; files of an earlier miniature are overwritten.
        version: `"v1.5"` (tower only in the CLIP folder), `"v1.6-vicuna"` or `"v1.6-mistral"` (own tower).
        seed: of the random weights.
        file_format: `"safetensors"` or `"bin"`.
        shards: number of weight files.

    Returns:
        The folder.
    """
    if version not in VERSIONS:
        raise InputError(f"unknown version {version!r}; choose from {', '.join(VERSIONS)}")
    root = Path(folder)
    make_folder(root / "clip")
    check_output(root / "config.json")
    config = published_config(version)
    state = random_state(config, seed)
    _write_tokenizer(root)
    _write_clip(root / "clip", state)
    if version == "v1.5":
        state = {name: tensor for name, tensor in state.items() if ".vision_tower." not in name}
    write_whole(root / "config.json", json.dumps(config, indent=2) + "\n")
    # As on the hub: sampling values without do_sample, and a max_length from pre-training.
    generation = {
        "bos_token_id": 1,
        "eos_token_id": 2,
        "max_length": 4096,
        "pad_token_id": 0,
        "temperature": 0.9,
        "top_p": 0.6,
    }
    write_whole(root / "generation_config.json", json.dumps(generation, indent=2) + "\n")
    _write_weights(root, state, file_format, shards)
    return root


def published_config(version: str) -> dict[str, Any]:
    """Return a config.json with the keys of the published checkpoint of that version, and a miniature's sizes."""
    mistral, anyres = version.endswith("mistral"), version != "v1.5"
    config: dict[str, Any] = {
        "architectures": ["LlavaMistralForCausalLM" if mistral else "LlavaLlamaForCausalLM"],
        "model_type": "llava_mistral" if mistral else "llava",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "freeze_mm_mlp_adapter": False,
        "hidden_act": "silu",
        "hidden_size": 64,
        "image_aspect_ratio": "anyres" if anyres else "pad",
        "initializer_range": 0.02,
        "intermediate_size": 128,
        "max_length": 4096,
        "max_position_embeddings": 4096,
        "mm_hidden_size": VISION["hidden_size"],
        "mm_projector_type": "mlp2x_gelu",
        "mm_resampler_type": None,
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": "clip",
        "num_attention_heads": 4,
        "num_hidden_layers": 3,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-05,
        "rope_theta": 1e6 if mistral else 1e4,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16" if anyres else "float16",
        "transformers_version": "4.36.2",
        "tune_mm_mlp_adapter": False,
        "unfreeze_mm_vision_tower": anyres,
        "use_cache": True,
        "use_mm_proj": True,
        "vocab_size": VOCABULARY,
    }
    if anyres:
        config |= {
            "image_crop_resolution": 224,
            "image_split_resolution": 224,
            "image_grid_pinpoints": [[TILE * cols, TILE * rows] for cols, rows in GRIDS],
            "mm_patch_merge_type": "spatial_unpad",
            "mm_projector_lr": None,
            "mm_vision_tower_lr": 2e-06,
            "tokenizer_model_max_length": 4096,
            "tokenizer_padding_side": "right",
        }
    own = {"pad_token_id": 0, "pretraining_tp": 1, "rope_scaling": None}  # Llama's
    return config | ({"sliding_window": None} if mistral else own)


VOCABULARY = 384


def tower_shapes(vision: dict[str, int]) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes of CLIP's vision weights as CLIP checkpoints store them (`vision_model.…`)."""
    width, inner, patch = vision["hidden_size"], vision["intermediate_size"], vision["patch_size"]
    positions = (vision["image_size"] // patch) ** 2 + 1
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.class_embedding": (width,),
        "embeddings.patch_embedding.weight": (width, 3, patch, patch),
        "embeddings.position_embedding.weight": (positions, width),
    }
    linears = {f"self_attn.{name}_proj": (width, width) for name in ("k", "v", "q", "out")}
    linears |= {"mlp.fc1": (inner, width), "mlp.fc2": (width, inner)}
    norms = ["pre_layrnorm", "post_layernorm"]
    for layer in range(vision["num_hidden_layers"]):
        stem = f"encoder.layers.{layer}"
        norms += [f"{stem}.layer_norm1", f"{stem}.layer_norm2"]
        for name, shape in linears.items():
            shapes |= {f"{stem}.{name}.weight": shape, f"{stem}.{name}.bias": shape[:1]}
    for name in norms:
        shapes |= {f"{name}.weight": (width,), f"{name}.bias": (width,)}
    return {f"vision_model.{name}": shape for name, shape in shapes.items()}


def state_shapes(config: dict[str, Any], vision: dict[str, int]) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes of a published checkpoint's tensors, tower included."""
    hidden, inner, vocabulary = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    kv = hidden * config["num_key_value_heads"] // config["num_attention_heads"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for layer in range(config["num_hidden_layers"]):
        stem = f"model.layers.{layer}"
        shapes |= {
            f"{stem}.self_attn.q_proj.weight": (hidden, hidden),
            f"{stem}.self_attn.k_proj.weight": (kv, hidden),
            f"{stem}.self_attn.v_proj.weight": (kv, hidden),
            f"{stem}.self_attn.o_proj.weight": (hidden, hidden),
            f"{stem}.mlp.gate_proj.weight": (inner, hidden),
            f"{stem}.mlp.up_proj.weight": (inner, hidden),
            f"{stem}.mlp.down_proj.weight": (hidden, inner),
            f"{stem}.input_layernorm.weight": (hidden,),
            f"{stem}.post_attention_layernorm.weight": (hidden,),
        }
    shapes |= {"model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}
    shapes |= {"model.mm_projector.0.weight": (hidden, vision["hidden_size"]), "model.mm_projector.0.bias": (hidden,)}
    shapes |= {"model.mm_projector.2.weight": (hidden, hidden), "model.mm_projector.2.bias": (hidden,)}
    if "unpad" in config.get("mm_patch_merge_type", "flat"):
        shapes["model.image_newline"] = (hidden,)
    tower = {f"model.vision_tower.vision_tower.{name}": shape for name, shape in tower_shapes(vision).items()}
    return shapes | tower


def random_state(config: dict[str, Any], seed: int) -> dict[str, Tensor]:
    """Draw weights large enough that attention is far from uniform, so that a wrong token changes the answer."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in state_shapes(config, VISION).items():
        noise = torch.randn(shape, generator=generator)
        if "norm" in name and name.endswith("weight"):
            state[name] = 1 + 0.1 * noise
        elif "embed" in name or len(shape) == 1:
            state[name] = 0.5 * noise
        else:
            gain = 2.0 if "q_proj" in name or "k_proj" in name else 1.0
            state[name] = noise * gain / noise[0].numel() ** 0.5
    return state


def _write_tokenizer(root: Path) -> None:
    """Train a byte-fallback SentencePiece model on the spot, with Llama's special ids and no tokenizer.json."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(
            [_WORDS, _WORDS.upper(), _WORDS.title(), "ASSISTANT: USER: yes. no, what's?\t0123456789"] * 20
        ),
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCABULARY,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        hard_vocab_limit=True,
        minloglevel=2,
    )
    write_tokenizer(root, model.getvalue())


def write_tokenizer(root: Path, model: bytes) -> None:
    """Write a SentencePiece model as the published checkpoints carry theirs."""
    write_whole(root / "tokenizer.model", model)
    settings = {
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "<unk>",
        "legacy": False,
        "model_max_length": 4096,
        "padding_side": "right",
        "tokenizer_class": "LlamaTokenizer",
    }
    write_whole(root / "tokenizer_config.json", json.dumps(settings, indent=2) + "\n")


def _write_clip(folder: Path, state: dict[str, Tensor]) -> None:
    """Write the CLIP folder: config, preprocessor, and the tower's weights under CLIP's own names."""
    from safetensors.torch import save

    prefix = "model.vision_tower.vision_tower."
    tower = {name.removeprefix(prefix): t.clone() for name, t in state.items() if name.startswith(prefix)}
    write_clip_shape(folder, VISION)
    write_whole(folder / "model.safetensors", save(tower, metadata={"format": "pt"}))


def write_clip_shape(folder: Path, vision: dict[str, int]) -> None:
    """Write config and preprocessing of a CLIP folder."""
    tile = vision["image_size"]
    config = {"architectures": ["CLIPVisionModel"], "model_type": "clip_vision_model", **vision}
    write_whole(folder / "config.json", json.dumps(config, indent=2) + "\n")
    preprocessor = {
        "crop_size": tile,
        "do_center_crop": True,
        "do_normalize": True,
        "do_resize": True,
        "feature_extractor_type": "CLIPFeatureExtractor",
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "resample": 3,
        "size": tile,
    }
    write_whole(folder / "preprocessor_config.json", json.dumps(preprocessor, indent=2) + "\n")


def _write_weights(root: Path, state: dict[str, Tensor], file_format: str, shards: int) -> None:
    """Write the tensors in shards with an index, as the hub stores them."""
    from safetensors.torch import save

    for old in (*root.glob("model*.safetensors*"), *root.glob("pytorch_model*.bin*")):
        old.unlink()
    stem, suffix = ("model", "safetensors") if file_format == "safetensors" else ("pytorch_model", "bin")
    names = list(state)
    where: dict[str, str] = {}
    per_shard = -(-len(names) // shards)
    for shard in range(shards):
        file = f"{stem}-{shard + 1:05d}-of-{shards:05d}.{suffix}"
        part = {name: state[name] for name in names[shard * per_shard : (shard + 1) * per_shard]}
        where |= dict.fromkeys(part, file)
        if suffix == "bin":
            buffer = io.BytesIO()
            torch.save(part, buffer)
            write_whole(root / file, buffer.getvalue())
        else:
            write_whole(root / file, save(part, metadata={"format": "pt"}))
    size = sum(t.numel() * t.element_size() for t in state.values())
    index = {"metadata": {"total_size": size}, "weight_map": where}
    write_whole(root / f"{stem}.{suffix}.index.json", json.dumps(index, indent=2) + "\n")


def main() -> None:
    """Write a miniature from the command line."""
    parser = OneLineParser(prog="llava.model.miniature", description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("--version", default="v1.6-vicuna", help=", ".join(VERSIONS))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    print(write_miniature(args.folder, args.version, seed=args.seed))


if __name__ == "__main__":
    run_command(main)
