"""The throughput command counts right and compares equal answers; its times are nobody's business here."""

import json
import sys

import pytest

from llava.eval import throughput
from llava.utils import run_command


def command(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["throughput", "--scale", "miniature", "--device", "cpu", *arguments])
    code = 0
    try:
        run_command(throughput.main)
    except SystemExit as stop:
        code = stop.code
    return code, *capsys.readouterr()


def test_counts_and_equal_answers(monkeypatch, capsys):
    code, out, _ = command(monkeypatch, capsys, "--images", "3", "--questions", "2", "--rounds", "2", "--json")
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


def test_for_people(monkeypatch, capsys):
    code, out, _ = command(monkeypatch, capsys, "--images", "1", "--questions", "1", "--rounds", "5")
    assert code == 0
    assert out.count("question by question") == 2
    assert out.count("0 answers differ") == 2


def test_bad_numbers_are_one_line(monkeypatch, capsys):
    code, out, err = command(monkeypatch, capsys, "--images", "0")
    assert (code, out, err.count("\n")) == (2, "", 1)


@pytest.mark.parametrize("scale", sorted(throughput.SCALES))
def test_scales_are_whole_heads(scale):
    sizes = throughput.SCALES[scale]
    assert sizes.vision[0] % 4 == sizes.language[0] % 8 == 0
