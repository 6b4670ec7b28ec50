"""Merging inside the encoder: tokens really get fewer, every image is as if alone, and the tower is as before."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from llava.anyres import AnyResGrid
from llava.compress import available, get, method_class
from llava.compress.attach import Session, attach
from llava.compress.base import Compressor, Layout, Views, uniform_counts
from llava.compress.encoding import EncoderTokens, InEncoder, Merging, stand_in
from llava.compress.trace import Trace
from llava.constants import InputError
from llava.mm_utils import process_images
from tests.compress.test_attach import hooks, make_tower
from tests.conftest import picture

# A single view; padding above and below, at the sides, none; crops that show nothing of the image at all.
GRIDS = [
    AnyResGrid(image_size=(56, 56), side=4),
    AnyResGrid(image_size=(100, 30), crops=(2, 1), side=4),
    AnyResGrid(image_size=(30, 100), crops=(1, 2), side=4),
    AnyResGrid(image_size=(64, 64), crops=(2, 2), side=4),
    AnyResGrid(image_size=(500, 7), crops=(1, 2), side=4),
]
PIXELS = torch.randn(sum(g.n_views for g in GRIDS), 3, 56, 56, generator=torch.Generator().manual_seed(3))
SPANS = [slice(sum(g.n_views for g in GRIDS[:i]), sum(g.n_views for g in GRIDS[: i + 1])) for i in range(len(GRIDS))]
DEPTH = 4

METHODS = [name for name in available() if issubclass(method_class(name), InEncoder)]
SPECS = [
    "tome(retention_ratio=0.4)",
    "tome(retention_ratio=0.4, proportional=False)",
    "tome(r=2)",
    "ficoco_v(retention_ratio=0.4)",
    "ficoco_v(retention_ratio=0.4, profile='paper')",
    "ficoco_v(retention_ratio=0.4, cls_free=True)",
    "ficoco_v(retention_ratio=0.4, epsilon=0.7, control_encoding_layer=-1)",
    "ficoco_v(r=3)",
    "ficoco_vl(retention_ratio=0.4)",
]


@torch.no_grad()
def encode(tower: Any, method: Compressor, pixels: Tensor = PIXELS, grids: Any = GRIDS) -> tuple[Session, list[Views]]:
    with attach(tower=tower.vision_tower, method=method, depth=tower.depth, grids=grids) as session:
        hidden = tower.hidden(pixels)
        session.finish(tower.depth, hidden)
    return session, session.views(hidden, grids, Layout())


def by_patch(views: Views) -> list[dict[int, Tensor]]:
    """Features of every view by patch id."""
    rows = zip(views.ids, views.valid, views.features, strict=True)
    return [{int(i): x for i, ok, x in zip(*row, strict=True) if ok} for row in rows]


def test_the_methods_are_known() -> None:
    assert METHODS == ["ficoco_v", "ficoco_vl", "tome"]


# --- what happens to the tokens --------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", SPECS)
def test_later_layers_run_on_fewer_tokens(spec: str) -> None:
    tower, method, lengths = make_tower(), get(spec), {}
    layers = tower.vision_tower.encoder.layers

    def look(key: tuple[int, str]) -> Callable[..., None]:
        return lambda module, args: lengths.update({key: args[0].shape[1]})

    handles = [layer.register_forward_pre_hook(look((i, "layer"))) for i, layer in enumerate(layers)]
    handles += [layer.mlp.register_forward_pre_hook(look((i, "mlp"))) for i, layer in enumerate(layers)]
    _, batch = encode(tower, method)
    for handle in handles:
        handle.remove()
    rows = [method.patches_per_layer(grid, Layout(), DEPTH) for grid in GRIDS]
    entering = [1 + max(max(image[layer]) for image in rows) for layer in range(DEPTH + 1)]
    assert [lengths[layer, "layer"] for layer in range(DEPTH)] == entering[:-1]
    assert [lengths[layer, "mlp"] for layer in range(DEPTH)] == entering[1:]
    assert entering[-1] < 17
    for views, image in zip(batch, rows, strict=True):
        assert tuple(views.valid.sum(1).tolist()) == image[-1]
        assert views.features.shape[1] == max(image[-1])  # not longer than if alone


@pytest.mark.parametrize("spec", SPECS)
def test_every_image_is_as_if_alone(spec: str) -> None:
    tower, method = make_tower(), get(spec)
    _, together = encode(tower, method)
    for grid, span, views in zip(GRIDS, SPANS, together, strict=True):
        (alone,) = encode(tower, method, PIXELS[span], [grid])[1]
        for ours, theirs in zip(by_patch(views), by_patch(alone), strict=True):
            assert list(ours) == list(theirs)  # in the same order
            for patch, x in ours.items():
                torch.testing.assert_close(x, theirs[patch], atol=2e-5, rtol=1e-4)
        assert torch.equal(method.select(views).kept, method.select(alone).kept)


@pytest.mark.parametrize("spec", SPECS)
def test_what_padding_shows_reaches_nobody_after_the_first_point(spec: str) -> None:
    """Padding is no source and no target: its values, swapped for others between attention and MLP, change nothing."""
    method = get(spec)
    seen = []

    class Watched(type(method)):  # type: ignore[misc]
        def reduce_in_encoder(self, tokens: EncoderTokens) -> Merging:
            empty = torch.nn.functional.pad(~tokens.alive, (1, 0))
            seen.append(bool(empty.any()))
            noise = torch.full_like(tokens.hidden, 1e3)
            keys = torch.where(empty[:, None, :, None], 7.0, tokens.keys)
            hidden = torch.where(empty[..., None], noise, tokens.hidden)
            queries = torch.where(empty[:, None, :, None], -9.0, tokens.queries)
            if method.profile == "paper":  # probabilities are what the layer's attention was, padding included
                keys, queries = tokens.keys, tokens.queries
            return super().reduce_in_encoder(replace(tokens, hidden=hidden, keys=keys, queries=queries))

    watched = Watched(**{name: getattr(method, name) for name in (f.name for f in fields(method))})
    tower = make_tower()
    for views, expected in zip(encode(tower, watched)[1], encode(tower, method)[1], strict=True):
        for ours, theirs in zip(by_patch(views), by_patch(expected), strict=True):
            assert list(ours) == list(theirs)
            for patch, x in ours.items():
                torch.testing.assert_close(x, theirs[patch], atol=2e-5, rtol=1e-4)
    assert any(seen)


@pytest.mark.parametrize("spec", SPECS)
def test_half_precision(spec: str) -> None:
    tower, method = make_tower(), get(spec)
    tower.vision_tower.bfloat16()
    for views, grid in zip(encode(tower, method)[1], GRIDS, strict=True):
        assert views.features.dtype == torch.bfloat16
        assert bool(views.features.isfinite().all())
        valid = grid.valid()
        for patches, mine in zip(by_patch(views), valid, strict=True):
            assert all(mine[patch] for patch in patches)
        selection, plan = method.select(views), method.plan(grid)
        assert plan.at_least <= int(selection.kept.sum()) <= plan.at_most


@pytest.mark.parametrize("spec", SPECS)
def test_nothing_is_read_from_the_device(spec: str) -> None:
    tower = make_tower()
    tower.vision_tower.to("meta")  # holds no values: whatever asks for one raises
    _, batch = encode(tower, get(spec), PIXELS.to("meta"))
    assert {views.features.device.type for views in batch} == {"meta"}
    for views in batch:
        assert get(spec).select(views).order.device.type == "meta"


@pytest.mark.parametrize("name", METHODS)
def test_keeping_everything_leaves_the_encoder_alone(name: str) -> None:
    tower = make_tower()
    session, batch = encode(tower, get(name, retention_ratio=1.0))
    plain = encode(tower, get("none"))[1]
    assert session.shortening is None
    for ours, theirs in zip(batch, plain, strict=True):
        assert ours.ids is None
        assert torch.equal(ours.features, theirs.features)


@pytest.mark.parametrize("name", METHODS)
def test_several_runs_in_one_block_do_not_mix(name: str) -> None:
    tower, method = make_tower(), get(name, retention_ratio=0.4)
    with torch.no_grad(), attach(tower=tower.vision_tower, method=method, depth=4, grids=GRIDS) as session:
        first = tower.hidden(PIXELS)
        tower.hidden(-PIXELS)
        assert torch.equal(tower.hidden(PIXELS), first)
        with pytest.raises(ValueError, match=r"2 views for grids of 15"):
            tower.hidden(PIXELS[:2])
    assert session.shortening is not None


def test_a_method_must_be_told_the_grids() -> None:
    with pytest.raises(ValueError, match="grids"), attach(tower=make_tower().vision_tower, method=get("tome")):
        pass
    views = Views(features=torch.zeros(1, 16, 8), grid=GRIDS[0])
    with pytest.raises(ValueError, match="tome merges inside the encoder"):
        get("tome").select(views)


# --- the tower afterwards --------------------------------------------------------------------------------------------


def forwards(tower: Any) -> list[Any]:
    return [vars(layer).get("forward") for layer in tower.vision_tower.encoder.layers]


@contextmanager
def unchanged(tower: Any) -> Iterator[None]:
    with torch.no_grad():
        before, own = tower.vision_tower(PIXELS).last_hidden_state, forwards(tower)
        yield
        assert torch.equal(tower.vision_tower(PIXELS).last_hidden_state, before)
    assert forwards(tower) == own
    assert hooks(tower) == 0


@pytest.mark.parametrize("name", METHODS)
def test_the_tower_is_bit_identical_afterwards(name: str) -> None:
    tower = make_tower()
    with unchanged(tower):
        encode(tower, get(name, retention_ratio=0.4))
    assert not any(forwards(tower))


def test_also_after_an_error_in_the_method() -> None:
    class Failing(method_class("tome")):  # type: ignore[misc]
        def reduce_in_encoder(self, tokens: EncoderTokens) -> Merging:
            raise ZeroDivisionError

    tower = make_tower()
    with unchanged(tower), pytest.raises(ZeroDivisionError):
        encode(tower, Failing(retention_ratio=0.4))
    with unchanged(tower), pytest.raises(InputError, match="first_layer"):
        encode(tower, get("tome(retention_ratio=0.01, first_layer=3)"))


def test_other_peoples_forward_stays() -> None:
    # accelerate puts such wrappers on the layers it moves.
    tower = make_tower()
    layer = tower.vision_tower.encoder.layers[2]
    layer.forward = (lambda forward: lambda *args, **kwargs: forward(*args, **kwargs))(layer.forward)
    with unchanged(tower):
        encode(tower, get("tome(retention_ratio=0.4)"))


def test_other_towers_are_left_alone() -> None:
    tower, other = make_tower(), make_tower()
    with torch.no_grad(), attach(tower=tower.vision_tower, method=get("tome"), depth=4, grids=GRIDS):
        assert other.hidden(PIXELS).shape[1] == 17
        assert tower.hidden(PIXELS).shape[1] < 17
        assert not any(forwards(other))


# --- budgets ---------------------------------------------------------------------------------------------------------

CANVASES = [None, (2, 2), (1, 2), (2, 1), (3, 1), (1, 3)]
SIZES = [(500, 375), (640, 480), (300, 700), (672, 336), (1000, 250), (300, 1000), (672, 672), (1280, 720), (97, 1024)]


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("ratio", [0.75, 0.5, 0.25, 0.1])
def test_schedules_end_at_the_budget(name: str, ratio: float) -> None:
    method = get(name, retention_ratio=ratio)
    share = method.encoder_ratio
    for size in SIZES:
        for crops in CANVASES:
            grid = AnyResGrid(image_size=size, crops=crops)
            rows = method.patches_per_layer(grid, Layout(), 23)
            assert len(rows) == 24
            first = method.encoder_points(23)[0]
            assert set(rows[: first + 1]) == {(576,) * grid.n_views}
            sizes = (576, *grid.crop_patches())
            for n, k, path in zip(sizes, uniform_counts(share, grid), zip(*rows, strict=True), strict=True):
                assert abs(k - share * n) < 1
                assert path[-1] == max(k, min(n, 1))
                steps = [a - b for a, b in zip((n, *path[first + 1 :]), path[first + 1 :], strict=False)]
                assert min(steps) >= 0
                assert sorted(steps, reverse=True) == steps or name == "tome"
                if name == "tome":
                    assert all(r <= left // 2 for r, left in zip(steps, (n, *path[first + 1 :]), strict=False))
            assert method.plan(grid).exact
            assert method.plan(grid).at_least == sum(uniform_counts(share, grid))


def test_the_authors_switch_takes_as_many_from_every_view() -> None:
    """Lengths of the reference (section 7.2): 577, 535, … 115 at the features of −2, 73 behind the last layer."""
    method = get("ficoco_v(r=42, control_encoding_layer=11)")
    single = AnyResGrid(image_size=(336, 336))
    rows = method.patches_per_layer(single, Layout(), 24)
    assert [1 + n for (n,) in rows[12:]] == [577, 535, 493, 451, 409, 367, 325, 283, 241, 199, 157, 115, 73]
    assert method.encoder_points(23) == tuple(range(12, 23)) == get("ficoco_v").encoder_points(23)
    plan = method.plan(single)
    assert plan.at_least <= method.patches_per_layer(single, Layout(), 23)[-1][0] == 114 <= plan.at_most
    padded = AnyResGrid(image_size=(1000, 100), crops=(3, 1))  # crops of 2 rows: 48 patches
    assert method.patches_per_layer(padded, Layout(), 23)[-1] == (114, 1, 1, 1)


@pytest.mark.parametrize(
    ("spec", "depth", "named"),
    [
        (
            "tome(retention_ratio=0.1)",
            3,
            r"576 patches down to 57 \(retention_ratio 0.1\) in 3 layers.*at least 12\.50%",
        ),
        ("tome(retention_ratio=0.2, first_layer=2)", 4, r"in 2 layers.*at least 25\.00%.*first_layer"),
        ("tome(first_layer=4)", 4, r"from layer 4 on.*runs 4.*first_layer"),
        ("ficoco_v(control_encoding_layer=11)", 4, r"from layer 12 on.*runs 4.*control_encoding_layer"),
    ],
)
def test_what_cannot_be_is_refused(spec: str, depth: int, named: str) -> None:
    with pytest.raises(InputError, match=named):
        get(spec).patches_per_layer(AnyResGrid(image_size=(336, 336)), Layout(), depth)


@pytest.mark.parametrize(
    "bad",
    [
        "tome(r=0)",
        "tome(r=2, retention_ratio=0.5)",
        "tome(first_layer=-1)",
        "tome(proportional=2)",
        "ficoco_v(profile='released')",
        "ficoco_v(penalty=0.5)",
        "ficoco_v(vision_weight=2)",
        "ficoco_v(epsilon=1.5)",
        "ficoco_v(merge_visual='yes')",
        "ficoco_v(control_encoding_layer=-2)",
        "ficoco_vl(vision_share=2)",
        "ficoco_vl(AT=1)",
        "ficoco_vl(r=4)",
        "ficoco_vl(positions='new')",
    ],
)
def test_bad_values_are_named(bad: str) -> None:
    field, value = re.search(r"\((\w+)=([^,)]+)", bad).groups()  # the first is at fault
    with pytest.raises(InputError, match=rf"\b{field}\b.*{re.escape(value)}"):
        get(bad)


def test_a_stand_in_for_an_encoder() -> None:
    grid = AnyResGrid(image_size=(100, 30), crops=(2, 1), side=4)  # rows 1 and 2 of the crops show the image
    ids, valid = stand_in(grid, Layout(), (5, 3, 0))
    assert ids[:2].tolist() == [[0, 1, 2, 3, 4], [4, 5, 6, 7, 8]]
    assert valid.sum(1).tolist() == [5, 3, 0]


# --- in the model ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["v1.6-vicuna", "v1.5"])
@pytest.mark.parametrize("spec", ["tome(retention_ratio=0.3)", "ficoco_v(retention_ratio=0.3)"])
def test_images_of_a_call_through_the_model(loaded: Any, version: str, spec: str) -> None:
    _, model, processor, _ = loaded(version)
    images = [picture(120, 90), picture(60, 200), picture(84, 84)]
    sizes = [image.size for image in images]
    before, model.method, trace = model.method, get(spec), Trace()
    try:
        with torch.no_grad():
            together = model.compress_images(process_images(images, processor, model.config), sizes, trace)
            for image, packed in zip(images, together, strict=True):
                (alone,) = model.compress_images(process_images([image], processor, model.config), [image.size])
                assert torch.equal(packed.origin, alone.origin)
                torch.testing.assert_close(packed.features, alone.features, atol=1e-4, rtol=1e-3)
    finally:
        model.method = before
    for image, packed in zip(trace.images, together, strict=True):
        assert packed.patches == image.plan.at_least == image.plan.at_most
        kept = packed.origin[packed.origin >= 0]
        assert len(set(kept.tolist())) == len(kept)
        valid = image.grid.valid(image.unpad).flatten()
        assert bool(valid[kept].all())
        assert image.ledger()["kept"] == packed.patches
