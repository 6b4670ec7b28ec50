"""From methods and traces to requests: what is announced is what a model really runs."""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch

from llava.compress import available, get, method_class
from llava.compress.trace import Trace
from llava.constants import InputError
from llava.efficiency.flops import every_layer
from llava.efficiency.methods import check_reach, image_grid, plan_request, trace_requests
from llava.efficiency.ops import total
from llava.efficiency.shapes import MODELS, load
from llava.mm_utils import process_images
from tests.conftest import picture

NEXT, FIFTEEN = MODELS["llava-next-7b"], MODELS["llava-1.5-7b"]


# Reference page, section 2, end: visual tokens of the uncompressed model; three views where it says so.
@pytest.mark.parametrize(
    ("size", "views", "tokens"),
    [
        ((672, 672), 5, 2928),
        ((640, 480), 5, 2340),
        ((1280, 720), 5, 1948),
        ((1000, 500), 3, 1752),
        ((300, 300), 3, 1176),
    ],
)
def test_published_token_counts(size: tuple[int, int], views: int, tokens: int) -> None:
    found = plan_request(NEXT, get("none"), size, text=60)
    assert (found.request.views, found.visual) == (views, tokens)
    assert found.request.tokens == every_layer(NEXT.language, tokens + 60)
    assert found.request.kept == found.plan.patches == tokens - found.newlines


def test_released_arrangement_keeps_a_newline_for_every_row() -> None:
    """Section 2, end: 333 tokens, not 288, of a square image at 10 %; 640x480 keeps 277."""
    released = get("globalcom2(profile='released')", retention_ratio=0.1)
    square = plan_request(NEXT, released, (672, 672))
    assert square.newlines == 48  # and the patches are those asked for, of which rounding keeps three fewer
    assert square.visual == pytest.approx(333, abs=4)
    assert plan_request(NEXT, released, (640, 480)).visual == pytest.approx(277, abs=4)


def test_a_single_view_has_no_newline() -> None:
    found = plan_request(FIFTEEN, get("globalcom2", retention_ratio=0.25), (640, 480), text=40)
    assert (found.grid.crops, found.request.views, found.newlines, found.visual) == (None, 1, 0, 144)
    assert set(found.request.tokens) == {184}


@pytest.mark.parametrize("name", available())
def test_every_method_is_asked(name: str) -> None:
    # FiCoCo-L merges layer by layer: its mean over layers cannot go below 0.6.
    fields = {"retention_ratio": 0.75 if name == "ficoco_l" else 0.25} if method_class(name).has_ratio else {}
    method = get(name, **fields)
    found = plan_request(NEXT, method, (640, 480))
    assert found.plan.at_least <= found.request.kept <= found.plan.at_most
    assert found.method == str(method)
    assert found.request.projected == found.request.kept + found.extra
    layers = {tap % 24 for tap in (*method.taps.cls, *method.taps.keys)}
    assert found.request.tower_layers == max(23, *layers, 0)
    assert found.request.cls_rows == len({tap % 24 for tap in method.taps.cls})
    assert found.request.tokens == method.visual_per_layer(found.visual, 32)
    assert found.request.runs == (0, *(layer + 1 for layer in method.llm_points if layer < 31))
    again = plan_request(NEXT, method, (640, 480))
    assert again.visual == found.visual  # the noise is the same every time


def test_asking_leaves_the_random_numbers_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    plan_request(NEXT, get("globalcom2", retention_ratio=0.25), (640, 480))
    assert torch.equal(torch.rand(2), expected)


INSIDE = "fastv(layer=1, budget='after', retention_ratio=0.25)"


def test_dropping_inside_the_language_model() -> None:
    """FastV at layer 2 of 32: two layers read everything, the others what makes a mean of a quarter."""
    found = plan_request(NEXT, get("fastv", retention_ratio=0.25), (672, 672), text=60)
    after = round(2928 * (0.25 * 32 - 2) / 30)
    assert found.request.tokens == (2988,) * 2 + (after + 60,) * 30
    assert found.request.kept == found.request.projected == 2880
    assert found.request.runs == (0, 2)
    looks = {op.name: op.macs * op.times for op in found.request.stages()["selection"]}
    assert looks == {"gather": 0, "rows": 2988 * 4096}, "the layer's own projections are looked at"
    with pytest.raises(InputError, match=r"ask for at least 6\.25%"):
        plan_request(NEXT, get("fastv", retention_ratio=0.05), (672, 672))


def test_what_no_image_can_meet_is_refused() -> None:
    for spec, said in (
        ("fastv(retention_ratio=0.06)", r"at least 6\.25%"),
        ("fastv(layer=32)", "32 layers"),
        ("sparsevlm(layers=(2, 6, 31))", "choose earlier layers"),
        ("tome(first_layer=23)", "lower first_layer"),
        ("ficoco_l(r=109)", "merges 2943 tokens"),
    ):
        with pytest.raises(InputError, match=said):
            check_reach(NEXT, get(spec))
    # The first two for the largest image alone, newlines included; the third for a thumbnail alone.
    for spec in ("ficoco_l(r=107)", "ficoco_vl(r=49, r_language=8)", "sparsevlm(budget='paper', retention_ratio=0.04)"):
        check_reach(NEXT, get(spec))
        with pytest.raises(InputError, match=r"at least|at most"):
            plan_request(NEXT, get(spec), (672, 672) if "paper" in spec else (1, 336))


def test_the_question_is_what_follows_the_image() -> None:
    """SparseVLM: rows of attention and their mean at three points, dot products with the image once."""
    method = get("sparsevlm(recycle=False)", retention_ratio=0.5)
    found = plan_request(NEXT, method, (672, 672), text=60, prefix=35)
    entered = [found.request.tokens[layer] for layer in (2, 6, 15)]
    looks = [(op.name, op.macs * op.times) for op in found.request.stages()["selection"] if op.macs]
    pairs = [(name, 25 * n * width) for n in entered for name, width in (("rows", 4096), ("scores", 1))]
    assert looks == [("raters", 2928 * 4096 * 25), *pairs]


def test_merging_between_attention_and_mlp() -> None:
    """FiCoCo-L from layer 5 on: what a layer merges, its MLP does not run on, and the last one's leave the model."""
    request = plan_request(NEXT, get("ficoco_l(r=10)"), (672, 672), text=60).request
    assert request.tokens == (2988,) * 6 + tuple(2988 - 10 * layer for layer in range(1, 27))
    assert request.mlp_tokens == (2988,) * 5 + tuple(2988 - 10 * layer for layer in range(1, 28))
    assert request.context == request.tokens
    assert request.runs == (0, *range(6, 32))


def test_merging_inside_the_encoder() -> None:
    """FiCoCo-V in layers 12 to 22: what they run on, and what that saves."""
    found = plan_request(NEXT, get("ficoco_v", retention_ratio=0.25), (672, 672))
    ran = found.request.tower_tokens
    assert ran is not None
    assert ran[:13] == (577,) * 13
    assert ran[-1] == 145
    assert len(ran) == 24
    assert found.request.kept == 720
    assert found.newlines == 48
    dense, shorter = (
        total(plan_request(NEXT, get(name, retention_ratio=0.25), (672, 672)).request.stages()["tower"]).macs
        for name in ("uniform", "ficoco_v")
    )
    layers = sum(5 * (4 * n * 1024**2 + 2 * n**2 * 1024 + 2 * m * 1024 * 4096) for n, m in pairwise(ran))
    everything = 23 * 5 * (12 * 577 * 1024**2 + 2 * 577**2 * 1024)
    assert dense - shorter == everything - layers
    with pytest.raises(InputError, match="each of 23 layers of the tower"):
        replace(found.request, tower_tokens=(577,)).stages()


MERGING = ("tome(retention_ratio=0.5)", "ficoco_v(retention_ratio=0.4)")


@pytest.mark.parametrize(
    "spec", ["none", "globalcom2(retention_ratio=0.25)", "uniform(retention_ratio=0.5)", INSIDE, *MERGING]
)
@pytest.mark.parametrize("size", [(120, 90), (60, 200)])
def test_what_is_planned_is_what_runs(checkpoint: Any, loaded: Any, spec: str, size: tuple[int, int]) -> None:
    _, model, processor, _ = loaded("v1.6-vicuna")
    before, model.method, trace = model.method, get(spec), Trace()
    try:
        ids, image = torch.tensor([[1, 5, -200, 6, 7]]), picture(*size)
        pixels = process_images([image], processor, model.config)
        model.generate(ids, images=pixels, image_sizes=[image.size], max_new_tokens=2, do_sample=False, trace=trace)
    finally:
        model.method = before
    shape = load(str(checkpoint("v1.6-vicuna")))
    planned = plan_request(shape, get(spec), size, text=4, output=2)
    assert trace_requests(shape, trace, output=2) == [planned.request]
    assert planned.request.tokens[0] == trace.sequence_lengths[0]
    assert len(set(planned.request.tokens)) == (2 if spec == INSIDE else 1)


def test_traces_of_several_rows() -> None:
    shape = NEXT
    text_only = Trace(sequence_lengths=[7, 9], n_text=[7, 9])
    assert [(r.views, r.kept, r.tokens[0]) for r in trace_requests(shape, text_only)] == [(0, 0, 7), (0, 0, 9)]
    with pytest.raises(InputError, match="0 images belong to which of 0 rows"):
        trace_requests(shape, Trace())


def test_images_that_cannot_be() -> None:
    with pytest.raises(InputError, match="both sides must be at least 1"):
        image_grid(FIFTEEN, (0, 5))
    with pytest.raises(InputError, match="must be multiples of 336"):
        image_grid(replace(NEXT, pinpoints=((336, 500),)), (5, 5))
    with pytest.raises(InputError, match="mm_patch_merge_type"):
        plan_request(replace(NEXT, merge="nest"), get("none"), (5, 5))


def test_grids_of_transformers_config() -> None:
    """Their pinpoints are `(height, width)`."""
    tall = replace(NEXT, pinpoints=((672, 336),), rule="hf")
    assert image_grid(tall, (300, 700)).crops == (1, 2)
    assert image_grid(replace(tall, rule="llava"), (300, 700)).crops == (2, 1)
