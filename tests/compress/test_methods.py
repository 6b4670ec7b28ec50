"""The contract every method keeps, run over whatever the directory holds; the controls; building methods from text."""

import ast
from copy import deepcopy
from dataclasses import FrozenInstanceError, fields, replace
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import llava.compress
from llava.anyres import AnyResGrid
from llava.compress import available, get, method_class
from llava.compress.base import Compressor, Layout, Selection, Views
from llava.compress.encoding import stand_in
from llava.compress.pack import Packed, pack
from llava.constants import InputError

SIDE, DEPTH = 12, 8
# A single view, then the five grids of the checkpoints, padded above, at the sides and not at all.
IMAGES = {
    "single": AnyResGrid(image_size=(500, 375), side=SIDE),
    "2x2": AnyResGrid(image_size=(640, 480), crops=(2, 2), side=SIDE),
    "1x2": AnyResGrid(image_size=(300, 700), crops=(1, 2), side=SIDE),
    "2x1": AnyResGrid(image_size=(672, 336), crops=(2, 1), side=SIDE),
    "3x1": AnyResGrid(image_size=(1000, 250), crops=(3, 1), side=SIDE),
    "1x3": AnyResGrid(image_size=(300, 1000), crops=(1, 3), side=SIDE),
}
RATIOS = (0.75, 0.5, 0.25, 0.1)
LAYOUTS = [Layout(), Layout(unpad=False, newline="none"), Layout(unpad=False, newline="none", placement="flat")]

every_method = pytest.mark.parametrize("name", available())
every_method_with_a_ratio = pytest.mark.parametrize("name", [n for n in available() if method_class(n).has_ratio])
every_image = pytest.mark.parametrize("image", IMAGES)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def views_of(
    grid: AnyResGrid, method: str | Compressor, dtype: torch.dtype = torch.float32, layout: Layout = Layout()
) -> Views:
    """A random image after the encoder, with all that the method taps and as many patches as it leaves there."""
    method = get(method) if isinstance(method, str) else method
    taps, draw, ids, valid = method.taps, torch.Generator().manual_seed(1), None, None
    v, n, c, h = grid.n_views, grid.patches_per_view, 8, 2
    if method.encoder_points(DEPTH):
        ids, valid = stand_in(grid, layout, method.patches_per_layer(grid, layout, DEPTH)[-1])
        n = ids.shape[1]

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw)

    return Views(
        features=noise(v, n, c).to(dtype),
        grid=grid,
        cls_logits={layer: noise(v, h, 1 + n) for layer in taps.cls},
        keys={layer: noise(v, n, c).to(dtype) for layer in taps.keys},
        cls=noise(v, c).to(dtype) if taps.cls_feature else None,
        layout=layout,
        ids=ids,
        valid=valid,
    )


def projected(features: Tensor) -> Tensor:
    return features @ torch.linspace(-1, 1, 8 * 5).reshape(8, 5).to(features.dtype)


def packed_of(views: Views, selection: Selection) -> Packed:
    return pack(views, selection, projected, torch.full((5,), 3.0))


# --- the contract ----------------------------------------------------------------------------------------------------


@every_method
@every_image
@every_dtype
@pytest.mark.parametrize("ratio", RATIOS)
def test_kept_tokens(name: str, image: str, dtype: torch.dtype, ratio: float) -> None:
    for layout in LAYOUTS:
        method = get(name, retention_ratio=ratio)
        views = views_of(IMAGES[image], method, dtype, layout)
        selection, plan = method.select(views), method.plan(views.grid, layout)

        kept = [order[:k].tolist() for order, k in zip(selection.order, selection.count.tolist(), strict=True)]
        assert selection.order.shape == views.valid.shape
        for mine, valid in zip(kept, views.valid, strict=True):
            assert len(set(mine)) == len(mine)
            assert set(mine) <= set(valid.nonzero().flatten().tolist())
        assert [sorted(a) for a in kept] == [sorted(b.tolist()) for b in selection.keep]
        assert [sorted(a) for a in kept] == [row.nonzero().flatten().tolist() for row in selection.kept]

        total = sum(map(len, kept))
        assert plan.at_least <= total <= plan.at_most
        assert total > 0
        assert plan.patches == views.grid.n_patches(layout.unpad)
        assert selection.total in (None, total)

        packed = packed_of(views, selection)
        assert packed.patches == total == int((packed.origin >= 0).sum())
        # What is in the sequence is what was selected: these patches of these views, the features those of the patches.
        names = [row.tolist() for row in views.ids] if views.ids is not None else [range(SIDE**2)] * views.grid.n_views
        chosen = {(v, names[v][slot]): (v, slot) for v, mine in enumerate(kept) for slot in mine}
        origin = [divmod(place, SIDE**2) for place in packed.origin.tolist() if place >= 0]
        assert sorted(origin) == sorted(chosen)
        features = views.features if selection.features is None else selection.features
        view, slot = torch.tensor([chosen[patch] for patch in origin]).T
        torch.testing.assert_close(packed.features[packed.origin >= 0], projected(features[view, slot]))
        assert packed.features.dtype == dtype
        assert packed.features.device == views.features.device
        assert selection.order.device == selection.count.device == views.features.device


@every_method
@every_image
def test_a_plan_says_what_was_asked_for(name: str, image: str) -> None:
    """Wherever in the model the ratio is met: what is planned is no more than what enters the language model."""
    method = get(name, retention_ratio=0.625)
    own = {"none": 1.0, "thumbnail_only": method.plan(IMAGES[image]).ratio}
    assert method.plan(IMAGES[image]).ratio == own.get(name, 0.625)
    assert method.follows_ratio == (name not in own)


@pytest.mark.parametrize("spec", ["tome(r=2)", "ficoco_v(r=2)", "ficoco_l(r=2)", "ficoco_vl(r=2, r_language=1)"])
def test_a_number_of_tokens_stands_in_for_the_ratio(spec: str) -> None:
    method = get(spec)
    assert not method.follows_ratio
    assert method.has_ratio
    assert method.plan(IMAGES["2x2"]).ratio is None
    with pytest.raises(InputError, match=r"either r(_language)? or retention_ratio, got \d and 0.5"):
        replace(method, retention_ratio=0.5)


@every_method_with_a_ratio
@every_image
@every_dtype
def test_keeping_everything_is_no_compression(name: str, image: str, dtype: torch.dtype) -> None:
    for layout in LAYOUTS:
        method = get(name, retention_ratio=1.0)
        views = views_of(IMAGES[image], method, dtype, layout)
        ours = packed_of(views, method.select(views))
        plain = packed_of(views, get("none").select(views))
        assert torch.equal(ours.features, plain.features)
        assert torch.equal(ours.origin, plain.origin)


@every_method
@every_image
def test_selecting_twice_gives_the_same_and_leaves_the_views_alone(name: str, image: str) -> None:
    method = get(name, retention_ratio=0.25)
    views = views_of(IMAGES[image], method)
    before = deepcopy(views)
    first, torch_state = method.select(views), torch.get_rng_state()
    second = method.select(views)
    assert torch.equal(first.order, second.order)
    assert torch.equal(first.count, second.count)
    assert torch.equal(torch_state, torch.get_rng_state())  # nobody draws from the global generator
    for tensor, copy in [
        (views.features, before.features),
        (views.valid, before.valid),
        *((views.cls_logits[layer], before.cls_logits[layer]) for layer in before.cls_logits),
        *((views.keys[layer], before.keys[layer]) for layer in before.keys),
    ]:
        assert torch.equal(tensor, copy)


@every_method
@every_image
def test_selecting_waits_for_no_device(name: str, image: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def on_the_host(*args: Any, device: Any = None, make: Any = torch.tensor, **options: Any) -> Tensor:
        assert device is None or torch.device(device).type == "cpu", "it would wait for what the device has to do"
        return make(*args, device=device, **options)

    # A meta tensor holds no values: whatever asks for one raises.
    monkeypatch.setattr(torch, "tensor", on_the_host)
    method = get(name, retention_ratio=0.25)
    views = views_of(IMAGES[image], method)
    views = replace(
        views,
        features=views.features.to("meta"),
        cls_logits={layer: rows.to("meta") for layer, rows in views.cls_logits.items()},
        keys={layer: keys.to("meta") for layer, keys in views.keys.items()},
        valid=views.valid.to("meta"),
        cls=None if views.cls is None else views.cls.to("meta"),
        ids=None if views.ids is None else views.ids.to("meta"),
    )
    selection = method.select(views)
    assert selection.order.device.type == selection.count.device.type == "meta"
    if method.plan(views.grid).exact:
        packed = pack(views, selection, lambda x: x, torch.zeros(8, device="meta"))
        assert packed.patches == selection.total == method.plan(views.grid).at_least


@every_method
def test_a_batch_is_selected_image_by_image(name: str) -> None:
    method = get(name, retention_ratio=0.25)
    batch = [views_of(IMAGES[image], method) for image in IMAGES]
    for views, together in zip(batch, method.select_all(batch), strict=True):
        alone = method.select(views)
        assert torch.equal(packed_of(views, together).origin, packed_of(views, alone).origin)
        assert torch.equal(together.count, alone.count)


@every_method
def test_images_without_a_patch_in_the_crops(name: str) -> None:
    for crops, size in (((1, 2), (500, 7)), ((2, 2), (1, 3000)), ((3, 1), (10000, 37))):
        for method in (get(name, retention_ratio=1.0), get(name, retention_ratio=0.25)):
            views = views_of(AnyResGrid(image_size=size, crops=crops, side=SIDE), method)
            assert packed_of(views, method.select(views)).patches > 0


@every_method
def test_methods_are_frozen_records_that_read_back(name: str) -> None:
    method = get(name)
    assert get(str(method)) == method
    assert str(method) == f"{name}()"
    changed = replace(method, retention_ratio=0.3)
    assert get(str(changed)) == changed != method
    assert str(changed) == f"{name}(retention_ratio=0.3)"
    for profile in method.profiles:
        assert get(str(replace(changed, profile=profile))) == replace(changed, profile=profile)
    with pytest.raises(FrozenInstanceError):
        method.retention_ratio = 0.5
    assert isinstance(hash(method), int)
    assert {field.name for field in fields(method)} >= {"retention_ratio", "profile"}


# --- the controls ----------------------------------------------------------------------------------------------------


@every_image
def test_the_thumbnail_alone(image: str) -> None:
    for layout in LAYOUTS:
        views = views_of(IMAGES[image], "thumbnail_only", layout=layout)
        packed = packed_of(views, get("thumbnail_only").select(views))
        whole = packed_of(views, get("none").select(views))
        if image == "single":
            assert torch.equal(packed.features, whole.features)
        else:
            assert packed.origin.tolist() == list(range(SIDE**2))
            assert torch.equal(packed.features, whole.features[: SIDE**2])


@pytest.mark.parametrize("name", ["random", "uniform"])
@every_image
def test_controls_share_the_budget_by_size(name: str, image: str) -> None:
    for ratio in RATIOS:
        views = views_of(IMAGES[image], name)
        count = get(name, retention_ratio=ratio).select(views).count.tolist()
        sizes = views.valid.sum(1).tolist()
        total = int(ratio * sum(sizes[1:]))
        assert count[0] == int(ratio * SIDE**2)
        assert sum(count[1:]) == total
        assert all(abs(k - total * n / sum(sizes[1:])) < 1 for k, n in zip(count[1:], sizes[1:], strict=True))


@pytest.mark.parametrize("name", ["random", "uniform"])
@every_image
def test_controls_are_nested_over_ratios(name: str, image: str) -> None:
    views = views_of(IMAGES[image], name)
    kept = [get(name, retention_ratio=ratio).select(views).kept for ratio in (0.05, 0.1, 0.25, 0.3, 0.5, 0.75, 1.0)]
    for smaller, larger in pairwise(kept):
        assert bool((larger | ~smaller).all())


@pytest.mark.parametrize("side", [12, 24])
@pytest.mark.parametrize("ratio", [0.05, 0.1, 0.2, 0.25, 0.3, 0.5, 0.75])
def test_uniform_gives_every_quadrant_its_share(side: int, ratio: float) -> None:
    views = Views(features=torch.zeros(1, side * side, 1), grid=AnyResGrid(image_size=(336, 336), side=side))
    kept = get("uniform", retention_ratio=ratio).select(views).kept.reshape(side, side)
    half = side // 2
    quadrants = [int(kept[y : y + half, x : x + half].sum()) for y in (0, half) for x in (0, half)]
    assert all(abs(q - int(ratio * side**2) / 4) <= 2 for q in quadrants), quadrants


def test_uniform_is_even_at_every_budget() -> None:
    # Quadrants, rows and columns within 4 of their share; a random subset strays by 14 and 8.
    views = Views(features=torch.zeros(1, 576, 1), grid=AnyResGrid(image_size=(336, 336)))
    order = get("uniform").select(views).order[0]
    plane = torch.zeros(576)
    for count, patch in enumerate(order.tolist(), start=1):
        plane[patch] = 1
        square = plane.reshape(24, 24)
        quadrants = square.reshape(2, 12, 2, 12).sum((1, 3))
        assert float((quadrants - count / 4).abs().max()) <= 4
        assert float((square.sum(0) - count / 24).abs().max()) <= 4
        assert float((square.sum(1) - count / 24).abs().max()) <= 4


def test_uniform_looks_at_no_content() -> None:
    one, other = views_of(IMAGES["2x2"], "uniform"), views_of(IMAGES["2x2"], "uniform", torch.bfloat16)
    other.features = torch.randn_like(other.features)
    method = get("uniform", retention_ratio=0.3)
    assert torch.equal(method.select(one).order, method.select(other).order)


def test_random_follows_its_seed() -> None:
    views = views_of(IMAGES["2x2"], "random")

    def order(spec: str) -> Tensor:
        return get(spec, retention_ratio=0.25).select(views).kept

    assert torch.equal(order("random"), order("random(seed=0)"))
    torch.manual_seed(123)
    assert torch.equal(order("random"), order("random(seed=0)"))
    overlap = (order("random") & order("random(seed=1)")).sum() / order("random").sum()
    assert 0.1 < overlap < 0.45  # chance: 0.25
    # Views differ from each other, and no corner is favoured.
    kept = order("random")
    assert not torch.equal(kept[1], kept[2])
    share = torch.stack([order(f"random(seed={seed})")[0] for seed in range(64)]).float().mean(0)
    assert share.mean() == pytest.approx(0.25)
    assert share.max() < 0.55
    assert share.min() > 0.02


# --- building methods from text --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "fallback", "text"),
    [
        ("globalcom2", {}, "globalcom2()"),
        (" globalcom2 ( ) ", {}, "globalcom2()"),
        (
            "globalcom2(retention_ratio=0.5, profile='released')",
            {},
            "globalcom2(retention_ratio=0.5, profile='released')",
        ),
        ("globalcom2(temperature=5)", {"retention_ratio": 0.5}, "globalcom2(retention_ratio=0.5, temperature=5)"),
        ("globalcom2(profile='paper')", {"profile": "released"}, "globalcom2(profile='paper')"),  # the spec wins
        ("random(seed=-3)", {"retention_ratio": None, "profile": None}, "random(seed=-3)"),  # None: not given
        ("uniform", {"retention_ratio": "0.5"}, "uniform(retention_ratio=0.5)"),
        ("uniform", {"retention_ratio": 1}, "uniform(retention_ratio=1.0)"),
    ],
)
def test_get(spec: str, fallback: dict[str, object], text: str) -> None:
    assert str(get(spec, **fallback)) == text


@pytest.mark.parametrize(
    ("spec", "named"),
    [
        ("fastest", "fastest"),
        ("base", "base"),  # plumbing is no method
        ("pack()", "pack"),
        ("NoCompression", "NoCompression"),
        ("", "''"),
        ("globalcom2(", r"globalcom2\("),
        ("globalcom2)", r"globalcom2\)"),
        ("globalcom2(0.5)", "0.5"),
        ("globalcom2(**{'alpha': 1})", "alpha"),
        ("globalcom2(alpha=1+x)", "1\\+x"),
        ("globalcom2(alpha=__import__('os'))", "__import__"),
        ("globalcom2.released", "globalcom2.released"),
        ("globalcom2()()", r"globalcom2\(\)\(\)"),
        ("a b", "a b"),
        ("globalcom2(keep=1)", "keep"),
        ("none(seed=1)", "seed"),
        ("globalcom2(name='x')", "name"),
        ("globalcom2(profile='best')", "best"),
        ("none(profile='released')", "released"),
        ("globalcom2(profile=3)", "3"),
        ("globalcom2(retention_ratio='abc')", "abc"),
        ("globalcom2(retention_ratio=[1])", r"\[1\]"),
        ("globalcom2(retention_ratio=0.1, retention_ratio=0.2)", "retention_ratio"),  # one of them would not apply
        ("globalcom2(temperature=0)", "temperature.*0"),  # divides by it: not-a-number tokens per crop
        ("globalcom2(temperature=-10.0)", "temperature.*-10"),
        ("globalcom2(temperature='warm')", "temperature.*warm"),
        ("globalcom2(alpha=1.5)", "alpha.*1.5"),
        ("globalcom2(alpha='half')", "alpha.*half"),
        ("random(seed='x')", "seed.*x"),
        ("ficoco_vl(merge_visual=False, r=5)", "r means nothing with merge_visual=False"),
        ("ficoco_vl(AT=False, r_language=5)", "r_language means nothing with AT=False"),
        (f"random(seed={2**63})", "seed.*9223372036854775808"),
        (f"fastv(layer=1{'0' * 400})", "layer.*000"),
        (f"fastv(layer={'-' * 5000}1)", "cannot read"),
    ],
)
def test_what_cannot_be_built_is_named(spec: str, named: str) -> None:
    with pytest.raises(InputError, match=named):
        get(spec)


@every_method
@pytest.mark.parametrize("value", [0, -1, 1.5, 10**400, float("nan"), float("inf"), "abc", "1.0.0"])
def test_bad_ratios_are_named(name: str, value: object) -> None:
    said = "an integer of about 400 digits" if value == 10**400 else value
    with pytest.raises(InputError, match=rf"retention_ratio.*{said}"):
        get(name, retention_ratio=value)
    if isinstance(value, int | str) or value == 1.5:
        with pytest.raises(InputError, match=rf"retention_ratio.*{said}"):
            get(f"{name}(retention_ratio={value!r})")


@every_method
def test_unknown_fields_and_profiles_list_the_known_ones(name: str) -> None:
    with pytest.raises(InputError, match=r"no field strength.*retention_ratio"):
        get(f"{name}(strength=1)")
    with pytest.raises(InputError, match=r"no profile 'best'.*corrected"):
        get(name, profile="best")
    with pytest.raises(InputError, match=f"unknown method 'fastest'.*{name}"):
        get("fastest")


# --- directory = registry --------------------------------------------------------------------------------------------


FILES = sorted(file for folder in llava.compress.__path__ for file in Path(folder).glob("*.py"))


@pytest.mark.parametrize("stem", [path.stem for path in FILES if path.stem != "__init__"])
def test_a_file_is_a_method_or_plumbing(stem: str) -> None:
    # A method's file holds one method, named like the file; plumbing holds none.
    module = import_module(f"llava.compress.{stem}")
    named = {
        cls
        for cls in vars(module).values()
        if isinstance(cls, type) and issubclass(cls, Compressor) and "name" in vars(cls)
    }
    assert (stem in available()) == bool(named)
    if named:
        (cls,) = named
        assert cls.name == stem
        assert cls is method_class(stem)
        assert cls.__doc__
        assert isinstance(get(stem), cls)
        assert "corrected" in cls.profiles


def test_the_controls_and_globalcom2_are_there() -> None:
    assert {"globalcom2", "none", "random", "uniform"} <= set(available())
    assert available() == sorted(available())


@every_method
def test_methods_never_see_a_model(name: str) -> None:
    # No transformers, no PIL in a method's file: it is a record and arithmetic. (GlobalCom² lives in the architecture.)
    (file,) = (file for file in FILES if file.stem == name)
    tree = ast.parse(file.read_text(encoding="utf-8"))
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not {module for module in imported if module.split(".")[0] in ("transformers", "PIL")}
