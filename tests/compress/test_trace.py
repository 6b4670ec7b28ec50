"""The account of an image adds up, for every method, and tokens a method appends are on it."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from llava import visualize
from llava.anyres import AnyResGrid
from llava.compress import available, get
from llava.compress.base import Compressor, Extra, Plan, Selection, Views
from llava.compress.pack import EXTRA, NEWLINE, pack
from llava.compress.trace import GenerationClock, ImageTrace, Trace
from llava.efficiency.methods import trace_requests
from llava.efficiency.shapes import load
from llava.eval.benchmarks.base import Question
from llava.eval.engine import Engine
from llava.eval.pictures import Picture
from llava.eval.run_llava import describe
from llava.mm_utils import process_images
from tests.conftest import Loaded, picture

SIZES = [(168, 168), (300, 200), (60, 400)]


@pytest.fixture
def traced(loaded: Callable[..., Loaded], monkeypatch: pytest.MonkeyPatch):
    """Compress pictures; returns the trace."""

    def run(spec: str, sizes: list[tuple[int, int]], version: str = "v1.6-vicuna") -> Trace:
        _, model, processor, _ = loaded(version)
        monkeypatch.setattr(model, "method", get(spec), raising=False)
        images = [picture(*size) for size in sizes]
        trace = Trace()
        with torch.no_grad():
            model.compress_images(process_images(images, processor, model.config), sizes, trace)
        return trace

    return run


@pytest.mark.parametrize("version", ["v1.6-vicuna", "v1.5"])
@pytest.mark.parametrize("name", available())
def test_tokens_are_kept_patches_newlines_and_what_was_appended(name: str, version: str, traced) -> None:
    images = traced(name, SIZES, version).images
    assert len(images) == len(SIZES)
    for image in images:
        account, origin = image.ledger(), image.packed.origin
        assert account["tokens"] == len(origin)
        assert account["kept"] == sum(account["patches_after"]) == int((origin >= 0).sum())
        assert account["newlines"] == int((origin == NEWLINE).sum())
        assert account["appended"] == int((origin == EXTRA).sum())
        assert account["tokens"] == account["kept"] + account["newlines"] + account["appended"]
        assert image.packed.visual == account["kept"] + account["appended"]


# By hand: 36 patches a view, of which R keeps 9 or, in LLaVA-1.5, of one view; 5/32 of 9 is one contextual token.
VISIONZIP = [
    ("visionzip(retention_ratio=0.25)", "v1.6-vicuna", 5 * 8, 5, 12),  # [CLS] tokens of five views
    ("visionzip(retention_ratio=0.25, profile='released')", "v1.6-vicuna", 5 * 7, 5 * 2, 0),  # contextual ones as well
    ("visionzip(retention_ratio=0.25)", "v1.5", 8, 1, 0),
    ("visionzip(retention_ratio=1.0)", "v1.6-vicuna", 180, 0, 12),
]


@pytest.mark.parametrize(("spec", "version", "kept", "appended", "newlines"), VISIONZIP)
def test_visionzips_own_tokens_are_accounted_for(
    spec: str, version: str, kept: int, appended: int, newlines: int, traced
) -> None:
    (image,) = traced(spec, [(168, 168)], version).images
    account = image.ledger()
    assert [account[key] for key in ("kept", "appended", "newlines")] == [kept, appended, newlines]
    assert account["tokens"] == kept + appended + newlines
    # They cost as much as patches, so the ratio that was asked for counts them.
    assert account["kept_ratio"] == account["requested_ratio"] == (kept + appended) / sum(account["patches_before"])
    assert (" and " + f"{appended} appended" in str(image)) == (appended > 0)
    line = describe(
        {"method": spec, "images": [account], "sequence_lengths": [1], "visual_per_layer": [[9, 9]], "seconds": {}},
        ["x.png"],
    )
    wanted = f"  kept {kept}{f' and {appended} appended' if appended else ''} ({account['kept_ratio']:.1%}): thumbnail "
    assert wanted in line
    assert "by layer" not in line


def test_who_reads_the_account_counts_the_same(traced, checkpoint: Callable[..., Path]) -> None:
    trace = traced("visionzip(retention_ratio=0.25)", [(168, 168)])
    model, visual = load(str(checkpoint("v1.6-vicuna"))), trace.ledger()["images"][0]["tokens"]
    trace.sequence_lengths.append(10 + visual)
    trace.n_text.append(10)
    trace.visual_per_layer.append((visual,) * model.language.layers)
    (request,) = trace_requests(model, trace)
    assert (request.kept, request.projected) == (40, 45)  # the projector runs on appended tokens too
    # Pictures show patches: an appended token is at no place of them.
    assert visualize.kept_patches(trace.images[0]).sum() == 40


def trace_of(selection: Selection, views: Views, kept: int) -> ImageTrace:
    plan = Plan(ratio=0.5, patches=8, at_least=kept, at_most=kept)
    packed = pack(views, selection, lambda tokens: tokens)
    return ImageTrace(grid=views.grid, unpad=True, plan=plan, selection=selection, packed=packed)


def test_an_account_that_does_not_add_up_is_refused() -> None:
    grid = AnyResGrid(image_size=(4, 4), side=2)
    views = Views(features=torch.arange(4.0).view(1, 4, 1), grid=grid)
    where = {"view": torch.tensor([0, 0]), "anchor": torch.tensor([-1, 4])}
    selection = Selection(
        order=torch.tensor([[2, 0, 1, 3]]),
        count=torch.tensor([2]),
        extra=Extra(features=torch.tensor([[7.0], [8.0]]), **where),
    )
    good = trace_of(selection, views, 2)
    assert good.packed.features.flatten().tolist() == [7, 0, 2, 8]
    account = good.ledger()
    assert [account[key] for key in ("kept", "appended", "newlines", "tokens", "kept_ratio")] == [2, 2, 0, 4, 1.0]
    with pytest.raises(RuntimeError, match=r"counts 3 kept tokens \(\[3\]\), but: 4x4: .*kept 2"):
        replace(good, selection=replace(selection, count=torch.tensor([3]))).ledger()
    with pytest.raises(RuntimeError, match="2 kept and 0 appended tokens are not what was packed"):
        replace(good, selection=replace(selection, extra=None)).ledger()


def test_a_picture_with_appended_tokens_is_drawn(traced, loaded: Callable[..., Loaded]) -> None:
    (image,) = traced("visionzip(retention_ratio=0.25)", [(168, 168)]).images
    _, model, processor, _ = loaded("v1.6-vicuna")
    views = process_images([picture(168, 168)], processor, model.config)[0]
    assert isinstance(visualize.draw(picture(168, 168), views, image, processor), Image.Image)


def test_a_method_without_tokens_of_its_own_has_none_on_its_account() -> None:
    views = Views(features=torch.zeros(1, 4, 1), grid=AnyResGrid(image_size=(4, 4), side=2))
    image = trace_of(Compressor.select(get("none"), views), views, 4)
    assert image.appended == image.ledger()["appended"] == 0
    assert "appended" not in str(image)


@pytest.mark.parametrize("one_by_one", [False, True])
def test_answers_count_appended_tokens(
    one_by_one: bool, loaded: Callable[..., Loaded], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer, model, processor, _ = loaded("v1.6-vicuna")
    monkeypatch.setattr(model, "method", get("visionzip(retention_ratio=0.25)"), raising=False)
    engine = Engine(tokenizer, model, max_new_tokens=1)
    shown = Picture(0, process_images([picture(168, 168)], processor, model.config)[0], (168, 168))
    asked = engine.ask(0, Question(id="q", text="what?", image="x.png"))
    (answer,) = engine.answer(iter([(shown, [asked])]), one_by_one=one_by_one)
    assert (answer.kept, answer.total) == (45, 180)  # what the language model saw of the image, newlines not counted


class Event:
    """A CUDA event of a device whose clock is the number of events."""

    made: list["Event"] = []

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing
        self.waited = False

    def record(self, stream: str) -> None:
        assert stream == "the device's"
        self.made.append(self)

    def synchronize(self) -> None:
        self.waited = True

    def elapsed_time(self, later: "Event") -> float:
        assert later.waited
        return 1000.0 * (self.made.index(later) - self.made.index(self))  # in ms


def test_a_cuda_device_is_not_made_to_wait_while_it_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "the device's")
    Event.made, device, trace = [], torch.device("cuda"), Trace()
    with trace.clock("vision", device), trace.clock("selection", device):
        pass
    with trace.clock("vision", device):
        pass
    with GenerationClock(trace, device) as clock:
        for _ in range(3):
            assert clock.criteria[0](None, None) is False
    assert not any(event.waited for event in Event.made)
    # Events 0 to 3 are nested, 4 and 5 the second vision; 6 to 8 begin, first token and end.
    assert trace.seconds == {"selection": 1, "vision": 3 + 1, "prefill": 1, "decode": 1}


def test_a_generation_without_a_token_leaves_no_time() -> None:
    trace = Trace()
    with GenerationClock(trace, torch.device("cpu")):
        pass
    assert trace.seconds == {}
    with GenerationClock(None, torch.device("cpu")) as clock:
        assert clock.criteria == []
