"""The throughput command counts right and compares equal answers; its times are nobody's business here."""

import json
from functools import partial

import pytest

from llava.eval import throughput


@pytest.fixture
def command(command):
    return partial(command, throughput.main, "--scale", "miniature", "--device", "cpu")


def test_counts_and_equal_answers(command):
    code, out, _ = command("--images", "3", "--questions", "2", "--rounds", "2", "--json")
    assert code == 0
    found = json.loads(out)
    assert [(row["method"], row["mode"]) for row in found["speeds"]] == [
        (method, mode) for method in throughput.METHODS for mode in throughput.MODES
    ]
    assert {row["questions"] for row in found["speeds"]} == {6}
    for row in found["speeds"]:
        assert 0 < row["slowest"] <= row["questions_per_second"] <= row["fastest"]
    assert found["answers_differ"] == dict.fromkeys(throughput.METHODS, 0)
    assert found["speeds"][0]["against_first"] == 1


def test_for_people(command):
    code, out, _ = command("--images", "1", "--questions", "1", "--rounds", "5")
    assert code == 0
    assert out.count("question by question") == 2
    assert out.count("0 answers differ") == 2


def test_bad_numbers_are_one_line(command):
    code, out, err = command("--images", "0")
    assert (code, out, err.count("\n")) == (2, "", 1)


@pytest.mark.parametrize("scale", sorted(throughput.SCALES))
def test_scales_are_whole_heads(scale):
    sizes = throughput.SCALES[scale]
    assert sizes.vision[0] % 4 == sizes.language[0] % 8 == 0
