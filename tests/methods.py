"""Methods with fields that fit a model as small as the miniature."""

from llava.compress import get
from llava.compress.base import Compressor

MOVED = {
    "fastv": "fastv(layer=1)",
    "sparsevlm": "sparsevlm(layers=(0, 1), budget='after')",
    "ficoco_l": "ficoco_l(control_encoding_layer=-1, layers=1)",
    "ficoco_vl": "ficoco_vl(control_language_layer=-1, language_layers=1)",
}
"""Where a method's own layers do not fit a language model of three."""


def fitted(name: str, ratio: float) -> Compressor:
    """Return a method that runs in the miniature, at a ratio if it has one."""
    method = get(MOVED.get(name, name))
    return get(MOVED.get(name, name), retention_ratio=ratio) if method.has_ratio else method
