"""Operators of every stage of answering about an image, with what each multiplies, computes and moves.

A stage is a tuple of `Op`s, a function of sizes and of the number of tokens in every layer; nothing is measured and no
tensor is made. T tokens in a Llama-like layer of width d and MLP width m, with as many key as query heads h, cost
4Td² + 3Tdm + 2T²d multiply-accumulates (MACs): arXiv 2501.05179, eq. (9), whose 8Td² + 4T²d + 6Tdm counts two
operations (FLOPs) per MAC.

What is moved depends on how operators are fused (`Fusion`); FLOPs are by convention those of the unfused arrangement.
Left out, as small: embedding look-ups, preprocessing, sorting of scores, placing tokens into the sequence, and what a
method computes element by element. Matrix products are all there: unfused, what torch's `FlopCounterMode` counts.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import groupby, pairwise
from typing import TYPE_CHECKING

from llava.constants import InputError
from llava.efficiency.ops import (
    ADD,
    GATE,
    GELU,
    NORM,
    ROTATE,
    Fusion,
    Op,
    Ops,
    attention,
    linear,
    matrix_products,
    pointwise,
)
from llava.efficiency.shapes import Language, Model, Tower

if TYPE_CHECKING:
    from llava.compress.stages import Product  # which loads torch; formulas need none


def every_layer(shape: Language, tokens: int) -> tuple[int, ...]:
    """Return the tokens per layer of a model in which no layer drops any."""
    return (tokens,) * shape.layers


def prefill(
    shape: Language,
    tokens: Sequence[int],
    *,
    mlp_tokens: Sequence[int] | None = None,
    cached: Sequence[int] | None = None,
    runs: Sequence[int] | None = None,
    logits: int = 1,
    batch: int = 1,
    fusion: Fusion = Fusion.NONE,
) -> Ops:
    """Return the operators of reading a prompt.

    Args:
        shape: the language model.
        tokens: entering every layer.
        mlp_tokens: entering every layer's MLP, where a method drops some between attention and MLP; None: the same.
        cached: tokens whose keys and values every layer has already, as of a shared beginning; None: none.
        runs: first layers of runs that share their positions, 0 included; None: of those that see the same number.
        logits: positions of every sequence whose logits are computed; the last alone is needed.
        batch: sequences of these lengths run at once, which share the reading of the weights.
        fusion: what is moved.

    Raises:
        InputError: the numbers of tokens are not one per layer.
    """
    before = every_layer(shape, 0) if cached is None else tuple(cached)
    after = tuple(tokens) if mlp_tokens is None else tuple(mlp_tokens)
    for counts in (tokens, after, before):
        if len(counts) != shape.layers or min(counts) < 0:
            raise InputError(f"give tokens for each of {shape.layers} layers, none negative, got {list(counts)}")
    seen = list(zip(tokens, before, strict=True))
    begun = [i for i, now in enumerate(seen) if not i or now != seen[i - 1]] if runs is None else runs
    # Neighbouring layers of the same size are one set of operators that runs several times.
    groups = [(sizes, len(list(same))) for sizes, same in groupby(zip(tokens, after, before, strict=True))]
    return (
        *(op for layer in begun for op in _angles(shape, batch * tokens[layer], fusion)),
        *(
            op.repeated(number)
            for (queries, left, held), number in groups
            for op in _decoder_layer(shape, queries, left, held, batch, fusion)
        ),
        *_head(shape, batch * after[-1], batch * logits, fusion),
    )


def decode_step(
    shape: Language,
    cached: Sequence[int],
    *,
    runs: Sequence[int] | None = None,
    batch: int = 1,
    fusion: Fusion = Fusion.NONE,
) -> Ops:
    """Return the operators of producing one more token.

    Args:
        shape: the language model.
        cached: tokens in every layer's KV cache beforehand.
        runs: as in `prefill`.
        batch: sequences of this length run at once.
        fusion: what is moved.
    """
    return prefill(shape, every_layer(shape, 1), cached=cached, runs=runs, batch=batch, fusion=fusion)


def kv_bytes(shape: Language, tokens: Sequence[int], batch: int = 1) -> int:
    """Return what the KV cache occupies, in bytes: 2 · layers · width of the keys · element for every token.

    Args:
        shape: the language model.
        tokens: whose keys and values every layer holds.
        batch: sequences of this length.
    """
    return 2 * shape.kv_width * shape.element_bytes * sum(tokens) * batch


def tower(
    shape: Tower,
    views: int,
    *,
    layers: int | None = None,
    tokens: Sequence[int] | None = None,
    fusion: Fusion = Fusion.NONE,
) -> Ops:
    """Return the operators of encoding views in one call.

    Args:
        shape: the vision tower.
        views: of all images together.
        layers: how many run; None: as many as the features need.
        tokens: of a view, [CLS] included, that enter every layer, and one more, those that leave the last; None: all.
        fusion: what is moved; nothing is hidden by a mask here.

    Raises:
        InputError: the numbers of tokens do not fit the layers.
    """
    c, e, n = shape.width, shape.element_bytes, views * shape.positions
    fan_in = shape.channels * shape.patch_size**2
    patches = linear("patches", views * shape.patches, fan_in, c, e)
    once = (patches, pointwise("positions", n * c, ADD, 2, e), pointwise("first norm", n * c, NORM, 2, e))
    run = shape.depth if layers is None else layers
    sizes = (shape.positions,) * (run + 1) if tokens is None else tuple(tokens)
    if len(sizes) != run + 1 or min(sizes) < 1:
        raise InputError(f"give tokens for each of {run} layers of the tower and for the features, got {list(sizes)}")
    # Neighbouring layers of the same size are one set of operators that runs several times.
    groups = [(pair, len(list(same))) for pair, same in groupby(pairwise(sizes))]
    encoder = (op.repeated(number) for pair, number in groups for op in _encoder_layer(shape, views, *pair, fusion))
    ops = (*once, *encoder)
    return matrix_products(ops) if fusion is Fusion.ALL else ops


def selection(
    shape: Tower, views: int, kept: int, *, cls_rows: int = 1, key_rows: int = 0, fusion: Fusion = Fusion.NONE
) -> Ops:
    """Return the operators of looking at attention and gathering what is kept (see `compress.attention`).

    Args:
        shape: the vision tower.
        views: of all images together.
        kept: patches gathered, at the tower's width.
        cls_rows: layers whose [CLS] row is recomputed: one norm, one projection of the keys, one query, its products.
        key_rows: layers whose keys are recomputed: one norm, one projection.
        fusion: what is moved.
    """
    c, e, n = shape.width, shape.element_bytes, views * shape.positions
    keys = (pointwise("norm", n * c, NORM, 2, e), linear("keys", n, c, c, e, bias=True))
    scores = views * shape.heads * shape.positions * 4  # in float32
    row = (
        *keys,
        linear("query", views, c, c, e, bias=True),
        Op(name="row", macs=n * c, activations=(n + views) * c * e + scores),
    )
    looks = (*row * cls_rows, *keys * key_rows)
    looks = matrix_products(looks) if fusion is Fusion.ALL else looks
    return (*looks, Op(name="gather", activations=2 * kept * c * e))


def products(own: Iterable["Product"], *, batch: int = 1) -> Ops:
    """Return the operators of a method's own matrix products; they are unfused, and in float32.

    Args:
        own: the products of one request.
        batch: requests alike.
    """
    return tuple(
        Op(
            name=each.name,
            macs=each.rows * each.inner * each.columns,
            activations=(each.rows * each.inner + each.inner * each.columns + each.rows * each.columns) * 4,
            times=batch * each.times,
        )
        for each in own
        if each.macs
    )


def projector(model: Model, tokens: int, *, fusion: Fusion = Fusion.NONE) -> Ops:
    """Return the operators of bringing tokens from the tower's width to the language model's.

    Args:
        model: gives both widths and the projector's depth.
        tokens: that are projected.
        fusion: what is moved.
    """
    d, e = model.language.width, model.language.element_bytes
    ops: list[Op] = []
    for layer in range(model.projector):
        if layer:
            ops.append(pointwise("gelu", tokens * d, GELU, 2, e))
        ops.append(linear(f"linear {layer}", tokens, d if layer else model.tower.width, d, e, bias=True))
    return matrix_products(ops) if fusion is Fusion.ALL else tuple(ops)


def _decoder_layer(shape: Language, queries: int, left: int, held: int, batch: int, fusion: Fusion) -> Ops:
    """One layer: `queries` new tokens of each sequence behind `held` cached ones, `left` of them in the MLP."""
    d, m, q, kv, e = shape.width, shape.inner, shape.query_width, shape.kv_width, shape.element_bytes
    rows, mlp_rows, keys = batch * queries, batch * left, held + queries
    attended = attention(
        shape.heads,
        width=q,
        rows=rows,
        stored=batch * keys * kv * e,
        square=batch * queries * keys,
        # Query i sees the cached tokens, those before it and itself.
        seen=batch * (queries * keys - queries * (queries - 1) // 2),
        element=e,
        fusion=fusion,
    )
    if fusion is Fusion.ALL:
        projected = linear("q k v", rows, d, q + 2 * kv, e)
        gated = linear("gate up", mlp_rows, d, 2 * m, e)
        return (
            replace(projected, cache=2 * rows * kv * e, activations=rows * (d + q) * e),
            *attended,
            linear("o", rows, q, d, e),
            replace(gated, activations=mlp_rows * (d + m) * e),  # their product alone is written
            linear("down", mlp_rows, m, d, e),
        )
    projected = replace(linear("k", rows, d, kv, e), cache=rows * kv * e, activations=rows * d * e)
    return (
        pointwise("input norm", rows * d, NORM, 2, e),
        linear("q", rows, d, q, e),
        projected,
        replace(projected, name="v"),
        pointwise("rotary", rows * (q + kv), ROTATE, 2, e),
        *attended,
        linear("o", rows, q, d, e),
        pointwise("attention add", rows * d, ADD, 2, e),
        pointwise("post norm", mlp_rows * d, NORM, 2, e),
        linear("gate", mlp_rows, d, m, e),
        linear("up", mlp_rows, d, m, e),
        pointwise("activation", mlp_rows * m, GATE, 3, e),
        linear("down", mlp_rows, m, d, e),
        pointwise("mlp add", mlp_rows * d, ADD, 2, e),
    )


def _angles(shape: Language, rows: int, fusion: Fusion) -> Ops:
    """The rotation of every position, once for all layers that see the same; a product up to transformers 5.22."""
    if fusion is Fusion.ALL:
        return ()
    half = rows * (shape.head_width // 2)
    return (Op(name="angles", macs=half, activations=4 * half * shape.element_bytes),)  # cos and sin, for both halves


def _head(shape: Language, rows: int, logits: int, fusion: Fusion) -> Ops:
    """The last norm, and the logits of some positions."""
    d, e = shape.width, shape.element_bytes
    ops = (pointwise("last norm", rows * d, NORM, 2, e), linear("head", logits, d, shape.vocabulary, e))
    return matrix_products(ops) if fusion is Fusion.ALL else ops


def _encoder_layer(shape: Tower, views: int, entering: int, leaving: int, fusion: Fusion) -> Ops:
    """One layer of CLIP, whose MLP may run on fewer tokens than its attention."""
    c, m, e, n = shape.width, shape.inner, shape.element_bytes, views * entering
    square, left = n * entering, views * leaving
    attended = attention(
        shape.heads, width=c, rows=n, stored=n * c * e, square=square, seen=square, element=e, fusion=fusion
    )
    # There is no cache: keys and values are activations like any other.
    attended = tuple(replace(op, cache=0, activations=op.activations + op.cache) for op in attended)
    if fusion is Fusion.ALL:
        projected: Ops = (linear("q k v", n, c, 3 * c, e, bias=True),)
    else:
        projected = tuple(linear(name, n, c, c, e, bias=True) for name in "qkv")
    return (
        pointwise("norm 1", n * c, NORM, 2, e),
        *projected,
        *attended,
        linear("o", n, c, c, e, bias=True),
        pointwise("attention add", n * c, ADD, 2, e),
        pointwise("norm 2", left * c, NORM, 2, e),
        linear("fc1", left, c, m, e, bias=True),
        pointwise("gelu", left * m, GELU, 2, e),
        linear("fc2", left, m, c, e, bias=True),
        pointwise("mlp add", left * c, ADD, 2, e),
    )
