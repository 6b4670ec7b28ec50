"""The engine: however questions are grouped and batched, answers are those of asking one by one."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from typing import Any

import pytest
import torch

from llava.compress import get
from llava.eval.benchmarks.base import Question
from llava.eval.engine import WINDOW, Answer, Asked, Engine
from llava.eval.pictures import Picture
from llava.mm_utils import process_images
from llava.model.language_model.prefix import SharedPrefix
from tests.conftest import Loaded, picture

METHODS = [
    *("none", "globalcom2(retention_ratio=0.25)", "uniform(retention_ratio=0.5)"),
    "globalcom2(profile='released', retention_ratio=0.25)",  # which ranks the images of a call by the first
]
VERSIONS = ["v1.6-vicuna", "v1.6-mistral", "v1.5"]
SIZES = [(300, 200), (90, 60), (60, 200), (84, 84), (500, 100)]
Group = tuple[Picture, list[str]]


@pytest.fixture
def engine(loaded: Callable[..., Loaded], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Engine]:
    """Make an engine on the shared model."""

    def make(method: str = METHODS[1], version: str = VERSIONS[0], **options: Any) -> Engine:
        tokenizer, model, *_ = loaded(version)
        monkeypatch.setattr(model, "method", get(method))
        return Engine(tokenizer, model, **{"max_new_tokens": 8, **options})

    return make


@pytest.fixture
def show(loaded: Callable[..., Loaded]) -> Callable[..., Picture]:
    def make(group: int, version: str = VERSIONS[0]) -> Picture:
        size = SIZES[group % len(SIZES)]
        views = process_images([picture(*size, seed=group)], loaded(version).processor, loaded(version).model.config)
        return Picture(group, views[0], size)

    return make


def ask(engine: Engine, groups: Sequence[Group], one_by_one: bool = False) -> list[Answer]:
    """Answer groups of texts; returns the answers by index."""

    def feed() -> Iterator[tuple[Picture, list[Asked]]]:
        numbers = count()
        for shown, texts in groups:
            image = None if shown.views is None and shown.error is None else f"{shown.group}.png"
            made = [Question(id=f"q{n}", text=text, image=image) for text, n in zip(texts, numbers, strict=False)]
            yield shown, [engine.ask(int(str(q.id)[1:]), q) for q in made]

    answers = sorted(engine.answer(feed(), one_by_one=one_by_one), key=lambda answer: answer.index)
    return answers


def plain(answers: Sequence[Answer]) -> list[tuple[Any, ...]]:
    return [(a.text, a.kept, a.total, a.error) for a in answers]


def texts(group: int, number: int) -> list[str]:
    return [f"what {'color ' * (3 * turn % 7)}is {turn} of {group}?" for turn in range(number)]


def mixed(show: Callable[..., Picture], version: str = VERSIONS[0]) -> list[Group]:
    """One to nine questions an image, text-only ones between, and what cannot be asked."""
    groups = [(show(group, version), texts(group, number)) for group, number in enumerate((3, 1, 9, 1, 2))]
    groups.insert(1, (Picture(90), ["hello?"]))
    groups.insert(3, (Picture(91), ["what is the number of a car and a dog, or of no car?"]))
    groups.insert(4, (Picture(92, error="92.png: is empty"), ["what?", "and?"]))
    groups.insert(5, (show(7, version), ["is <image> here?", "yes?", "no " * 5000, "<image-placeholder>?"]))
    groups.append((Picture(93), ["is <image> here?", "left " * 5000]))
    return groups


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("method", METHODS)
def test_answers_do_not_depend_on_sharing_and_batching(engine, show, method, version):
    groups = mixed(show, version)
    wanted = plain(ask(engine(method, version), groups, one_by_one=True))
    assert len(wanted) == sum(len(asked) for _, asked in groups)
    errors = [error for *_, error in wanted if error]
    assert [sum(word in error for error in errors) for word in ("92.png", "contains <image>", "4096")] == [2, 3, 2]
    assert len(errors) == 7
    assert len({text for text, *_, error in wanted if not error}) > 12, "the miniature tells questions apart"
    for batch in (1, 2, 5, 8, 64):
        assert plain(ask(engine(method, version, batch=batch), groups)) == wanted, batch


def test_answers_are_counted(engine, show):
    (answer, bare) = ask(engine("uniform(retention_ratio=0.25)"), [(show(0), ["what?"]), (Picture(1), ["what?"])])
    assert (answer.total, answer.kept) == (132, 33)
    assert (bare.total, bare.kept) == (0, 0)


def counted(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> dict[str, list[int]]:
    """Take down images encoded per call, rows of every prefix extension, rows of every generation."""
    seen: dict[str, list[int]] = {"images": [], "extended": [], "generated": []}
    compress, extend, after = engine.model.compress_images, SharedPrefix.extend, engine.model.generate_after

    def compressing(images: Any, *rest: Any) -> Any:
        seen["images"].append(len(images))
        return compress(images, *rest)

    def extending(prefix: SharedPrefix, model: Any, ids: Any, packed: Any = ()) -> Any:
        seen["extended"].append(len(ids))
        return extend(prefix, model, ids, packed)

    def generating(prefix: SharedPrefix, ids: Any, *rest: Any, **options: Any) -> Any:
        seen["generated"].append(len(ids))
        return after(prefix, ids, *rest, **options)

    monkeypatch.setattr(engine.model, "compress_images", compressing)
    monkeypatch.setattr(SharedPrefix, "extend", extending)
    monkeypatch.setattr(engine.model, "generate_after", generating)
    return seen


def test_an_image_is_encoded_and_run_once_the_system_prompt_once(engine, show, monkeypatch):
    machine = engine(batch=8)
    seen = counted(machine, monkeypatch)
    ask(machine, [(show(group), texts(group, 20)) for group in range(3)])
    assert sum(seen["images"]) == 3
    assert seen["extended"] == [1, 1, 1, 1], "the system prompt, then every image"
    assert seen["generated"] == [7, 7, 6] * 3, "as few batches as fit, of like size"


def test_batches_are_filled_across_images(engine, show, monkeypatch):
    machine = engine(batch=8)
    seen = counted(machine, monkeypatch)
    ask(machine, [(show(group), texts(group, 2)) for group in range(16)])
    assert seen["images"] == [8, 8]
    assert seen["extended"] == [1, 4, 4, 4, 4]
    assert seen["generated"] == [8, 8, 8, 8]


@pytest.mark.parametrize("one_by_one", [False, True])
def test_a_question_that_cannot_be_asked_says_so_and_stops_no_other(engine, show, one_by_one):
    machine = engine()
    bad = machine.ask(0, Question(id=0, text="", error="its text is no string"))
    good = machine.ask(1, Question(id=1, text="what?", image="0.png"))
    groups = [(Picture(0), [bad]), (show(1), [good])]
    first, second = sorted(machine.answer(iter(groups), one_by_one), key=lambda answer: answer.index)
    assert (first.text, first.error) == ("", "its text is no string")
    assert second.text
    assert second.error is None


def test_no_more_images_than_a_window_are_held(engine, show):
    machine = engine(batch=2)
    taken = []

    def feed() -> Iterator[tuple[Picture, list[Asked]]]:
        for group in range(50):
            taken.append(group)
            yield show(group), [machine.ask(group, Question(id=group, text="what?", image="x.png"))]

    answers = machine.answer(feed())
    next(answers)
    assert len(taken) == 2 * WINDOW
    answers.close()


class Reading(get("none").__class__):  # type: ignore[misc]
    """A method that reads the prompt."""

    query_agnostic = False


def test_what_cannot_share_goes_one_by_one(engine, show, monkeypatch):
    groups = [(show(0), texts(0, 3)), (Picture(1), ["what?"])]
    wanted = plain(ask(engine("none"), groups))
    machine = engine("none")
    monkeypatch.setattr(machine.model, "method", Reading())
    reading = Engine(machine.tokenizer, machine.model, max_new_tokens=8)
    assert not reading.shares
    assert plain(ask(reading, groups)) == wanted
    assert not engine(num_beams=2).shares
    assert all(not answer.error for answer in ask(engine(num_beams=2), groups))
    monkeypatch.setattr(machine.model.config, "sliding_window", 64, raising=False)
    assert not engine().shares


def test_templates_that_begin_with_the_image(engine, show):
    groups = [(show(0), texts(0, 3)), (show(1), texts(1, 2))]
    for mode in ("plain", "mistral_instruct", "chatml_direct", "llava_llama_2"):
        machine = engine(conv_mode=mode)
        assert plain(ask(machine, groups)) == plain(ask(machine, groups, one_by_one=True)), mode


def test_nothing_to_do(engine):
    assert ask(engine(), []) == []


def test_sampling_is_passed_on(engine, show):
    groups = [(show(0), ["what?"] * 4)]
    torch.manual_seed(0)
    drawn = ask(engine(do_sample=True, temperature=3.0, top_p=None), groups)
    assert len({answer.text for answer in drawn}) > 1


def test_an_engine_works_with_the_method_it_was_made_with(engine, show):
    groups = [(show(0), texts(0, 2)), (show(1), texts(1, 2))]
    wanted = plain(ask(engine(METHODS[1]), groups))
    machine = engine(METHODS[1])
    for other in ("none", "fastv(layer=1)"):
        machine.model.method = other
        assert plain(ask(machine, groups)) == plain(ask(machine, groups, one_by_one=True)) == wanted


def test_engines_of_one_model_in_threads(engine, show):
    groups = [(show(0), texts(0, 3)), (show(1), texts(1, 2))]
    machines = [
        engine(method) for method in ("tome(retention_ratio=0.5)", METHODS[1], "fastv(layer=1, retention_ratio=0.5)")
    ]
    wanted = [plain(ask(machine, groups)) for machine in machines]
    fresh = [engine(str(machine.method)) for machine in machines]
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda machine: plain(ask(machine, groups)), [*fresh, *fresh]))
    assert found == wanted * 2
