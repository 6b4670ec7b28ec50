"""`python -m llava.compress`: what it says is what the classes are."""

import dataclasses
import json
import re
from collections.abc import Callable

import pytest

from llava.compress import __main__ as listing
from llava.compress import available, get, method_class
from llava.compress.base import PROFILES, Compressor, Taps
from tests.conftest import Command


@pytest.fixture
def run(command: Command) -> Callable[..., str]:
    def run(*arguments: str) -> str:
        code, out, _ = command(listing.main, *arguments)
        assert code == 0
        return out

    return run


def test_every_method_has_one_line_and_the_columns_stand(run) -> None:
    head, *lines = run().splitlines()
    assert [line.split()[0] for line in lines] == available()
    starts = [found.start() for found in re.finditer(r"(?<=\s\s)\S|^\S", head)]
    assert len(starts) == 7
    for line in lines:
        for start in starts[1:]:
            assert line[start - 2 : start] == "  ", line
            assert line[start] != " ", line


# From the papers: where each acts, and what it looks at there.
FACTS = {
    "none": ([], "nothing", True),
    "uniform": (["between"], "nothing", True),
    "fastervlm": (["between"], "[CLS] attention -2", True),
    "globalcom2": (["between"], "[CLS] attention -1", True),
    "hired": (["between"], "[CLS] attention 0 -2", True),
    "visionzip": (["between"], "[CLS] attention -2, keys -2, [CLS] feature", True),
    "fastv": (["language model"], "LLM attention 1", False),
    "tome": (["vision encoder"], "keys inside encoder 0..22", True),
    "ficoco_v": (["vision encoder"], "[CLS] attention and patch attention inside encoder 12..22", True),
}


@pytest.mark.parametrize("name", FACTS)
def test_what_is_known_of_a_method_is_listed(name: str, run) -> None:
    stages, needs, query_agnostic = FACTS[name]
    (found,) = (method for method in json.loads(run("--json")) if method["name"] == name)
    assert found["stages"] == stages
    assert listing.needs_text(found["needs"]) == needs
    assert found["query_agnostic"] is query_agnostic
    (line,) = (line for line in run().splitlines() if line.split()[0] == name)
    assert needs in line


@pytest.mark.parametrize("name", available())
def test_what_is_listed_of_a_method_is_what_its_class_says(name: str, run) -> None:
    cls, found = method_class(name), json.loads(run(name, "--json"))
    assert found["paper"] == cls.paper
    assert found["profiles"] == list(cls.profiles)
    assert set(found["profiles"]) <= set(PROFILES)
    assert found["follows_ratio"] is cls.has_ratio
    assert found["query_agnostic"] is cls.query_agnostic
    assert ("language model" in found["stages"]) == bool(cls().points_in(32))
    assert ("vision encoder" in found["stages"]) == bool(cls().encoder_points(23))
    # Whoever decides inside the language model sees the question, and nobody else does.
    assert ("language model" in found["stages"]) != found["query_agnostic"]


class Fake(Compressor):
    """A method that acts everywhere."""

    name = "fake"
    taps = Taps(keys=(3,))
    encoder_reads = ("stars",)
    query_agnostic = False
    profiles = ("released", "corrected")

    def encoder_points(self, depth: int) -> tuple[int, ...]:
        return tuple(range(depth - 2, depth))

    def points_in(self, depth: int) -> tuple[int, ...]:
        return (2, depth // 2, depth - 4)

    @property
    def llm_points(self) -> tuple[int, ...]:
        return self.points_in(32)


def test_stages_follow_from_what_a_class_overrides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listing, "method_class", lambda name: Fake)
    found = listing.describe("fake")
    assert found["stages"] == ["vision encoder", "language model"]
    assert found["flash_attention"] == ["language model"]
    assert listing.needs_text(found["needs"]) == "keys 3, stars inside encoder 21 22, LLM attention 2 16 28"
    text = listing.listing([found]).splitlines()[1]
    assert "vision encoder + language model  -  " in text
    assert text.endswith("  yes                 yes, SDPA where merging  released, corrected")


@pytest.mark.parametrize("name", available())
def test_every_field_is_listed_with_its_default_and_what_it_means(name: str, run) -> None:
    text, data = run(name), json.loads(run(name, "--json"))
    assert data["doc"].splitlines()[0] in text
    fields = {field["name"]: field for field in data["fields"]}
    assert set(fields) == {field.name for field in dataclasses.fields(method_class(name))}
    for field in dataclasses.fields(method_class(name)):
        assert fields[field.name]["doc"], f"{name}.{field.name} has no docstring"
        assert f"\n  {field.name} = {field.default!r}\n" in text
        if field.default is not None:
            assert str(get(f"{name}({field.name}={field.default!r})")) == f"{name}()"
    # A method's own fields come before those that all have.
    assert [field["name"] for field in data["fields"]][-2:] == ["retention_ratio", "profile"]


def test_a_field_keeps_the_docstring_of_the_class_nearest_to_it() -> None:
    (ratio,) = (f for f in listing.describe_fields(method_class("none")) if f["name"] == "retention_ratio")
    assert ratio["doc"].startswith("Kept ÷ uncompressed visual tokens, in (0, 1]")
    (alpha,) = (f for f in listing.describe_fields(method_class("globalcom2")) if f["name"] == "alpha")
    assert alpha["default"] == 0.5
    assert alpha["doc"].startswith("α of eq. 8")


@pytest.mark.parametrize("arguments", [["nosuch"], ["Uniform"], ["base"], ["__main__"], ["none", "more"], ["--nosuch"]])
def test_bad_input_is_one_line_and_exit_code_2(arguments: list[str], command: Command) -> None:
    code, out, err = command(listing.main, *arguments)
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert arguments[-1] in err
