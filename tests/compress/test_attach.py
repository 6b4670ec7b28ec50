"""`attach` records what a method asks for and nothing else, and leaves the tower as it found it."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llava.anyres import AnyResGrid
from llava.compress.attach import attach
from llava.compress.base import Compressor, Layout, Taps
from llava.model.multimodal_encoder.clip_encoder import CLIPVisionTower
from tests.compress.test_attention import LAYERS, clip

PIXELS = torch.randn(5, 3, 56, 56, generator=torch.Generator().manual_seed(1))
# A single view, a 3-view and another single view: 5 views in one call.
GRIDS = [
    AnyResGrid(image_size=(56, 56), side=4),
    AnyResGrid(image_size=(56, 112), crops=(1, 2), side=4),
    AnyResGrid(image_size=(9, 9), side=4),
]


def tapping(**taps: Any) -> Compressor:
    return type("Tapping", (Compressor,), {"name": "tapping", "taps": Taps(**taps)})()


def make_tower(select_layer: int = -2) -> CLIPVisionTower:
    source = clip("sdpa")
    config = SimpleNamespace(
        mm_vision_select_layer=select_layer,
        mm_vision_select_feature="patch",
        mm_vision_config=source.config.to_dict(),
        _attn_implementation="sdpa",
    )
    tower = CLIPVisionTower("no-folder", config).eval()
    tower.vision_tower.load_state_dict(source.state_dict())
    return tower


@torch.no_grad()
def run(tower: CLIPVisionTower, method: Compressor) -> tuple[Any, Tensor]:
    with attach(tower=tower.vision_tower, method=method) as session:
        hidden = tower.hidden(PIXELS)
        session.finish(tower.depth, hidden)
    return session, hidden


def hooks(model: nn.Module) -> int:
    return sum(
        len(getattr(module, registry))
        for module in model.modules()
        for registry in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    )


@pytest.fixture(scope="module")
def reference() -> Any:
    """Attention maps of every layer, inputs of every layer, and keys, from a plain eager run."""
    model = clip("eager")
    keys: list[Tensor] = []
    for layer in model.encoder.layers:
        layer.self_attn.k_proj.register_forward_hook(lambda module, args, output: keys.append(output))
    with torch.no_grad():
        out = model(PIXELS, output_hidden_states=True, output_attentions=True)
    return SimpleNamespace(rows=[a[:, :, 0] for a in out.attentions], hidden=out.hidden_states, keys=keys)


# Feature layers before, at and behind the tapped ones; 2 counts from the start, as configs may.
@pytest.mark.parametrize("select_layer", [-1, -2, -3, -6, 2])
@pytest.mark.parametrize("taps", [(-1,), (-2,), (-1, -3), (-5, -1), (-4,), (-1, -2, -3, -4, -5)])
def test_taps_at_any_layer_are_right(reference: Any, select_layer: int, taps: tuple[int, ...]) -> None:
    tower = make_tower(select_layer)
    session, hidden = run(tower, tapping(cls=taps, keys=taps))
    assert set(session.cls_logits) == set(session.keys) == set(taps)
    for layer in taps:
        assert (session.cls_logits[layer].softmax(-1) - reference.rows[layer]).abs().max() <= 1e-5
        torch.testing.assert_close(session.keys[layer], reference.keys[layer][:, 1:], atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(hidden, reference.hidden[select_layer], atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("select_layer", [-1, -2, -3])
def test_features_are_unchanged_by_looking(select_layer: int) -> None:
    tower = make_tower(select_layer)
    with torch.no_grad():
        plain = tower.hidden(PIXELS)
    _, watched = run(tower, tapping(cls=(-1, -3, -5), keys=(-2, -4), cls_feature=True))
    assert torch.equal(plain, watched)


def test_nothing_unasked_is_recorded_nor_hooked() -> None:
    tower = make_tower()
    with attach(tower=tower.vision_tower, method=tapping()):
        assert hooks(tower) == 0
    with attach(tower=tower.vision_tower, method=tapping(cls=(-3,), keys=(-3, -4))):
        assert hooks(tower) == 2
    session, hidden = run(tower, tapping(cls=(-3,), keys=(-4,)))
    assert set(session.cls_logits) == {-3}
    assert set(session.keys) == {-4}
    assert all(views.cls is None for views in session.views(hidden, GRIDS, Layout()))


def test_layers_nobody_needs_are_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """The features of -2 are the last layer's input, so its row costs two projections and no layer."""
    tower = make_tower()
    calls: list[int] = []
    for index, layer in enumerate(tower.vision_tower.encoder.layers):
        forward = layer.forward
        monkeypatch.setattr(
            layer, "forward", lambda *a, index=index, forward=forward, **k: calls.append(index) or forward(*a, **k)
        )
    run(tower, tapping(cls=(-1,), keys=(-1,)))
    assert calls == list(range(LAYERS - 1))
    calls.clear()
    monkeypatch.setattr(tower, "select_layer", -3)
    run(tower, tapping(cls=(-1,)))  # here layer -2 must run after the features, once, and -1 not at all
    assert calls == list(range(LAYERS - 1))
    calls.clear()
    run(tower, tapping(cls=(-4,)))
    assert calls == list(range(LAYERS - 2))


def test_the_tower_is_bit_identical_afterwards() -> None:
    tower = make_tower()
    clip_model = tower.vision_tower
    before = {name: tensor.clone() for name, tensor in clip_model.state_dict().items()}
    with torch.no_grad():
        output = clip_model(PIXELS).last_hidden_state
    run(tower, tapping(cls=(-1, -2), keys=(-1, -4)))
    assert hooks(tower) == 0
    after = clip_model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    with torch.no_grad():
        assert torch.equal(clip_model(PIXELS).last_hidden_state, output)
    # `attach` works on instances by hooks: no method of a module may have been replaced on the way.
    assert not [name for module in tower.modules() for name in vars(module) if name == "forward"]


def test_hooks_are_gone_after_an_error_inside() -> None:
    tower = make_tower()

    def fail() -> None:
        with attach(tower=tower.vision_tower, method=tapping(cls=(-1, -2, -3))):
            assert hooks(tower) == 3
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert hooks(tower) == 0


def test_hooks_are_gone_after_an_error_in_a_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    tower = make_tower()
    monkeypatch.setattr(tower.vision_tower.encoder.layers[2], "forward", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(tower, tapping(cls=(-1, -5)))
    assert hooks(tower) == 0


def test_other_peoples_hooks_stay() -> None:
    tower = make_tower()
    seen: list[int] = []
    handle = tower.vision_tower.encoder.layers[1].register_forward_pre_hook(lambda *_: seen.append(1))
    run(tower, tapping(cls=(-4,)))
    assert hooks(tower) == 1
    assert seen == [1]
    handle.remove()


def test_two_sessions_do_not_mix() -> None:
    tower = make_tower()
    with (
        torch.no_grad(),
        attach(tower=tower.vision_tower, method=tapping(cls=(-3,))) as outer,
        attach(tower=tower.vision_tower, method=tapping(keys=(-4,))) as inner,
    ):
        tower.hidden(PIXELS)
    assert (set(outer.cls_logits), set(outer.keys)) == ({-3}, set())
    assert (set(inner.cls_logits), set(inner.keys)) == (set(), {-4})
    assert hooks(tower) == 0


def test_transformers_own_forward_is_watched_as_well(reference: Any) -> None:
    # Whoever runs the whole tower (transformers' LlavaNext does) gets the same recordings.
    tower = make_tower()
    with torch.no_grad(), attach(tower=tower.vision_tower, method=tapping(cls=(-1, -3))) as session:
        tower.vision_tower(PIXELS)
    for layer in (-1, -3):
        assert (session.cls_logits[layer].softmax(-1) - reference.rows[layer]).abs().max() <= 1e-5


def test_views_get_their_own_share() -> None:
    session, hidden = run(make_tower(), tapping(cls=(-1, -3), keys=(-2,), cls_feature=True))
    layout = Layout(newline="none")
    batch = session.views(hidden, GRIDS, layout)
    assert [len(views.features) for views in batch] == [1, 3, 1]
    assert [views.grid for views in batch] == GRIDS
    assert all(views.layout is layout for views in batch)
    assert torch.equal(torch.cat([views.features for views in batch]), hidden[:, 1:])
    assert torch.equal(torch.cat([views.cls for views in batch]), hidden[:, 0])
    for layer in (-1, -3):
        assert torch.equal(torch.cat([views.cls_logits[layer] for views in batch]), session.cls_logits[layer])
    assert torch.equal(torch.cat([views.keys[-2] for views in batch]), session.keys[-2])
