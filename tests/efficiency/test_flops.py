"""Operators: small cases by hand, published sizes, and what must hold for all."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llava.compress.stages import Product
from llava.constants import InputError
from llava.efficiency import flops
from llava.efficiency.ops import Fusion, Op, total
from llava.efficiency.paper import equation_9
from llava.efficiency.shapes import MODELS, Language, Model, Tower

# d, m, L, h, kv heads, V = 4, 6, 2, 2, 1, 10: queries are 4 wide, keys and values 2.
TINY = Language(width=4, inner=6, layers=2, heads=2, kv_heads=1, head_width=2, vocabulary=10)
VISION = Tower(width=3, inner=5, layers=4, heads=1, image_size=4, patch_size=2)  # 4 patches, 5 positions, 3 layers run
SMALL = Model(name="small", tower=VISION, language=TINY)
NEXT = {size: MODELS[f"llava-next-{size}"] for size in ("7b", "13b")}


def by_name(ops: tuple[Op, ...]) -> dict[str, Op]:
    return {op.name: op for op in ops}


# --- language model --------------------------------------------------------------------------------------------------


def test_a_layer_by_hand() -> None:
    """Three tokens, one sequence, unfused: every operator on paper."""
    ops = by_name(flops.prefill(TINY, (3, 3)))
    expected = {
        # name: MACs, other operations, bytes of weights, of the cache, of activations
        "angles": (3 * 1, 0, 0, 0, 3 * 2 * 2 * 2),
        "input norm": (0, 7 * 12, 0, 0, 2 * 12 * 2),
        "q": (3 * 4 * 4, 0, 16 * 2, 0, 3 * 8 * 2),
        "k": (3 * 4 * 2, 0, 8 * 2, 3 * 2 * 2, 3 * 4 * 2),
        "v": (3 * 4 * 2, 0, 8 * 2, 3 * 2 * 2, 3 * 4 * 2),
        "rotary": (0, 3 * 3 * 6, 0, 0, 2 * 3 * 6 * 2),
        "q·k": (9 * 4, 0, 0, 3 * 2 * 2, (3 * 4 + 2 * 9) * 2),
        "softmax": (0, 5 * 2 * 9, 0, 0, 2 * 2 * 9 * 2),
        "scores·v": (9 * 4, 0, 0, 3 * 2 * 2, (2 * 9 + 3 * 4) * 2),
        "o": (3 * 4 * 4, 0, 16 * 2, 0, 3 * 8 * 2),
        "attention add": (0, 12, 0, 0, 2 * 12 * 2),
        "post norm": (0, 7 * 12, 0, 0, 2 * 12 * 2),
        "gate": (3 * 4 * 6, 0, 24 * 2, 0, 3 * 10 * 2),
        "up": (3 * 4 * 6, 0, 24 * 2, 0, 3 * 10 * 2),
        "activation": (0, 2 * 18, 0, 0, 3 * 18 * 2),
        "down": (3 * 6 * 4, 0, 24 * 2, 0, 3 * 10 * 2),
        "mlp add": (0, 12, 0, 0, 2 * 12 * 2),
        "last norm": (0, 7 * 12, 0, 0, 2 * 12 * 2),
        "head": (4 * 10, 0, 40 * 2, 0, 14 * 2),
    }
    assert ops.keys() == expected.keys()
    for name, (macs, other, weights, cache, activations) in expected.items():
        times = 1 if name in ("angles", "last norm", "head") else 2
        assert ops[name] == Op(
            name=name, macs=macs, other=other, weights=weights, cache=cache, activations=activations, times=times
        )


def test_flash_sees_the_triangle_and_moves_no_map() -> None:
    attention = by_name(flops.prefill(TINY, (3, 3), fusion=Fusion.ATTENTION))["attention"]
    pairs = 1 + 2 + 3
    expected = Op(name="attention", macs=2 * pairs * 4, other=5 * 2 * pairs, cache=2 * 12, activations=2 * 24, times=2)
    assert attention == expected


def test_fused_reads_inputs_once() -> None:
    ops = by_name(flops.prefill(TINY, (3, 3), fusion=Fusion.ALL))
    assert list(ops) == ["q k v", "attention", "o", "gate up", "down", "head"]
    assert ops["q k v"].activations == 3 * (4 + 4) * 2
    assert ops["q k v"].cache == 2 * 3 * 2 * 2
    assert ops["gate up"].activations == 3 * (4 + 6) * 2
    assert sum(op.other for op in ops.values()) == 0
    # With as many heads of keys: 4d² + 3dm weights and T(12d + 2m) elements a layer, and the head.
    full = replace(TINY, kv_heads=2)
    cost = total(flops.prefill(full, (3, 3), fusion=Fusion.ALL))
    assert cost.weights == 2 * (2 * (4 * 16 + 3 * 24) + 40)
    assert cost.cache + cost.activations == 2 * (2 * 3 * (12 * 4 + 2 * 6) + 4 + 10)


def test_decoding_by_hand() -> None:
    """One token behind 5 and 2 cached ones."""
    ops = flops.decode_step(TINY, (5, 2))
    attention = [op for op in ops if op.name == "q·k"]
    assert [op.macs for op in attention] == [6 * 4, 3 * 4]
    assert [op.cache for op in attention] == [6 * 2 * 2, 3 * 2 * 2]
    linear = 4 * 4 + 2 * 4 * 2 + 4 * 4 + 3 * 4 * 6
    assert total(ops).macs == 2 * linear + 2 * (6 + 3) * 4 + 2 + 40  # rotations for both lengths, the head
    flash = flops.decode_step(TINY, (5, 2), fusion=Fusion.ATTENTION)
    assert total(flash).macs == total(ops).macs  # the last token sees everything


def test_a_question_behind_a_cached_image() -> None:
    """Two tokens behind three: the pairs that the mask leaves are 4 + 5."""
    ops = flops.prefill(TINY, (2, 2), cached=(3, 3), fusion=Fusion.ATTENTION)
    assert by_name(ops)["attention"].macs == 2 * (4 + 5) * 4


def test_tokens_dropped_between_attention_and_mlp() -> None:
    ops = flops.prefill(TINY, (3, 1), mlp_tokens=(1, 1))
    assert [op.macs for op in ops if op.name == "gate"] == [1 * 24, 1 * 24]
    assert [op.macs for op in ops if op.name == "q"] == [3 * 16, 1 * 16]
    assert by_name(ops)["last norm"].other == 7 * 4


def test_logits_of_all_positions() -> None:
    last, every = (by_name(flops.prefill(TINY, (3, 3), logits=n))["head"] for n in (1, 3))
    assert every.macs == 3 * last.macs
    assert every.weights == last.weights


def test_kv_bytes_by_hand() -> None:
    assert flops.kv_bytes(TINY, (3, 1)) == 2 * 2 * 2 * 4
    assert flops.kv_bytes(TINY, (3, 1), batch=5) == 5 * flops.kv_bytes(TINY, (3, 1))
    assert flops.kv_bytes(NEXT["7b"].language, flops.every_layer(NEXT["7b"].language, 2880)) == 1440 * 2**20
    assert NEXT["7b"].language.kv_bytes_per_token == 524288
    assert NEXT["13b"].language.kv_bytes_per_token == 819200


@pytest.mark.parametrize("tokens", [(3,), (3, 3, 3), (3, -1), ()])
def test_tokens_are_given_for_every_layer(tokens: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="each of 2 layers"):
        flops.prefill(TINY, tokens)


@pytest.mark.parametrize("size", NEXT)
@pytest.mark.parametrize("t", [288, 2880])
def test_equation_9_is_the_layers_matrix_products(size: str, t: int) -> None:
    shape = NEXT[size].language
    ops = flops.prefill(shape, flops.every_layer(shape, t))
    layers = [op for op in ops if op.name not in ("angles", "head")]
    assert total(layers).matmul_flops == equation_9(shape, t)


# Reference page, section 1.2: GB moved by 7B at R = 100 and 10 %; weights read by one step: 13.21 and 25.70 GB.
def test_published_traffic() -> None:
    shape = NEXT["7b"].language
    fused = [total(flops.prefill(shape, flops.every_layer(shape, t), fusion=Fusion.ALL)).bytes for t in (2880, 288)]
    assert [round(value / 1e9, 1) for value in fused] == [26.3, 14.5]
    steps = [total(flops.decode_step(m.language, flops.every_layer(m.language, 9))).weights for m in NEXT.values()]
    assert [round(value / 1e9, 2) for value in steps] == [13.21, 25.70]


# --- vision ----------------------------------------------------------------------------------------------------------


def test_tower_by_hand() -> None:
    """Two views of 4 patches: convolution, then three layers of 5 positions at width 3."""
    ops = by_name(flops.tower(VISION, 2))
    n = 10
    assert ops["patches"].macs == 8 * 12 * 3
    assert {op.times for name, op in ops.items() if name not in ("patches", "positions", "first norm")} == {3}
    assert [ops[name].macs for name in "qkvo"] == [n * 9] * 4
    assert [ops[name].weights for name in "qkvo"] == [(3 + 1) * 3 * 2] * 4
    assert [ops[name].macs for name in ("q·k", "scores·v")] == [2 * 25 * 3] * 2
    assert ops["q·k"].activations == (2 * n * 3 + 2 * 25) * 2  # queries, keys, the map; no cache
    assert [ops[name].macs for name in ("fc1", "fc2")] == [n * 15] * 2
    assert sum(op.cache for op in ops.values()) == 0
    assert total(flops.tower(VISION, 2, layers=4)).macs - total(flops.tower(VISION, 2)).macs == (
        4 * n * 9 + 2 * 2 * 25 * 3 + 2 * n * 15
    )


def test_selection_by_hand() -> None:
    none = flops.selection(VISION, 2, kept=3, cls_rows=0)
    assert none == (Op(name="gather", activations=2 * 3 * 3 * 2),)
    row = by_name(flops.selection(VISION, 2, kept=3))
    assert row["keys"].macs == 10 * 9
    assert row["query"].macs == 2 * 9
    assert row["row"].macs == 10 * 3
    keys = by_name(flops.selection(VISION, 2, kept=3, cls_rows=0, key_rows=1))
    assert total(keys.values()).macs == 10 * 9
    twice = flops.selection(VISION, 2, kept=3, cls_rows=2, key_rows=1)
    assert total(twice).macs == 2 * (90 + 18 + 30) + 90


def test_a_methods_own_products_by_hand() -> None:
    """Three times 2×4 by 4×5, in float32; what multiplies nothing is left out."""
    own = Product("likeness", 2, 4, 5, times=3)
    assert own.macs == 3 * 40
    (op,) = flops.products([own, Product("merge", 9, 0, 4)])
    assert op == Op(name="likeness", macs=40, activations=(8 + 20 + 10) * 4, times=3)
    assert total(flops.products([own], batch=2)).macs == 2 * own.macs


@pytest.mark.parametrize(("layers", "macs"), [(0, 0), (1, 3 * 4), (2, 3 * 4 + 16), (3, 3 * 4 + 32)])
def test_projector_by_hand(layers: int, macs: int) -> None:
    model = replace(SMALL, projector=layers)
    cost = total(flops.projector(model, 5))
    assert cost.macs == 5 * macs
    assert cost.weights == 2 * model.projector_parameters


def test_published_vision() -> None:
    """Reference page, section 2: 1.910 TFLOP for 24 layers on 5 views; the projector 0.121 and 0.181."""
    assert round(total(flops.tower(NEXT["7b"].tower, 5, layers=24)).matmul_flops / 1e12, 3) == 1.910
    found = [round(total(flops.projector(model, 2880)).matmul_flops / 1e12, 3) for model in NEXT.values()]
    assert found == [0.121, 0.181]


# --- what must hold for all ------------------------------------------------------------------------------------------

COUNTS = st.integers(0, 40)
FUSIONS = st.sampled_from(list(Fusion))


@st.composite
def shapes(draw: st.DrawFn) -> Language:
    groups, kv = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    return Language(
        width=draw(st.integers(1, 9)),
        inner=draw(st.integers(1, 9)),
        layers=draw(st.integers(1, 4)),
        heads=groups * kv,
        kv_heads=kv,
        head_width=draw(st.integers(1, 5)),
        vocabulary=draw(st.integers(1, 9)),
        element_bytes=draw(st.sampled_from([1, 2, 4])),
    )


@st.composite
def requests(draw: st.DrawFn) -> tuple[Language, list[int]]:
    shape = draw(shapes())
    return shape, draw(st.lists(COUNTS, min_size=shape.layers, max_size=shape.layers))


@settings(deadline=None, max_examples=25)
@given(requests(), FUSIONS, st.data())
def test_more_tokens_never_cost_less(request_, fusion: Fusion, data) -> None:
    """Angles apart, which neighbouring layers of the same size share: one more token may make two layers alike."""
    shape, tokens = request_
    layer = data.draw(st.integers(0, shape.layers - 1))
    more = [count + (index == layer) for index, count in enumerate(tokens)]
    less, cost = (
        total([op for op in flops.prefill(shape, counts, fusion=fusion) if op.name != "angles"])
        for counts in (tokens, more)
    )
    for field in ("macs", "flops", "bytes", "cache"):
        assert getattr(cost, field) > getattr(less, field), field
    assert cost.weights == less.weights


@pytest.mark.parametrize(("tokens", "rotated"), [([12, 13], 25), ([13, 13], 13), ([13, 12], 25)])
def test_layers_alike_share_their_angles(tokens: list[int], rotated: int) -> None:
    angles = [op for op in flops.prefill(TINY, tokens) if op.name == "angles"]
    assert total(angles).macs == rotated * TINY.head_width // 2
    # Behind a point a layer rotates anew, however many tokens it is given.
    angles = [op for op in flops.prefill(TINY, tokens, runs=(0, 1)) if op.name == "angles"]
    assert total(angles).macs == sum(tokens) * TINY.head_width // 2


@settings(deadline=None, max_examples=25)
@given(requests(), FUSIONS)
def test_layers_add_up(request_, fusion: Fusion) -> None:
    """A model costs what its layers cost as models of one layer; angles, last norm and head apart."""
    shape, tokens = request_
    apart = ("angles", "last norm", "head")

    def layers(one: Language, counts: list[int]) -> list[Op]:
        return [op for op in flops.prefill(one, counts, fusion=fusion) if op.name not in apart]

    alone = [op for count in tokens for op in layers(replace(shape, layers=1), [count])]
    assert total(layers(shape, tokens)) == total(alone)


@settings(deadline=None, max_examples=25)
@given(requests(), st.integers(1, 4))
def test_fusing_never_moves_or_computes_more(request_, batch: int) -> None:
    shape, tokens = request_
    unfused, flash, fused = (total(flops.prefill(shape, tokens, batch=batch, fusion=fusion)) for fusion in Fusion)
    assert unfused.bytes >= flash.bytes >= fused.bytes
    assert unfused.macs >= flash.macs >= fused.macs
    assert unfused.flops >= flash.flops >= fused.flops
    assert unfused.weights == flash.weights == fused.weights
    vision = [total(flops.tower(VISION, batch, fusion=fusion)) for fusion in Fusion]
    assert vision[0].bytes >= vision[1].bytes >= vision[2].bytes
    assert vision[0].macs == vision[1].macs == vision[2].macs  # nothing is masked


@settings(deadline=None, max_examples=25)
@given(requests(), FUSIONS, st.integers(2, 5))
def test_a_batch_shares_the_weights_alone(request_, fusion: Fusion, batch: int) -> None:
    shape, tokens = request_
    one, many = (total(flops.prefill(shape, tokens, batch=n, fusion=fusion)) for n in (1, batch))
    assert many.weights == one.weights
    assert (many.macs, many.flops) == (batch * one.macs, batch * one.flops)
    assert (many.cache, many.activations) == (batch * one.cache, batch * one.activations)


@settings(deadline=None, max_examples=25)
@given(requests(), FUSIONS)
def test_flops_are_two_per_mac_and_the_rest(request_, fusion: Fusion) -> None:
    shape, tokens = request_
    ops = flops.prefill(shape, tokens, fusion=fusion)
    cost = total(ops)
    assert cost.matmul_flops == 2 * cost.macs
    assert cost.flops == 2 * cost.macs + sum(op.other * op.times for op in ops)


@settings(deadline=None, max_examples=25)
@given(requests(), st.integers(1, 5))
def test_kv_bytes_are_linear_in_tokens(request_, factor: int) -> None:
    shape, tokens = request_
    once = flops.kv_bytes(shape, tokens)
    assert flops.kv_bytes(shape, [factor * count for count in tokens]) == factor * once
    assert flops.kv_bytes(shape, [count + 1 for count in tokens]) == once + shape.kv_bytes_per_token
    # What prefill writes into the cache is what the cache then occupies.
    written = sum(op.cache * op.times for op in flops.prefill(shape, tokens) if op.name in ("k", "v"))
    assert written == once


@settings(deadline=None, max_examples=25)
@given(shapes(), st.integers(0, 20), st.integers(1, 20), FUSIONS.filter(lambda fusion: fusion is not Fusion.NONE))
def test_reading_in_two_parts_computes_the_same(shape: Language, first: int, second: int, fusion: Fusion) -> None:
    """A prompt read as a cached beginning and the rest multiplies what the whole does, the first head apart."""
    each = [flops.every_layer(shape, count) for count in (first, second, first + second)]
    parts = [flops.prefill(shape, each[0], fusion=fusion), flops.prefill(shape, each[1], cached=each[0], fusion=fusion)]
    whole = flops.prefill(shape, each[2], fusion=fusion)
    assert sum(total(part).macs for part in parts) - shape.width * shape.vocabulary == total(whole).macs


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 6), st.integers(0, 50), FUSIONS)
def test_vision_is_monotone_too(views: int, kept: int, fusion: Fusion) -> None:
    for stage in (
        lambda v, k: flops.tower(VISION, v, fusion=fusion),
        lambda v, k: flops.selection(VISION, v, k, fusion=fusion),
        lambda v, k: flops.projector(SMALL, v + k, fusion=fusion),
    ):
        small, large = total(stage(views, kept)), total(stage(views + 1, kept + 1))
        assert large.bytes > small.bytes
        assert large.macs > small.macs
