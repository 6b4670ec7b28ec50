"""The table: the paper's own averages from its own scores, and refusal to compare what is not comparable."""

import json

import pytest

from llava.constants import InputError
from llava.eval import benchmarks, table
from llava.eval.published import COLUMNS, TABLES, TIMES, TITLES, UPPER
from tests.eval.data import write_benchmark


@pytest.mark.parametrize("size", TABLES)
def test_published_averages_follow_from_published_scores(size):
    """The average is the mean of score ÷ upper bound over the ten: every printed one comes out, to its digit."""
    upper = TABLES[size][UPPER][:-1]
    for key, (*scores, average) in TABLES[size].items():
        mean = sum(100 * score / bound for score, bound in zip(scores, upper, strict=True)) / 10
        assert mean == pytest.approx(average, abs=0.051), key


def test_columns_are_the_ten_benchmarks():
    assert sorted(COLUMNS) == benchmarks.available()
    assert len(TITLES) == len(COLUMNS) == 10
    assert all(len(row) == 11 for rows in TABLES.values() for row in rows.values())
    assert all(key in TABLES[size] for key, size in TIMES)


@pytest.mark.parametrize(
    ("spec", "key"),
    [
        ("none(retention_ratio=0.25)", ("none", 1.0)),
        ("globalcom2(retention_ratio=0.25)", ("globalcom2", 0.25)),
        ("tome(r=5)", ("tome(r=5)", table.OWN)),
        ("ficoco_l(retention_ratio=0.25, r=5)", ("ficoco_l(r=5)", table.OWN)),  # as once recorded
        ("globalcom2(retention_ratio=0.1, profile='released')", ("globalcom2(profile='released')", 0.1)),
    ],
)
def test_recorded_methods_are_told_apart(spec, key):
    assert table.method_key(spec) == key


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
    assert table.published_table(path) == (TABLES[size] if size else {})


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
    rows = table.compare(table.collect(root, data))
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


@pytest.mark.parametrize("changed", [{"questions": "other"}, {"conv_mode": "llava_v1"}, {"benchmark": "pope"}])
def test_without_an_upper_bound_of_the_same_configuration_it_refuses(results, changed):
    if "benchmark" in changed:
        root, data = results("quarter", "globalcom2(retention_ratio=0.25)", 12)
    else:
        results("upper", "none(retention_ratio=0.25)", 16, **changed)
        root, data = results("quarter", "globalcom2(retention_ratio=0.25)", 12)
    with pytest.raises(InputError, match="no upper bound"):
        table.compare(table.collect(root, data))


def test_models_are_not_mixed(results):
    results("upper", "none()", 16)
    root, data = results("other", "none()", 16, model_path="somewhere/else")
    with pytest.raises(InputError, match="several models"):
        table.collect(root, data)
    assert len(table.collect(root, data, "somewhere/else")) == 1


def test_command(results, command):
    results("upper", "none()", 16)
    root, data = results("quarter", "globalcom2(retention_ratio=0.25)", 12)
    code, out, _ = command(table.main, "--root", root, "--data", data, "--json")
    found = json.loads(out)
    assert code == 0
    assert [row["retention_ratio"] for row in found["rows"]] == [1.0, 0.25]
    assert found["rows"][1]["published"][1] == 61.4
    assert command(table.main, "--root", root / "nosuch")[0] == 2


def test_two_files_that_answer_the_same_are_told(results):
    """A run with --limit beside a whole one: which one a table means cannot be guessed."""
    results("upper", "none(retention_ratio=0.25)", 16)
    root, data = results("again", "none(retention_ratio=0.5)", 12)
    with pytest.raises(InputError, match="are both gqa with none at 1; move one elsewhere"):
        table.collect(root, data)


def test_a_run_is_compared_with_an_upper_bound_of_as_many_answers(results):
    root, data = results("upper", "none(retention_ratio=0.25)", 16)
    results("quarter", "globalcom2(retention_ratio=0.25)", 12)
    file = root / "upper" / "a.jsonl"
    file.write_text("".join(line + "\n" for line in file.read_text().splitlines()[:10]))
    with pytest.raises(InputError, match="no upper bound with 20 answers"):
        table.compare(table.collect(root, data))


def test_a_run_without_an_answer_yet_is_left_out(results):
    results("upper", "none(retention_ratio=0.25)", 16)
    root, data = results("quarter", "globalcom2(retention_ratio=0.25)", 12)
    (root / "quarter" / "a.jsonl").write_text("")
    assert [run.key for run in table.collect(root, data)] == [UPPER]
