"""The table: the paper's own averages from its own scores, and a table whatever stands beside the runs."""

import csv
import io
import json
from pathlib import Path

import pytest

from llava.constants import InputError
from llava.eval import benchmarks, published, table
from llava.eval.benchmarks.base import Result
from llava.eval.cells import OWN, Cell, append_cell, method_key, read_cells
from llava.eval.intervals import Interval
from llava.eval.published import COLUMNS, TABLES, TIMES, TITLES, UPPER
from llava.eval.runs import Found, collect
from tests.eval.data import write_benchmark


@pytest.mark.parametrize("size", TABLES)
def test_published_averages_follow_from_published_scores(size):
    """The average is the mean of score ÷ upper bound over the ten: every printed one comes out, to its digit."""
    upper = TABLES[size][UPPER][:-1]
    for key, (*scores, average) in TABLES[size].items():
        mean = sum(100 * score / bound for score, bound in zip(scores, upper, strict=True)) / 10
        assert mean == pytest.approx(average, abs=0.051), key


def test_columns_are_the_papers_ten_and_then_whatever_else_is_registered(monkeypatch):
    assert set(COLUMNS) <= set(benchmarks.available())
    assert len(TITLES) == len(COLUMNS) == 10
    assert all(len(row) == 11 for rows in TABLES.values() for row in rows.values())
    assert all(key in TABLES[size] for key, size in TIMES)
    monkeypatch.setattr(benchmarks, "available", lambda: sorted([*COLUMNS, "abench", "zbench"]))
    assert published.columns() == [*COLUMNS, "abench", "zbench"]
    assert [published.title(name) for name in ("textvqa", "zbench")] == ["VQA^T", "zbench"]


@pytest.mark.parametrize(
    ("spec", "key"),
    [
        ("none(retention_ratio=0.25)", ("none", 1.0)),
        ("globalcom2(retention_ratio=0.25)", ("globalcom2", 0.25)),
        ("tome(r=5)", ("tome(r=5)", OWN)),
        ("ficoco_l(retention_ratio=0.25, r=5)", ("ficoco_l(r=5)", OWN)),  # as once recorded
        ("globalcom2(retention_ratio=0.1, profile='released')", ("globalcom2(profile='released')", 0.1)),
    ],
)
def test_recorded_methods_are_told_apart(spec, key):
    assert method_key(spec) == key


@pytest.mark.parametrize(
    ("path", "size"),
    [
        ("./liuhaotian/llava-next-7b", "7b"),
        ("liuhaotian/llava-v1.6-vicuna-13b", "13b"),
        ("liuhaotian/llava-v1.5-7b", None),
        ("outputs/miniature", None),
    ],
)
def test_published_figures_stand_beside_the_papers_models_only(path, size):
    assert published.size_of(path) == size
    found = published.figures(path, ("globalcom2", 0.25))
    assert (found.get("gqa"), found.get("average")) == {"7b": (61.4, 96.9), "13b": (62.7, 95.9), None: (None, None)}[
        size
    ]
    assert published.figures(path, ("globalcom2(alpha=0.0)", 0.25)) == {}


@pytest.fixture
def results(tmp_path):
    """Write an answers file as a finished run leaves it; `right` of the answers are right."""
    data = tmp_path / "data"
    folder = write_benchmark("gqa", data, n_images=10, per_image=2)
    gqa = benchmarks.get("gqa")
    labels = json.loads(next(folder.rglob("testdev_balanced_questions.json")).read_text())
    questions = list(gqa.questions(folder / gqa.question_file))

    def write(name, method, right, **config):
        root = tmp_path / "runs" / name
        root.mkdir(parents=True)
        rows = [
            {
                "question_id": q.id,
                "prompt": q.text,
                "text": labels[str(q.id)]["answer"] if number < right else "nonsense",
                "metadata": {},
            }
            for number, q in enumerate(questions)
        ]
        (root / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        record = {"method": method, "benchmark": "gqa", "model_path": "liuhaotian/llava-next-7b", "questions": "x"}
        (root / "a.jsonl.config.json").write_text(json.dumps(record | config))
        summary = {"seconds": 75.5, "answered_now": len(rows), "questions": len(rows)}
        (root / "a.jsonl.summary.json").write_text(json.dumps(summary))
        return tmp_path / "runs", data

    return write


def test_scores_differences_and_averages(results):
    results("upper", "none(retention_ratio=0.25)", 16)
    root, data = results("quarter", "globalcom2(retention_ratio=0.25)", 12)
    rows = table.compare(collect(root, data))
    assert list(rows) == [UPPER, ("globalcom2", 0.25)]
    assert rows[UPPER]["scores"]["gqa"] == pytest.approx(80)
    row = rows["globalcom2", 0.25]
    assert row["scores"]["gqa"] == pytest.approx(60)
    assert row["average"] == pytest.approx(75)
    difference = row["differences"]["gqa"]
    assert difference.value == pytest.approx(-20)
    assert difference.low < -20 < difference.high <= 0  # nothing that was wrong became right
    assert row["n"]["gqa"] == 20
    assert row["seconds"]["gqa"] == 75.5
    text = table.as_text(rows, "liuhaotian/llava-next-7b")
    assert "61.4" in text  # the published GQA of GlobalCom² at 25 %
    assert "75.0% of 1" in text


@pytest.mark.parametrize("changed", [{"questions": "other"}, {"conv_mode": "llava_v1"}, {"model": "other files"}])
def test_without_an_upper_bound_of_the_same_configuration_there_is_a_score_and_a_note(results, changed, tmp_path):
    results("upper", "none(retention_ratio=0.25)", 16, **changed)
    root, data = results("quarter", "globalcom2(retention_ratio=0.25)", 12)
    found = collect(root, data, cells=listed(tmp_path, root))
    rows = table.compare(found)
    assert rows["globalcom2", 0.25]["scores"] == {"gqa": pytest.approx(60)}
    assert (rows["globalcom2", 0.25]["differences"], rows["globalcom2", 0.25]["average"]) == ({}, None)
    (note,) = [note for note in table.remarks(found) if "no upper bound" in note]
    assert note.startswith("gqa with globalcom2 at 0.25: no upper bound of the same configuration")


def test_models_are_not_mixed(results):
    results("upper", "none()", 16)
    root, data = results("other", "none()", 16, model_path="somewhere/else")
    with pytest.raises(InputError, match="several models"):
        collect(root, data)
    assert len(collect(root, data, "somewhere/else").runs) == 1
    assert len(collect(root, data, "./somewhere/../somewhere/else/").runs) == 1, "another spelling"


def test_command(results, command):
    results("upper", "none()", 16)
    root, data = results("quarter", "globalcom2(retention_ratio=0.25)", 12)
    code, out, _ = command(table.main, "--root", root, "--data", data, "--json")
    found = json.loads(out)
    assert code == 0
    assert [row["retention_ratio"] for row in found["rows"]] == [1.0, 0.25]
    assert found["rows"][1]["published"]["gqa"] == 61.4
    assert found["columns"] == ["gqa"]
    assert command(table.main, "--root", root / "nosuch")[0] == 2


def listed(folder: Path, root: Path, *more: Cell) -> Path:
    """A grid's list of all runs under a folder."""
    file = folder / "cells.tsv"
    for answers in sorted(root.rglob("*.jsonl")):
        append_cell(file, Cell("gqa", "globalcom2", "0.25", "", answers))
    for cell in more:
        append_cell(file, cell)
    return file


def shorten(file: Path, number: int) -> None:
    file.write_text("".join(line + "\n" for line in file.read_text().splitlines()[:number]))


def test_what_stands_beside_the_runs_of_a_grid_is_a_note(results, tmp_path, command):
    """A run with a limit, another method, damaged records and answers, and cells that failed or are not there yet."""
    results("upper", "none()", 16)
    root, data = results("quarter", "globalcom2(retention_ratio=0.25)", 12)
    failed = Cell("pope", "globalcom2", "0.25", "released", root / "pope.jsonl", "exit code 2")
    cells = listed(tmp_path, root, failed, Cell("gqa", "uniform", "0.5", "", root / "u" / "u.jsonl"))
    for name in ("upper", "quarter"):
        for file in (root / name).glob("a.jsonl*"):
            file.with_name(file.name.replace("a.jsonl", "a-first8.jsonl")).write_bytes(file.read_bytes())
        shorten(root / name / "a-first8.jsonl", 8)
    (root / "quarter" / "b.jsonl").write_text("{")
    (root / "quarter" / "b.jsonl.config.json").write_text("[0, 1")
    code, out, err = command(table.main, "--root", root, "--data", data, "--cells", cells)
    assert (code, err) == (0, "")
    notes = [line for line in out.splitlines() if line.startswith("note: ")]
    text = out.split("note: ")[0]
    assert "-20.0 [" in text
    assert "missing" in text
    assert notes[0] == "note: missing: pope with globalcom2(profile='released') at 0.25 (exit code 2)"
    assert notes[1] == "note: missing: gqa with uniform at 0.5 (no finished answers)"
    (beside,) = notes[2:]
    assert beside.startswith("note: not of this grid: ")
    for name in ("upper/a-first8.jsonl", "quarter/a-first8.jsonl", "quarter/b.jsonl"):
        assert str(root / name) in beside


def test_without_a_list_the_largest_run_with_an_upper_bound_is_taken(results):
    results("upper", "none()", 16)
    results("quarter", "globalcom2(retention_ratio=0.25)", 12)
    results("half", "globalcom2(retention_ratio=0.5)", 12)
    root, data = results("many", "uniform(retention_ratio=0.5)", 12)
    for name in ("upper", "quarter"):
        shorten(root / name / "a.jsonl", 10)
    found = collect(root, data)
    assert [run.key for run in found.runs] == [("globalcom2", 0.25), UPPER]
    (note,) = found.notes
    assert note.startswith("left out of gqa, which is over runs of one configuration with 10 answers: ")
    assert str(root / "half" / "a.jsonl") in note
    assert str(root / "many" / "a.jsonl") in note


def test_two_files_that_answer_the_same_are_one_row_and_a_note(results):
    results("upper", "none(retention_ratio=0.25)", 16)
    root, data = results("again", "none(retention_ratio=0.5)", 12)
    found = collect(root, data)
    assert [run.answers.parent.name for run in found.runs] == ["again"]
    (note,) = found.notes
    assert note == f"left out: {root}/upper/a.jsonl is gqa with none at 1 like {root}/again/a.jsonl"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", "nonsense"),
        ("a.jsonl", '{"question_id": 1}'),
        ("a.jsonl", '{"question_id": 987, "text": "x", "metadata": 5}'),
        ("a.jsonl.config.json", "{"),
        ("a.jsonl.config.json", "[]"),
        ("a.jsonl.config.json", '{"benchmark": "gqa", "model_path": "x", "method": "globalcom9()"}'),
        ("a.jsonl.config.json", '{"benchmark": "gqa", "model_path": "liuhaotian/llava-next-7b", "method": "((("}'),
        ("a.jsonl.config.json", '{"benchmark": "abench", "method": "none()"}'),
        ("a.jsonl.config.json", "\x00"),
    ],
)
@pytest.mark.parametrize("with_list", [False, True])
def test_an_unreadable_run_costs_itself_alone(results, tmp_path, name, content, with_list):
    results("upper", "none()", 16)
    root, data = results("quarter", "globalcom2(retention_ratio=0.25)", 12)
    (root / "quarter" / name).write_text(content)
    found = collect(root, data, cells=listed(tmp_path, root) if with_list else None)
    assert [run.key for run in found.runs] == [UPPER]
    assert len(found.notes) + len(found.missing) == 1
    assert all("\n" not in note for note in [*found.notes, *found.missing.values()])
    assert "80.0" in table.as_text(table.compare(found), "x")


def test_a_damaged_summary_costs_the_time_alone(results):
    root, data = results("upper", "none()", 16)
    (root / "upper" / "a.jsonl.summary.json").write_text('{"seconds": []}')
    (run,) = collect(root, data).runs
    assert (run.seconds, run.value) == (None, 80)


def test_columns_and_notes_are_there_once(results):
    """Three benchmarks of ten, of which one is scored elsewhere; the number of answers is said once."""
    results("upper", "none()", 16)
    root, data = results("quarter", "globalcom2(retention_ratio=0.25)", 12)
    for name in ("upper", "quarter"):
        shorten(root / name / "a.jsonl", 8)
    found = collect(root, data)
    text = table.as_text(table.compare(found), "liuhaotian/llava-next-7b")
    heads = [line.split() for line in text.splitlines() if "Average" in line]
    assert heads == [["GQA", "Average"]] * 2
    assert [note for note in table.remarks(found) if " of 20" in note] == [
        "gqa: 8 of 20 questions have an answer; the score is over these"
    ]


def test_what_is_scored_elsewhere_and_what_has_no_score_are_told_apart(results):
    root, data = results("upper", "none()", 16)
    (run,) = collect(root, data).runs
    for scored, shown in (("server", "server"), ("local", "-")):
        bare = Result(benchmark="gqa", metrics={}, headline="accuracy", n=1, scored=scored)
        rows = table.compare(Found([type(run)(listed=run.listed, result=bare, pictures={}, seconds=None)]))
        assert table.layout(rows, "x")[1][0][1][0] == ["none", shown]


def test_cells_do_not_touch():
    """However wide an interval or long a method's name."""
    rows = {}
    for key in (UPPER, ("ficoco_vl(control_language_layer=-1, language_layers=1)", 0.25)):
        rows[key] = {part: {} for part in ("n", "scored", "seconds", "missing")} | {"average": None, "averaged": 0}
        rows[key] |= {"scores": {"gqa": 1.0, "mme": 1519.0}, "n": {"gqa": 9, "mme": 9}}
        rows[key]["differences"] = {name: Interval(-1000.25, -1234.5, -1000.0, 9) for name in ("gqa", "mme")}
    lines = table.as_text(rows, "x").splitlines()
    (difference, _) = [line for line in lines if "difference" in line][1:]
    assert difference.split() == ["difference", *["-1000.2", "[-1234.5,-1000.0]"] * 2]
    assert len({len(line) for line in lines if "GQA" in line or "[" in line}) == 1


def test_markdown(results, command):
    results("upper", "none()", 16)
    root, data = results("quarter", "globalcom2(retention_ratio=0.25)", 12)
    code, out, _ = command(table.main, "--root", root, "--data", data, "--markdown")
    lines = [line for line in out.splitlines() if line.startswith("|")]
    assert code == 0
    assert len({line.count("|") for line in lines}) == 1
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0] == ["R", "", "GQA", "Average"]
    assert [row[:2] for row in cells[2:]] == [
        ["1", "`none`"], ["", "published"], ["0.25", "`globalcom2`"], ["", "difference"], ["", "published"],
    ]  # fmt: skip
    assert cells[4][2:] == ["60.0", "75.0% of 1"]
    assert cells[6][2] == "61.4"


def test_csv(results, command):
    results("upper", "none()", 16)
    root, data = results("quarter", "globalcom2(retention_ratio=0.25)", 12)
    code, out, err = command(table.main, "--root", root, "--data", data, "--csv")
    rows = list(csv.DictReader(io.StringIO(out)))
    assert (code, err) == (0, "")
    assert [(r["method"], r["retention_ratio"], r["benchmark"]) for r in rows] == [
        (method, ratio, name)
        for method, ratio in (("none", "1.0"), ("globalcom2", "0.25"))
        for name in ("gqa", "average")
    ]
    quarter = rows[2]
    assert (quarter["n"], float(quarter["score"]), quarter["published"], quarter["state"]) == ("20", 60, "61.4", "ok")
    assert float(quarter["low"]) < float(quarter["difference"]) == -20 < float(quarter["high"]) <= 0
    assert command(table.main, "--root", root, "--csv", "--markdown")[0] == 2


def test_a_run_without_an_answer_yet_is_left_out(results):
    results("upper", "none(retention_ratio=0.25)", 16)
    root, data = results("quarter", "globalcom2(retention_ratio=0.25)", 12)
    (root / "quarter" / "a.jsonl").write_text("")
    assert [run.key for run in collect(root, data).runs] == [UPPER]


def test_no_run_at_all_says_why(results, tmp_path):
    root, data = results("upper", "none()", 16)
    cells = tmp_path / "cells.tsv"
    append_cell(cells, Cell("gqa", "none", "1.0", "", root / "upper" / "a.jsonl", "out of\nmemory"))
    with pytest.raises(InputError, match=r"no finished answers of .*: out of memory"):
        collect(root, data, cells=cells)


def test_a_list_of_cells_that_cannot_be_written_is_said_in_a_line(tmp_path):
    (tmp_path / "file").touch()
    for place in (tmp_path, tmp_path / "file" / "cells.tsv"):
        with pytest.raises(InputError, match="cannot write"):
            append_cell(place, Cell("gqa", "none", "1.0", "", tmp_path / "a.jsonl"))


def test_the_last_word_about_a_cell_counts(tmp_path):
    file = tmp_path / "cells.tsv"
    for why in ("", "exit code 2"):
        append_cell(file, Cell("gqa", "tome(r=5)", "0.25", "", tmp_path / "a.jsonl", why))
    (cell,) = read_cells(file)
    assert (cell.failed, cell.key) == ("exit code 2", ("tome(r=5)", OWN))
    assert Cell("gqa", "globalcom9", "0.25", "", tmp_path).key == ("globalcom9", OWN)
    assert Cell("gqa", "globalcom2", "0.5", "paper", tmp_path).key == ("globalcom2(profile='paper')", 0.5)
    file.write_text("gqa\tnone\n")
    with pytest.raises(InputError, match="line 1 is no cell"):
        read_cells(file)
    with pytest.raises(InputError, match="cannot read the list of cells"):
        read_cells(tmp_path / "nosuch")
