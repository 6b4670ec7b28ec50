"""FiCoCo-VL: both parts are FiCoCo's own, and together they meet the ratio."""

import pytest
import torch

from llava.anyres import AnyResGrid
from llava.compress import get
from llava.compress.base import Layout
from llava.constants import InputError
from tests.compress.test_attach import make_tower
from tests.compress.test_encoding import encode

GRID = AnyResGrid(image_size=(672, 672), crops=(2, 2))


@pytest.mark.parametrize("ratio", [0.75, 0.5, 0.25, 0.1])
def test_the_mean_over_layers_is_the_ratio(ratio: float) -> None:
    """Of the patches; newlines come in behind the encoder, so that they are reduced by the language model alone."""
    method = get("ficoco_vl", retention_ratio=ratio)
    kept = method.plan(GRID).at_least
    assert kept == pytest.approx(ratio**0.85 * 2880, abs=1 + GRID.n_views)
    ran = method.visual_per_layer(kept, 32)
    assert ran[:6] == (kept,) * 6
    assert sum(ran) / 32 / 2880 == pytest.approx(ratio, abs=1e-3)


def test_the_share_moves_the_work() -> None:
    first, last = get("ficoco_vl(retention_ratio=0.7, vision_share=0.0)"), get("ficoco_vl(vision_share=1.0)")
    assert first.encoder_points(23) == ()
    assert first.visual_per_layer(2880, 32) == get("ficoco_l(retention_ratio=0.7)").visual_per_layer(2880, 32)
    assert last.plan(GRID) == get("ficoco_v").plan(GRID)
    assert last.visual_per_layer(720, 32) == (720,) * 32


def test_switches() -> None:
    assert get("ficoco_vl(AT=False)").plan(GRID) == get("ficoco_v").plan(GRID)
    assert get("ficoco_vl(AT=False)").points_in(32) == ()
    without = get("ficoco_vl(merge_visual=False, retention_ratio=0.7)")
    assert without.plan(GRID).at_least == 2880
    assert without.visual_per_layer(2880, 32) == get("ficoco_l(retention_ratio=0.7)").visual_per_layer(2880, 32)
    authors = get("ficoco_vl(r=42, r_language=4, control_encoding_layer=11)")
    single = AnyResGrid(image_size=(336, 336))
    assert authors.patches_per_layer(single, Layout(), 23)[-1] == (114,)
    assert authors.visual_per_layer(114, 32)[-1] == 114 - 26 * 4
    assert get("ficoco_vl(control_language_layer=9, language_layers=2)").points_in(32) == (10, 11)


def test_what_the_language_model_cannot_do_is_refused() -> None:
    with pytest.raises(InputError, match=r"vision_share.*at least"):
        get("ficoco_vl(retention_ratio=0.1, vision_share=0.3)").visual_per_layer(1000, 32)
    with pytest.raises(InputError, match="both r and r_language"):
        get("ficoco_vl(r_language=4)")


@torch.no_grad()
def test_the_encoder_part_is_ficoco_v() -> None:
    tower = make_tower()
    ours = encode(tower, get("ficoco_vl(retention_ratio=0.3, profile='paper')"))[1]
    share = 0.3**0.85
    theirs = encode(tower, get(f"ficoco_v(retention_ratio={share}, profile='paper')"))[1]
    assert all(torch.equal(a.features, b.features) for a, b in zip(ours, theirs, strict=True))
