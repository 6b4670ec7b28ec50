"""Pictures: the same from worker processes, unreadable ones as errors, none from outside the folder."""

import base64
import io
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

from llava.constants import InputError
from llava.eval import pictures as module
from llava.eval.benchmarks.base import Question
from llava.eval.pictures import Picture, Pictures, Source, check_folder, check_paths, readable, stream, worker_count
from llava.mm_utils import process_images
from tests.conftest import picture

SIZES = [(300, 200), (90, 60), (60, 200), (84, 84)]


@pytest.fixture
def folder(tmp_path):
    """Four good pictures and damaged ones, beside a secret outside."""
    images = tmp_path / "images"
    (images / "sub").mkdir(parents=True)
    for number, size in enumerate(SIZES):
        picture(*size).save(images / f"{number}.png")
    whole = (images / "0.png").read_bytes()
    (images / "empty.png").write_bytes(b"")
    (images / "half.png").write_bytes(whole[: len(whole) // 2])
    (images / "text.png").write_bytes(b"not a picture\n" * 99)
    picture(90, 60).save(tmp_path / "secret.png")
    return images


@pytest.fixture
def pictures(folder, loaded):
    return Pictures(folder, loaded().processor, loaded().model.config)


def b64(image: Image.Image, form: str = "PNG") -> str:
    buffer = io.BytesIO()
    image.save(buffer, form)
    return base64.b64encode(buffer.getvalue()).decode()


def test_a_picture_is_what_the_model_takes(pictures, loaded, folder):
    for number, size in enumerate(SIZES):
        found = pictures[Source(number, f"{number}.png")]
        wanted = process_images([Image.open(folder / f"{number}.png")], loaded().processor, loaded().model.config)
        assert (found.group, found.size, found.error) == (number, size, None)
        assert torch.equal(found.views, wanted[0])


def test_a_picture_in_base64(pictures):
    image = picture(90, 60)
    assert torch.equal(pictures[Source(0, "name.jpg", b64(image))].views, pictures[Source(0, "1.png")].views)


def test_no_picture_is_no_error(pictures):
    found = pictures[Source(7)]
    assert (found.group, found.views, found.error) == (7, None, None)


BOMB = "iVBORw0KGgoAAAANSUhEUgAATiAAAE4gCAIAAAA="


@pytest.mark.parametrize("name", ["empty.png", "half.png", "text.png", "nosuch.png", "sub", "", "nul\0.png", "x" * 300])
def test_an_unreadable_file_is_an_error_of_one_line_that_names_it(pictures, name):
    found = pictures[Source(3, name)]
    assert (found.group, found.views) == (3, None)
    assert found.error.startswith(name or ":")
    assert "\n" not in found.error


@pytest.mark.parametrize("data", ["", "====", "no base64!", base64.b64encode(b"no picture").decode(), BOMB, "é"])
def test_unreadable_base64_is_an_error_too(pictures, data):
    found = pictures[Source(3, "table-row.jpg", data)]
    assert found.views is None
    assert found.error.startswith("table-row.jpg: ")
    assert "\n" not in found.error


def test_a_picture_too_odd_to_resize_is_an_error(pictures, monkeypatch):
    def fail(*_: object) -> None:
        raise MemoryError("too\nlarge")

    monkeypatch.setattr("llava.eval.pictures.process_images", fail)
    assert pictures[Source(0, "0.png")].error == "0.png: too large"


def test_workers_started_afresh_give_the_same_in_order(pictures):
    names = ["2.png", "nosuch.png", None, "0.png", "half.png", "1.png", "3.png", "0.png"]
    sources = [Source(group, name) for group, name in enumerate(names)]
    alone, helped = (list(stream(pictures, sources, workers)) for workers in (0, 2))
    assert [found.group for found in helped] == list(range(len(names)))
    for one, other in zip(alone, helped, strict=True):
        assert (one.size, one.error) == (other.size, other.error)
        assert (one.views is None) == (other.views is None)
        assert one.views is None or torch.equal(one.views, other.views)
        assert other.views is None or not other.views.is_shared()


def test_views_are_pinned_where_there_is_a_gpu(pictures, monkeypatch):
    given = []

    def loader(*args: object, pin_memory: bool, **options: object) -> Iterator[Picture]:
        given.append(pin_memory)
        return iter(())

    monkeypatch.setattr("llava.eval.pictures.DataLoader", loader)
    for gpu, workers in ((False, 0), (True, 0), (True, 2)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda gpu=gpu: gpu)
        list(stream(pictures, [], workers))
    assert given == [False, True, True]


def test_a_pinned_picture_is_the_same_but_for_where_its_views_lie(pictures, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self + 1)  # a host without a GPU has no such memory
    for source in (Source(4, "0.png"), Source(5, "nosuch.png"), Source(6)):
        plain = pictures[source]
        pinned = plain.pin_memory()
        assert (pinned.group, pinned.size, pinned.error) == (plain.group, plain.size, plain.error)
        assert pinned.views is plain.views is None or torch.equal(pinned.views, plain.views + 1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("workers", [0, 1])
def test_what_is_pinned_is_the_same(pictures, workers):
    streamed = list(stream(pictures, [Source(0, "0.png"), Source(1), Source(2, "half.png")], workers))
    assert [found.group for found in streamed] == [0, 1, 2]
    for found in streamed:
        if found.group == 0:
            assert found.views.is_pinned()
            assert not found.views.is_shared()
            assert torch.equal(found.views, pictures[Source(0, "0.png")].views)
            assert torch.equal(found.views.to("cuda", non_blocking=True).half().cpu(), found.views.half())
        else:
            assert found.views is None


def test_sources_are_drawn_as_they_are_needed(pictures):
    drawn = []

    def sources() -> Iterator[Source]:
        for group in range(1000):
            drawn.append(group)
            yield Source(group)

    for workers, ahead in ((0, 1), (1, 3)):
        drawn.clear()
        found = stream(pictures, sources(), workers)
        assert next(found).group == 0
        assert len(drawn) <= 1 + ahead
        found.close()


def ask(image: str | None, data: str | None = None) -> Question:
    return Question(id=5, text="what?", image=image, data=data)


def test_inside_the_folder_is_fine(folder, tmp_path):
    (folder / "sub" / "link.png").symlink_to("../0.png")
    (tmp_path / "elsewhere").symlink_to(folder)
    inside = ["0.png", "sub/../0.png", "nosuch.png", "sub/link.png", "./1.png", str(folder / "2.png"), "..png", ""]
    questions = [*map(ask, inside), ask(None), ask("../../named.jpg", "data"), ask("nul\0.png")]
    check_paths(questions, folder)
    check_paths(questions, tmp_path / "elsewhere")


OUTSIDE = [
    "../secret.png",
    "/etc/passwd",
    "sub/../../secret.png",
    "../images2/0.png",
    "link.png",
    "far/secret.png",
    "..",
]


@pytest.mark.parametrize("name", OUTSIDE)
def test_outside_the_folder_is_refused_whether_it_exists_or_not(folder, tmp_path, name):
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    (folder / "far").symlink_to(tmp_path)
    with pytest.raises(InputError, match=r"question 5 .*--allow-outside") as caught:
        check_paths([ask("0.png"), ask(name)], folder)
    assert repr(name) in str(caught.value)


def test_links_in_a_circle_are_unreadable_not_outside(folder, pictures):
    (folder / "round.png").symlink_to("about.png")
    (folder / "about.png").symlink_to("round.png")
    check_paths([ask("round.png")], folder)
    assert pictures[Source(0, "round.png")].error


def test_a_relative_folder(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    check_paths([ask("0.png")], Path("images"))
    with pytest.raises(InputError, match=r"question 5 .*outside the image folder: '\.\./secret\.png'"):
        check_paths([ask("../secret.png")], Path("images"))


@pytest.mark.parametrize("make", [os.mkfifo, Path.mkdir, lambda path: path.symlink_to("/dev/zero")])
def test_what_is_no_file_is_an_error_and_not_waited_for(pictures, folder, make):
    make(folder / "odd.png")
    found = pictures[Source(0, "odd.png")]
    assert found.error.startswith("odd.png: ")
    assert found.error.endswith("odd.png' is no regular file")
    assert not readable(folder / "odd.png")


def test_readable_is_what_can_be_decoded(folder):
    names = ["0.png", "3.png", "empty.png", "half.png", "text.png", "nosuch.png", "nul\0.png", "\ud800.png"]
    assert [name for name in names if readable(folder / name)] == ["0.png", "3.png"]


@pytest.mark.parametrize(
    ("names", "wrong"), [(["x"], True), (["x"] * 30 + ["0.png"], False), (["\ud800", "n\0"], True)]
)
def test_a_folder_without_any_of_the_first_pictures_is_a_wrong_one(folder, names, wrong):
    questions = [*map(ask, names), ask(None), ask("named.jpg", "data")]
    if not wrong:
        check_folder(questions, folder)
        return
    with pytest.raises(InputError, match=r"none of the \d pictures is in the image folder .*--image-folder"):
        check_folder(questions, folder)


def test_nineteen_missing_pictures_may_be_just_missing(folder):
    check_folder([ask(f"x{number}") for number in range(19)] + [ask("0.png")], folder)
    with pytest.raises(InputError, match="none of the first 20 pictures"):
        check_folder([ask(f"x{number}") for number in range(20)] + [ask("0.png")], folder)
    check_folder([ask(None)], folder / "nosuch")


@pytest.mark.parametrize(
    ("wanted", "pictures", "processes", "cpus", "found"),
    [
        (None, 99, 1, 8, 0), (None, 100, 1, 8, 4), (None, 100, 1, 2, 2), (None, 100, 2, 8, 0), (None, 200, 2, 4, 2),
        (0, 500, 1, 8, 0), (3, 5, 1, 8, 3), (64, 5, 1, 8, 8), (64, 5, 2, 8, 4), (64, 5, 16, 8, 1),
    ],
)  # fmt: skip
def test_workers_are_no_more_than_the_cpus(monkeypatch, wanted, pictures, processes, cpus, found):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cpus)))
    assert worker_count(wanted, pictures, processes) == found


def test_a_worker_that_is_ended_is_one_line(pictures, monkeypatch):
    """As the kernel does where memory is short."""
    monkeypatch.setattr(module, "GRACE", 0)

    def sources() -> Iterator[Source]:
        for group in range(100):
            if group == 5:
                (worker,) = multiprocessing.active_children()
                os.kill(worker.pid or 0, 9)
            yield Source(group, "0.png")

    with pytest.raises(InputError, match=r"DataLoader worker .*; where memory is short, .*fewer --num-workers"):
        list(stream(pictures, sources(), 1))


KILLED = """
import os, sys
from pathlib import Path
from types import SimpleNamespace
from llava.eval.pictures import Pictures, Source, stream
if __name__ == "__main__":
    config = SimpleNamespace(image_aspect_ratio="pad", image_grid_pinpoints=None)
    pictures = stream(Pictures(Path(sys.argv[1]), None, config), (Source(n) for n in range(100)), 1)
    next(pictures)
    os.kill(os.getpid(), 9)
"""


@pytest.mark.slow
def test_nothing_is_said_of_a_killed_process(folder, tmp_path):
    """Python's tracker would warn of the semaphores it removes."""
    (tmp_path / "script.py").write_text(KILLED)
    command = [sys.executable, str(tmp_path / "script.py"), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)  # returns once the tracker has ended
    assert (done.returncode, done.stdout, done.stderr) == (-9, "", "")
