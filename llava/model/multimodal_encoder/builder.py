"""Where a vision tower's shape, preprocessing and weights come from: the checkpoint, a CLIP folder or the hub."""

from pathlib import Path
from typing import Any

from llava.constants import InputError
from llava.model.files import HUB_ID, find_file, is_folder, read_object
from llava.model.settings import PREPROCESSOR, TOWER
from llava.schema import OBJECT, check_settings

TOWER_REMEDY = "give the folder of the CLIP model as vision_tower (--vision-tower), or in config.json's mm_vision_tower"
# What a CLIP config that lacks a key means by it.
DEFAULTS = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 32,
    "projection_dim": 512,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}

# The one tower of all published LLaVA-1.5 and LLaVA-NeXT checkpoints, so that those which carry their tower's weights
# load without a second download. (Shape: the model card of openai/clip-vit-large-patch14-336.)
KNOWN_TOWERS = {
    "openai/clip-vit-large-patch14-336": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 336,
        "patch_size": 14,
        "projection_dim": 768,
    }
}


def build_vision_tower(config: Any, **kwargs: Any) -> Any:
    """Build the (still empty) vision tower of a model config; see `CLIPVisionTower`."""
    from llava.model.multimodal_encoder.clip_encoder import CLIPVisionTower  # drags transformers in

    return CLIPVisionTower(config.mm_vision_tower, config, **kwargs)


def locate_tower(name: str, checkpoint: str) -> str:
    """Return where the tower `name` of a checkpoint is: a folder (as named, or beside the checkpoint) or a hub id."""
    for folder in (Path(name), Path(checkpoint) / name, Path(checkpoint).parent / name):
        if is_folder(folder) and (folder / "config.json").exists():
            return str(folder)
    return name


def vision_config(tower: str) -> dict[str, Any]:
    """Return the vision part of a CLIP config as plain data, what it leaves out filled in.

    Args:
        tower: a folder or a hub id; the shape of a known tower needs neither disk nor network.

    Raises:
        InputError: the config cannot be had, or holds what a tower cannot have.
    """
    if tower in KNOWN_TOWERS:
        return DEFAULTS | KNOWN_TOWERS[tower]
    file = find_file(tower, "config.json", TOWER_REMEDY)
    if file is None:
        raise InputError(f"no config.json at vision tower {tower!r}; {TOWER_REMEDY}")
    found = read_object(file, {"vision_config": OBJECT})
    return tower_shape(found.get("vision_config", found), str(file))  # a whole CLIP has text and vision


def tower_shape(found: dict[str, Any], source: str) -> dict[str, Any]:
    """Return the shape of a tower from its settings, what they leave out filled in.

    Raises:
        InputError: it holds what a tower cannot have; `source` says where.
    """
    check_settings(found, TOWER, source)
    return {key: found.get(key, default) for key, default in DEFAULTS.items()}


def image_processor(tower: str, image_size: int) -> Any:
    """Return CLIP's image processor on PIL, from the tower's files if it has them, else with CLIP's own constants.

    Raises:
        InputError: the tower's preprocessor_config.json is unreadable, or makes views of another size.
    """
    from transformers import CLIPImageProcessorPil

    known_or_gone = tower in KNOWN_TOWERS or not (is_folder(tower) or HUB_ID.fullmatch(tower))
    file = None if known_or_gone else find_file(tower, "preprocessor_config.json", TOWER_REMEDY)
    if file is None:
        return CLIPImageProcessorPil(
            size={"shortest_edge": image_size}, crop_size={"height": image_size, "width": image_size}
        )
    given = read_object(file, PREPROCESSOR)
    processor = CLIPImageProcessorPil(**{key: given[key] for key in PREPROCESSOR if key in given})
    resized, crop = processor.size, processor.crop_size
    if resized != {"shortest_edge": image_size} or crop != {"height": image_size, "width": image_size}:
        raise InputError(
            f"{str(file)!r} makes views by size {dict(resized)} and crop_size {dict(crop)}, but the tower looks at "
            f"image_size {image_size}; give a tower whose files belong together"
        )
    return processor
