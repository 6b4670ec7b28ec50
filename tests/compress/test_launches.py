"""What GlobalCom² asks of the device between tower and projector: few launches, no read; and what is counted."""

import pytest
import torch

from llava.anyres import AnyResGrid, choose_grid
from llava.compress import get
from llava.compress.base import Compressor, Selection, Views
from llava.compress.pack import Packed, pack
from llava.efficiency.launches import Launches

PINPOINTS = [(336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008)]
UNPADDED = [(672, 672), (1000, 500), (500, 1000), (1008, 336)]
PADDED = [(640, 480), (480, 640), (2000, 300), (300, 2000), (333, 217)]
RATIOS = (0.1, 0.25, 0.5, 0.75)


def views_of(size: tuple[int, int], device: str, dtype: torch.dtype = torch.bfloat16) -> Views:
    """Views at CLIP-L/336's geometry, narrower but sliced from hidden states as the model's are."""
    grid = AnyResGrid(image_size=size, crops=choose_grid(size, PINPOINTS, 336))
    hidden = torch.randn(grid.n_views, 577, 32, device=device, dtype=dtype)
    return Views(features=hidden[:, 1:], grid=grid, cls_logits={-1: torch.randn(grid.n_views, 16, 577, device=device)})


def compress(method: Compressor, views: Views) -> tuple[Selection, Packed]:
    """The step that is counted; the projector's own launches are not part of it."""
    selection = method.select(views)
    return selection, pack(views, selection, lambda tokens: tokens, views.features[0, 0])


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize(("size", "most"), [*((size, 50) for size in UNPADDED), *((size, 70) for size in PADDED)])
def test_an_image_takes_few_launches_and_no_read(size: tuple[int, int], most: int, ratio: float) -> None:
    # A meta tensor holds no values: whatever asks for one raises.
    views, method = views_of(size, "meta"), get("globalcom2", retention_ratio=ratio)
    assert (method.plan(views.grid).patches == 576 * views.grid.n_views) == (most == 50)
    with Launches("meta") as count:
        selection, packed = compress(method, views)
    assert 20 < count.launches <= most, count.operations
    assert count.reads == 0
    assert {t.device.type for t in (selection.order, selection.count, packed.features)} == {"meta"}
    assert len(packed.features) == method.plan(views.grid).at_most + packed.newlines


def test_views_take_one_copy() -> None:
    with Launches("meta") as count:
        made = views_of((640, 480), "meta")
    assert (count.operations, made.valid.device.type) == ({"randn": 2, "_to_copy": 1}, "meta")


@pytest.mark.parametrize("profile", ["released", "paper"])
def test_a_method_that_reads_is_caught(profile: str) -> None:
    method = get("globalcom2", profile=profile)
    with Launches("meta") as count, pytest.raises(RuntimeError, match="meta"):
        compress(method, views_of((640, 480), "meta"))
    views = views_of((640, 480), "cpu", torch.float32)
    with Launches("cpu") as count:
        compress(method, views)
    assert count.reads == 1
    with Launches("cpu") as count:
        compress(get("globalcom2"), views)
    assert count.reads == 0


def test_the_origin_is_made_when_asked_for() -> None:
    _, packed = compress(get("globalcom2"), views_of((640, 480), "meta"))
    with Launches("meta") as count:
        sizes = len(packed.features), packed.patches, packed.newlines, packed.visual
    assert count.launches == 0
    assert sizes[0] == sizes[1] + sizes[2] == sizes[3] + sizes[2]
    with Launches("meta") as count:
        assert packed.origin is packed.origin
    assert len(packed.origin) == sizes[0]
    assert count.launches > 0


# --- the counter -----------------------------------------------------------------------------------------------------


def test_launches_are_what_makes_something_on_the_device() -> None:
    host = torch.ones(3)
    with Launches("meta") as count:
        there = host.to("meta", non_blocking=True)  # a copy
        host.sum()  # the host's own affair
        torch.empty_like(there)[1:].view(1, 2).expand(4, 2)  # memory and views of it
        there[1:] = there[:2]  # another copy
        torch._foreach_add_([there, there], 1.0)
    assert count.operations == {"_to_copy": 1, "copy_": 1, "_foreach_add_": 1}
    assert (count.launches, count.reads) == (3, 0)


def test_reads_are_what_the_host_waits_for() -> None:
    values, places = torch.arange(4.0), torch.tensor([2, 0])
    for read in (values.sum().item, values.nonzero, values.unique, lambda: values[values > 1], lambda: bool(values[0])):
        with Launches("cpu") as count:
            read()
        assert count.reads == 1
    with Launches("cpu") as count:
        _ = values[places], values[1:], values.sum(), values.masked_fill(values > 1, 0.0)
    assert count.reads == 0
    assert count.launches == 4
