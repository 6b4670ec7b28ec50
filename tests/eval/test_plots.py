"""Curves: which runs are on which, and that a file comes of them."""

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from llava.constants import InputError
from llava.eval.plots import against_field, against_ratio, draw
from tests.conftest import file_limit

ROWS = {
    ("none", 1.0): {"average": 100.0},
    ("globalcom2", 0.5): {"average": 96.0},
    ("globalcom2", 0.25): {"average": 90.0},
    ("globalcom2(alpha=0.0)", 0.25): {"average": 80.0},
    ("globalcom2(alpha=1.0)", 0.25): {"average": 85.0},
    ("globalcom2(alpha=1.0, profile='paper')", 0.25): {"average": 70.0},
    ("globalcom2(alpha=0.2, profile='paper')", 0.25): {"average": 71.0},
    ("random", 0.25): {"average": 60.0},
    ("uniform", 0.25): {"average": None},
    ("thumbnail_only", 0.0): {"average": 75.0},
}


def test_against_the_ratio_every_method_ends_at_the_upper_bound() -> None:
    curves = against_ratio(ROWS)
    assert curves["globalcom2"] == [(25, 90), (50, 96), (100, 100)]
    assert curves["random"] == [(25, 60), (100, 100)]
    assert not {"uniform", "thumbnail_only", "none"} & curves.keys()


def test_against_a_field_runs_differ_in_nothing_else() -> None:
    assert against_field(ROWS, "alpha") == {
        "globalcom2, R = 0.25": [(0.0, 80), (0.5, 90), (1.0, 85)],
        "globalcom2(profile='paper'), R = 0.25": [(0.2, 71), (1.0, 70)],
    }
    for field in ("temperature", "nosuch", "name"):
        with pytest.raises(InputError, match="several values"):
            against_field(ROWS, field)


@pytest.mark.parametrize("rows", [{}, {("none", 1.0): {"average": None}}, {("globalcom2", 0.5): {"average": None}}])
def test_without_an_upper_bound_nothing_is_drawn(rows: Any) -> None:
    with pytest.raises(InputError, match="no run has an upper bound"):
        against_ratio(rows)


def test_on_a_full_disk_the_picture_before_stays(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("before")
    with file_limit(8192), pytest.raises(InputError, match=r"^cannot write '.+a\.png' \(File too large\); raise"):
        draw(against_ratio(ROWS), "x", tmp_path / "a.png")
    with pytest.raises(InputError, match=r"a\.foo' \(Format 'foo' is not supported"):
        draw(against_ratio(ROWS), "x", tmp_path / "a.foo")
    assert (tmp_path / "a.png").read_text() == "before"
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("logarithmic", [False, True])
def test_a_picture_is_drawn(tmp_path: Path, logarithmic: bool) -> None:
    draw(against_ratio(ROWS), "x", tmp_path / "a.png", logarithmic)
    with Image.open(tmp_path / "a.png") as image:
        assert min(image.size) > 300
        assert len(set(image.convert("RGB").get_flattened_data())) > 50
