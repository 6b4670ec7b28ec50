"""Vision settings that cannot work together, found before a model is built."""

from typing import Any

from llava.anyres import Size, parse_pinpoints
from llava.constants import InputError
from llava.model.views import LAYOUTS
from llava.schema import shown


def check_vision(config: Any, tower: str) -> None:
    """Refuse vision settings that would only fail, or mean something else, once an image comes.

    Args:
        config: a model's, with `mm_vision_config` filled in.
        tower: name of the vision tower, for the message.

    Raises:
        InputError: a setting is not supported, or two do not fit each other.
    """
    shape = config.mm_vision_config
    layers, width, tile = shape["num_hidden_layers"], shape["hidden_size"], shape["image_size"]
    allowed: dict[str, Any] = {
        "mm_patch_merge_type": tuple(LAYOUTS),
        "image_aspect_ratio": ("square", "pad", "anyres"),
        "mm_vision_select_layer": range(-layers, layers + 1),
        "mm_vision_select_feature": ("patch",),
    }
    for key, values in allowed.items():
        if getattr(config, key) not in values:
            said = f"{values[0]} to {values[-1]}" if isinstance(values, range) else ", ".join(values)
            raise InputError(f"config.json's {key} must be {said}, got {shown(getattr(config, key))}")
    if width != config.mm_hidden_size:
        raise InputError(
            f"the vision tower {tower!r} is {width} wide, config.json's mm_hidden_size is {config.mm_hidden_size}; "
            "give the tower that the checkpoint was trained with (mm_vision_tower, --vision-tower)"
        )
    if config.mm_projector_type == "identity" and width != config.hidden_size:
        raise InputError(
            f"mm_projector_type 'identity' needs a tower as wide as the model: {width}, {config.hidden_size}"
        )
    if width % shape["num_attention_heads"]:
        raise InputError(f"the vision tower {tower!r} has {shape['num_attention_heads']} heads for a width of {width}")
    if tile < shape["patch_size"]:
        raise InputError(f"the vision tower {tower!r} has views of {tile} pixels, patches of {shape['patch_size']}")
    if config.image_aspect_ratio == "anyres":
        _check_canvases(parse_pinpoints(config.image_grid_pinpoints), tile, tower)


def _check_canvases(canvases: list[Size], tile: int, tower: str) -> None:
    """Refuse canvases that cannot be cut into views, and more or larger ones than any model has."""
    if not 1 <= len(canvases) <= 1000:
        raise InputError(f"config.json's image_grid_pinpoints must be 1 to 1000 canvases, got {len(canvases)}")
    for canvas in canvases:
        if any(side < 1 or side % tile for side in canvas) or canvas[0] * canvas[1] > 256 * tile**2:
            raise InputError(
                f"config.json's image_grid_pinpoints must be multiples of the {tile} pixels that the vision tower "
                f"{tower!r} looks at, and at most 256 views together, got {shown(list(canvas))}"
            )
