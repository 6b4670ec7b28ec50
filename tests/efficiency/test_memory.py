"""What must fit into memory: by hand, and the batches of the reference page."""

import pytest

from llava.constants import InputError
from llava.efficiency.devices import DEVICES, Device
from llava.efficiency.memory import footprint, largest_batch, scratch_bytes
from llava.efficiency.ops import Fusion
from llava.efficiency.shapes import MODELS, Language

TINY = Language(width=4, inner=6, layers=2, heads=2, kv_heads=1, head_width=2, vocabulary=10)
NEXT = {size: MODELS[f"llava-next-{size}"] for size in ("7b", "13b")}
RATIOS = (1.0, 0.75, 0.5, 0.25, 0.1)


def test_scratch_by_hand() -> None:
    # Two hidden states of 3 x 4, and the widest operator: gate, up and product of 3 x 6; or two maps of 2 x 50 x 50.
    assert scratch_bytes(TINY, (3, 3)) == 2 * (2 * 12 + 3 * 18)
    assert scratch_bytes(TINY, (3, 3), batch=2) == 2 * scratch_bytes(TINY, (3, 3))
    assert scratch_bytes(TINY, (50, 1), fusion=Fusion.NONE) == 2 * (2 * 200 + 2 * 2 * 2500)


def test_footprint_is_not_traffic() -> None:
    """107 GB are moved by a prefill that occupies 17."""
    found = footprint(NEXT["7b"], (2880,) * 32, fusion=Fusion.NONE)
    assert found.weights == NEXT["7b"].weight_bytes
    assert round(found.weights / 1e9, 2) == 14.13
    assert found.cache == 1440 * 2**20
    assert found.bytes == found.weights + found.cache + found.scratch
    assert 16.6e9 < found.bytes < 17e9
    assert footprint(NEXT["7b"], (2880,) * 32).bytes < 15.9e9
    assert footprint(NEXT["7b"], (2880,) * 32, cached=(288,) * 32).cache == 144 * 2**20
    assert round(NEXT["13b"].weight_bytes / 1e9, 2) == 26.70


# Reference page, section 3: visual tokens only, and with 64 text and 128 produced tokens.
BATCHES = {
    ("7b", "A100-80G"): ((41, 55, 83, 166, 416), (38, 50, 73, 131, 249)),
    ("7b", "H200"): ((81, 109, 163, 327, 820), (76, 100, 144, 258, 492)),
    ("13b", "A100-80G"): ((21, 28, 42, 85, 213), (19, 25, 37, 67, 127)),
    ("13b", "H200"): ((47, 62, 94, 188, 471), (44, 57, 83, 148, 282)),
}


@pytest.mark.parametrize(("size", "card"), BATCHES)
def test_published_largest_batches(size: str, card: str) -> None:
    model, device = NEXT[size], DEVICES[card]
    visual, whole = BATCHES[size, card]
    assert tuple(largest_batch(model, device, round(2880 * ratio)) for ratio in RATIOS) == visual
    assert tuple(largest_batch(model, device, round(2880 * ratio) + 64, 128) for ratio in RATIOS) == whole


def test_what_does_not_fit() -> None:
    assert largest_batch(NEXT["13b"], DEVICES["RTX4090"], 2880) == 0
    small = Device(name="small", flops=1, bandwidth=1, capacity=NEXT["7b"].weight_bytes)
    assert largest_batch(NEXT["7b"], small, 1) == 0
    assert largest_batch(NEXT["7b"], DEVICES["H200"], (2880,) * 16 + (288,) * 16) > largest_batch(
        NEXT["7b"], DEVICES["H200"], 2880
    )
    with pytest.raises(InputError, match="at least one token"):
        largest_batch(NEXT["7b"], DEVICES["H200"], 0)
