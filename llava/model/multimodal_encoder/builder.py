"""Where a vision tower's shape, preprocessing and weights come from: the checkpoint, a CLIP folder or the hub."""

from pathlib import Path
from typing import Any

from llava.constants import InputError
from llava.model.files import HUB_ID, find_file, read_object

TOWER_REMEDY = "give the folder of the CLIP model as vision_tower (--vision-tower), or in config.json's mm_vision_tower"
SHAPE = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_channels",
    "image_size",
    "patch_size",
    "projection_dim",
    "hidden_act",
    "layer_norm_eps",
)

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
        if (folder / "config.json").is_file():
            return str(folder)
    return name


def vision_config(tower: str) -> dict[str, Any]:
    """Return the vision part of a CLIP config as plain data.

    Args:
        tower: a folder or a hub id; the shape of a known tower needs neither disk nor network.

    Raises:
        InputError: the config cannot be had.
    """
    if tower in KNOWN_TOWERS:
        return dict(KNOWN_TOWERS[tower])
    file = find_file(tower, "config.json")
    if file is None:
        raise InputError(f"no config.json at vision tower {tower!r}; {TOWER_REMEDY}")
    found = read_object(file)
    found = found.get("vision_config", found)  # a whole CLIP has text and vision
    return {key: found[key] for key in SHAPE if key in found}


def image_processor(tower: str, image_size: int) -> Any:
    """Return CLIP's image processor on PIL, from the tower's files if it has them, else with CLIP's own constants.

    Raises:
        InputError: the tower's preprocessor_config.json is unreadable.
    """
    from transformers import CLIPImageProcessorPil

    known_or_gone = tower in KNOWN_TOWERS or not (Path(tower).is_dir() or HUB_ID.fullmatch(tower))
    file = None if known_or_gone else find_file(tower, "preprocessor_config.json")
    if file is None:
        return CLIPImageProcessorPil(
            size={"shortest_edge": image_size}, crop_size={"height": image_size, "width": image_size}
        )
    given = read_object(file)
    known = ("size", "crop_size", "image_mean", "image_std", "resample", "rescale_factor")
    return CLIPImageProcessorPil(**{key: given[key] for key in known if key in given})
