"""No compression: the uncompressed model, through the same path as every method."""

from dataclasses import dataclass
from typing import ClassVar

from llava.compress.base import Compressor


@dataclass(frozen=True, kw_only=True)
class NoCompression(Compressor):
    """Keep every token; a retention ratio has no effect."""

    name = "none"
    has_ratio: ClassVar[bool] = False
