"""Least times: a case by hand, and the tables of the reference page that follow from them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llava.constants import InputError
from llava.efficiency import flops
from llava.efficiency.devices import DEVICES, Device, get_device
from llava.efficiency.ops import Fusion, Op
from llava.efficiency.paper import viewer_operators
from llava.efficiency.request import Request, limits, nominal, released
from llava.efficiency.roofline import compute_bound, removed_share, seconds
from llava.efficiency.shapes import MODELS

TOY = Device(name="toy", flops=100.0, bandwidth=10.0, capacity=1e3)
NEXT = {size: MODELS[f"llava-next-{size}"] for size in ("7b", "13b")}
RATIOS = (1.0, 0.75, 0.5, 0.25, 0.1)


def test_by_hand() -> None:
    compute = Op(name="c", macs=100, other=100, weights=10, times=3)  # 300 FLOPs: 3 s; 10 bytes: 1 s
    memory = Op(name="m", macs=5, cache=30, activations=20)  # 0.1 s; 5 s
    assert seconds([compute, memory], TOY) == pytest.approx(3 * 3 + 5)
    assert compute_bound(compute, TOY)
    assert not compute_bound(memory, TOY)
    assert TOY.ridge == 10
    assert seconds([], TOY) == 0


def test_devices_as_their_sheets_print_them() -> None:
    printed = {
        "A100-40G": (312, 1555, 40),
        "A100-80G": (312, 2039, 80),
        "A800-80G": (312, 2039, 80),
        "H100": (989.5, 3350, 80),
        "H200": (989.5, 4800, 141),
        "L40S": (362.05, 864, 48),
        "RTX4090": (165.2, 1008, 24),
    }
    assert {d.name: (d.flops / 1e12, d.bandwidth / 1e9, d.capacity / 1e9) for d in DEVICES.values()} == printed
    assert round(DEVICES["A100-80G"].ridge) == 153
    assert round(DEVICES["H200"].ridge) == 206
    assert get_device("h200") is DEVICES["H200"]
    with pytest.raises(InputError, match="unknown device 'TPU'; choose from A100-40G"):
        get_device("TPU")


# Reference page, section 2: milliseconds by (device, fusion) of the tower's 24 layers, 23 and a row, the projector on
# everything, and the language model at 25 and 10 %; fused, where they do not depend on a reading of LLM-Viewer.
FUSED = {
    ("7b", "A100-80G"): (6.12, 5.89, 0.39, 30.45, 12.23),
    ("7b", "H200"): (1.93, 1.86, 0.12, 9.64, 3.89),
    ("13b", "A100-80G"): (6.12, 5.89, 0.58, 59.40, 23.82),
    ("13b", "H200"): (1.93, 1.86, 0.18, 18.78, 7.55),
}


@pytest.mark.parametrize(("size", "card"), FUSED)
def test_published_fused_times(size: str, card: str) -> None:
    model, device = NEXT[size], DEVICES[card]
    row = flops.selection(model.tower, 5, 0, fusion=Fusion.ALL)
    parts = (
        flops.tower(model.tower, 5, layers=24, fusion=Fusion.ALL),
        (*flops.tower(model.tower, 5, fusion=Fusion.ALL), *row),
        flops.projector(model, 2880, fusion=Fusion.ALL),
        *(flops.prefill(model.language, flops.every_layer(model.language, t), fusion=Fusion.ALL) for t in (720, 288)),
    )
    assert [1e3 * seconds(ops, device) for ops in parts] == pytest.approx(FUSED[size, card], abs=0.0051)


def test_published_unfused_projector() -> None:
    for size, card, milliseconds in (("7b", "A100-80G", 0.41), ("7b", "H200", 0.13), ("13b", "A100-80G", 0.61)):
        found = 1e3 * seconds(flops.projector(NEXT[size], 2880), DEVICES[card])
        assert round(found, 2) == milliseconds


# Reference page, section 3: ms of a decoding step with a context of 2880·R + 192 on one A100-80G. Its law leaves the
# activations of the batch out, which are 0.2 % at most.
STEPS = {
    ("7b", 1): (7.27, 7.09, 6.90, 6.72, 6.61),
    ("7b", 8): (12.82, 11.34, 9.86, 8.38, 7.49),
    ("7b", 32): (31.85, 25.92, 20.00, 14.07, 10.52),
    ("7b", 64): (57.21, 45.36, 33.51, 21.66, 14.56),
    ("13b", 1): (13.84, 13.56, 13.27, 12.98, 12.80),
    ("13b", 8): (22.51, 20.20, 17.89, 15.57, 14.18),
    ("13b", 32): (52.24, 42.98, 33.72, 24.47, 18.91),
    ("13b", 64): (91.87, 73.36, 54.84, 36.33, 25.22),
}


@pytest.mark.parametrize(("size", "batch"), STEPS)
def test_published_decoding(size: str, batch: int) -> None:
    shape, device = NEXT[size].language, DEVICES["A100-80G"]
    found = [
        1e3
        * seconds(
            flops.decode_step(
                shape, flops.every_layer(shape, round(2880 * ratio) + 192), batch=batch, fusion=Fusion.ALL
            ),
            device,
        )
        for ratio in RATIOS
    ]
    assert found == pytest.approx(STEPS[size, batch], rel=3e-3)


# Section 4, limits of a request in the released arrangement with 60 text tokens: device, tokens produced.
REQUESTS = {
    ("7b", "A100-80G", 2): (1.30, 1.84, 3.10, 5.14),
    ("7b", "A100-80G", 32): (1.12, 1.27, 1.46, 1.60),
    ("7b", "A100-80G", 128): (1.06, 1.12, 1.19, 1.23),
    ("13b", "A100-80G", 32): (1.12, 1.26, 1.45, 1.59),
    ("13b", "A100-80G", 128): (1.05, 1.11, 1.17, 1.21),
    ("7b", "H200", 2): (1.30, 1.82, 3.00, 4.82),
    ("13b", "H200", 2): (1.30, 1.84, 3.11, 5.23),
}


def paper_request(size: str, ratio: float, text: int, output: int) -> Request:
    return released(nominal(NEXT[size], round(2880 * ratio), text, output=output))


@pytest.mark.parametrize(("size", "card", "output"), REQUESTS)
def test_published_limits(size: str, card: str, output: int) -> None:
    base, *found = (paper_request(size, ratio, 60, output) for ratio in RATIOS)
    ceilings = [limits(base, request, DEVICES[card]) for request in found]
    assert [ceiling["request"] for ceiling in ceilings] == pytest.approx(REQUESTS[size, card, output], abs=0.0061)
    assert all(ceiling["prefill"] > ceiling["first token"] > ceiling["request"] for ceiling in ceilings)


def test_published_limits_of_a_square_image() -> None:
    """Section 2, end: with 48 newlines that are never dropped, every view rounded down, and 60 text tokens."""
    first = {"7b": (1.31, 1.89, 3.32, 5.97), "13b": (1.32, 1.92, 3.48, 6.68)}
    for size, published in first.items():
        base, *found = (released(nominal(NEXT[size], 5 * int(576 * ratio), 48 + 60)) for ratio in RATIOS)
        ceilings = [limits(base, request, DEVICES["A100-80G"]) for request in found]
        assert [c["first token"] for c in ceilings] == pytest.approx(published, abs=0.0061)
        if size == "7b":
            assert [c["prefill"] for c in ceilings] == pytest.approx((1.34, 1.98, 3.75, 7.91), abs=0.0061)


@pytest.mark.parametrize("size", NEXT)
@pytest.mark.parametrize("t", [288, 2880])
def test_whatever_is_no_matrix_product_is_bound_by_memory(size: str, t: int) -> None:
    """So that charging it at the tensor cores' peak, as LLM-Viewer does, changes no time on any device."""
    for device in DEVICES.values():
        for op in viewer_operators(NEXT[size].language, t):
            assert op.macs or not compute_bound(op, device)


def test_stages_and_their_sums() -> None:
    request = Request(
        model=NEXT["7b"], views=5, kept=720, tokens=flops.every_layer(NEXT["7b"].language, 800), output=4, cls_rows=1
    )
    stages = request.stages()
    steps = [flops.decode_step(NEXT["7b"].language, flops.every_layer(NEXT["7b"].language, 800 + n)) for n in range(3)]
    assert stages["decode"] == tuple(op for step in steps for op in step)
    assert stages["projector"] == flops.projector(NEXT["7b"], 720)
    assert request.kv_bytes == 800 * 524288
    arranged = released(request).stages()
    assert arranged["projector"] == flops.projector(NEXT["7b"], 2880)
    assert arranged["tower"] == flops.tower(NEXT["7b"].tower, 5, layers=24)
    assert stages["tower"] == flops.tower(NEXT["7b"].tower, 5, layers=23)


def test_tokens_dropped_inside_the_language_model() -> None:
    """FastV, say: 2 layers read everything, the rest a quarter; decoding reads what every layer holds."""
    shape = NEXT["7b"].language
    tokens = (2940,) * 2 + (780,) * 30
    request = Request(model=NEXT["7b"], views=5, kept=2880, tokens=tokens, output=2)
    whole, quarter = (
        Request(model=NEXT["7b"], views=5, kept=2880, tokens=flops.every_layer(shape, t), output=2) for t in (2940, 780)
    )
    device = DEVICES["H200"]
    for stage in ("prefill", "decode"):
        least, found, most = (r.seconds(device)[stage] for r in (quarter, request, whole))
        assert least < found < most
    assert request.kv_bytes == 524288 // 32 * sum(tokens)
    held = Request(model=NEXT["7b"], views=5, kept=2880, tokens=(2940,) * 32, cached=tokens)
    assert held.kv_bytes == request.kv_bytes


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"views": -1}, "views must be at least 0, got -1"),
        ({"kept": -1}, "kept must be at least 0, got -1"),
        ({"output": 0}, "output must be at least 1, got 0"),
        ({"batch": 0}, "batch must be at least 1, got 0"),
        ({"tokens": (1,)}, "each of 32 layers, got 1"),
    ],
)
def test_impossible_requests(wrong: dict[str, object], said: str) -> None:
    fields = {"model": NEXT["7b"], "views": 1, "kept": 1, "tokens": (1,) * 32} | wrong
    with pytest.raises(InputError, match=said):
        Request(**fields)  # type: ignore[arg-type]


@given(st.floats(1.01, 100), st.floats(0.01, 1))
def test_removed_share_runs_from_nothing_to_all(limit: float, share: float) -> None:
    assert removed_share(1, limit) == 0
    assert removed_share(limit, limit) == pytest.approx(1)
    measured = 1 / (1 - share * (1 - 1 / limit))
    assert removed_share(measured, limit) == pytest.approx(share)


@pytest.mark.parametrize("pair", [(0, 2), (2, 0), (2, 1), (-1, 2)])
def test_removed_share_of_nothing(pair: tuple[float, float]) -> None:
    with pytest.raises(InputError, match=f"got {pair[0]:g} of {pair[1]:g}$"):
        removed_share(*pair)
