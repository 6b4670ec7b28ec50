"""Upstream's scorers and converters: their flags, their output, run by path and as modules from the root."""

import json
import re
import runpy
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from llava.constants import InputError
from llava.eval import eval_pope, eval_science_qa, eval_textvqa
from llava.eval.benchmarks import get
from tests.eval.benchmarks.rows import row, write, write_lines
from tests.eval.data import write_benchmark

ROOT = Path(__file__).parents[2]
BY_PATH = [
    *(f"llava/eval/{name}.py" for name in ("eval_pope", "eval_science_qa", "eval_textvqa")),
    *(f"scripts/convert_{name}.py" for name in ("gqa_for_eval", "mmbench_for_submission", "mmvet_for_eval")),
    *(f"scripts/convert_{name}.py" for name in ("sqa_to_llava", "vizwiz_for_submission", "vqav2_for_submission")),
]


def python(*argv: Any) -> subprocess.CompletedProcess[str]:
    """Run Python from the root, with nothing on its path that only tests have."""
    command = [sys.executable, *map(str, argv)]
    return subprocess.run(command, cwd=ROOT, env={"PYTHONSAFEPATH": ""}, capture_output=True, text=True)


def answer(name: str, data: Path, texts: Sequence[str]) -> list[dict[str, Any]]:
    """Answers to generated questions, `texts` over and over."""
    questions = get(name).questions(data / get(name).question_file)
    return [row(q.id, texts[n % len(texts)], q.prompt or q.text, **q.extra) for n, q in enumerate(questions)]


@pytest.mark.parametrize("file", BY_PATH)
def test_by_path(file: str) -> None:
    done = python(file, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    flags = set(re.findall(r"--\w[\w-]*", done.stdout)) - {"--help"}
    both = [*flags, *("--" + flag[2:].replace("-", "_") for flag in flags)]
    spelt = python(file, *(f"{flag}=x" for flag in both), "--no-such")
    assert "unrecognized arguments: --no-such (" in spelt.stderr, "every flag is known in both spellings"
    bare = python(file)
    assert bare.returncode == 2
    assert len(bare.stderr.splitlines()) == 1


def test_m4c_by_path() -> None:
    assert python("llava/eval/m4c_evaluator.py").returncode == 0


def test_pope(tmp_path: Path) -> None:
    data = write_benchmark("pope", tmp_path, n_images=4)
    results = write_lines(tmp_path / "a.jsonl", answer("pope", data, ["Yes"]))
    flags = ["--annotation-dir", data / "coco", "--question-file", data / "llava_pope_test.jsonl"]
    done = python("-m", "llava.eval.eval_pope", *flags, "--result-file", results)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[:10] == [
        "Category: adversarial, # samples: 4",
        "TP\tFP\tTN\tFN\t",
        "2\t2\t0\t0",
        "Accuracy: 0.5",
        "Precision: 0.5",
        "Recall: 1.0",
        "F1 score: 0.6666666666666666",
        "Yes ratio: 1.0",
        "0.667, 0.500, 0.500, 1.000, 1.000",
        "====================================",
    ]
    assert [line for line in lines if line.startswith("Category")] == [
        f"Category: {name}, # samples: 4" for name in ("adversarial", "popular", "random")
    ]


def test_pope_says_what_is_amiss_on_stderr(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_benchmark("pope", tmp_path)
    results = write_lines(tmp_path / "a.jsonl", answer("pope", data, ["No"])[:2])
    flags = ["--annotation-dir", data / "coco", "--question-file", data / "llava_pope_test.jsonl"]
    eval_pope.main([str(value) for value in (*flags, "--result-file", results)])
    assert "questions have an answer" in capsys.readouterr().err


def test_pope_with_the_authors_ids(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every category has a question 1; right in one of them is not right in all."""
    lines = [(name, label) for name in ("adversarial", "popular") for label in ("yes", "no")]
    entries = [{"question_id": 1 + n % 2, "image": "a.jpg", "text": f"Is it {lines[n][1]}?"} for n in range(4)]
    questions = [entry | {"category": name} for entry, (name, _) in zip(entries, lines, strict=True)]
    write_lines(tmp_path / "q.jsonl", questions)
    for start, name in ((0, "adversarial"), (2, "popular")):
        labels = [entry | {"label": label} for entry, (_, label) in zip(entries[start:], lines[start:], strict=True)]
        write_lines(tmp_path / f"coco_pope_{name}.json", labels[:2])
    rows = [row(q["question_id"], text, q["text"]) for q, text in zip(questions, ("Yes", "No") * 2, strict=True)]
    rows[2]["text"], rows[3]["text"] = "No", "Yes"
    flags = ["--annotation-dir", tmp_path, "--question-file", tmp_path / "q.jsonl", "--result-file"]
    named = [entry | {"category": q["category"]} for entry, q in zip(rows, questions, strict=True)]
    eval_pope.main([str(value) for value in (*flags, write_lines(tmp_path / "a.jsonl", named))])
    scores = re.findall(r"^F1 score: (\S+)$", capsys.readouterr().out, re.MULTILINE)
    assert scores == ["1.0", "0.0"]
    with pytest.raises(InputError, match="do not say which they belong to"):
        eval_pope.main([str(value) for value in (*flags, write_lines(tmp_path / "b.jsonl", rows))])


def test_science_qa(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    problems = {key: {"answer": n, "choices": ["dog", "cat"]} for n, key in enumerate(("7", "8"))}
    write(tmp_path / "problems.json", problems | {"9": problems["7"]})
    write(tmp_path / "pid_splits.json", {"minitest": ["7", "8", "9"]})
    results = write_lines(tmp_path / "a.jsonl", [row("7", "A", "<image>\nQ"), row("8", "Maybe", "<image>\nR")])
    flags = ["--base-dir", tmp_path, "--result-file", results, "--split", "minitest", "--options", "ABC"]
    output = ["--output-file", tmp_path / "o" / "output.json", "--output-result", tmp_path / "o" / "result.json"]
    eval_science_qa.main([str(value) for value in (*flags, *output)])
    caught = capsys.readouterr()
    assert caught.out == "Total: 3, Correct: 1, Accuracy: 33.33%, IMG-Accuracy: 50.00%\n"
    assert [line.split(" ")[1] for line in caught.err.splitlines()] == ["1", "1"]
    assert "1 of 3 questions have no answer" in caught.err
    written = json.loads((tmp_path / "o" / "output.json").read_text())
    assert written["correct"] == [
        {
            "question_id": "7", "parsed_ans": "A", "ground_truth": "A", "question": "<image>\nQ", "pred": "A",
            "is_multimodal": True,
        }
    ]  # fmt: skip
    assert [(w["question_id"], w["parsed_ans"], w["is_multimodal"]) for w in written["incorrect"]] == [
        ("8", "FAILED", True),
        ("9", "FAILED", False),
    ]
    result = json.loads((tmp_path / "o" / "result.json").read_text())
    assert result.pop("acc") == pytest.approx(100 / 3)
    assert result == {
        "correct": 1, "count": 3, "results": {"7": 0, "8": -1, "9": -1},
        "outputs": {"7": "A", "8": "Maybe", "9": "FAILED"},
    }  # fmt: skip


def test_textvqa(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_benchmark("textvqa", tmp_path, n_images=2)
    labels = json.loads((data / "TextVQA_0.5.1_val.json").read_text())["data"]
    rows = answer("textvqa", data, [""])
    right = [{**r, "text": label["answers"][0]} for r, label in zip(rows, labels, strict=True)]
    write_lines(tmp_path / "runs" / "b.jsonl", right)
    write_lines(tmp_path / "runs" / "a.v2.jsonl", rows)
    annotations = ["--annotation-file", str(data / "TextVQA_0.5.1_val.json")]
    eval_textvqa.main([*annotations, "--result-file", str(tmp_path / "runs" / "b.jsonl")])
    caught = capsys.readouterr()
    assert caught.out == "b\nSamples: 6\nAccuracy: 100.00%\n\n"
    assert "asked with the OCR tokens" in caught.err
    eval_textvqa.main([*annotations, "--result-dir", str(tmp_path / "runs")])
    assert re.findall(r"^(\S+)\nSamples: 6\nAccuracy: (\S+)%$", capsys.readouterr().out, re.MULTILINE) == [
        ("a.v2", "0.00"),
        ("b", "100.00"),
    ]


def test_gqa_and_mmvet(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "a.jsonl", [row("1", "No.")])
    assert python("scripts/convert_gqa_for_eval.py", "--src", source, "--dst", tmp_path / "p.json").returncode == 0
    assert json.loads((tmp_path / "p.json").read_text()) == [{"questionId": "1", "prediction": "no"}]
    assert python("scripts/convert_mmvet_for_eval.py", "--src", source, "--dst", tmp_path / "r.json").returncode == 0
    assert json.loads((tmp_path / "r.json").read_text()) == {"v1_1": "No."}


def test_vqav2(tmp_path: Path) -> None:
    data = write_benchmark("vqav2", tmp_path, n_images=2, per_image=1)
    write_lines(data / "answers" / "S" / "llava-v1.5" / "merge.jsonl", answer("vqav2", data, ["A Dog"])[:1])
    done = python("scripts/convert_vqav2_for_submission.py", "--dir", data, "--split", "S", "--ckpt", "llava-v1.5")
    assert (done.returncode, done.stdout) == (0, "total results: 1, total split: 3\n")
    found = json.loads((data / "answers_upload" / "S" / "llava-v1.5.json").read_text())
    assert [entry["answer"] for entry in found] == ["dog", "", ""]


def test_vizwiz(tmp_path: Path) -> None:
    data = write_benchmark("vizwiz", tmp_path, n_images=2, per_image=1)
    rows = answer("vizwiz", data, ["Unanswerable"])
    flags = ["--annotation-file", data / "llava_test.jsonl", "--result-upload-file", tmp_path / "up" / "x.json"]
    command = ["scripts/convert_vizwiz_for_submission.py", *flags, "--result-file"]
    assert python(*command, write_lines(tmp_path / "a.jsonl", rows)).returncode == 0
    found = json.loads((tmp_path / "up" / "x.json").read_text())
    assert found[1] == {"image": "VizWiz_test_00000001.jpg", "answer": "unanswerable"}
    done = python(*command, write_lines(tmp_path / "b.jsonl", rows[:1]))
    assert done.returncode == 2
    assert "1 of 2 questions have no answer" in done.stderr


def test_mmbench(tmp_path: Path) -> None:
    openpyxl = pytest.importorskip("openpyxl")
    data = write_benchmark("mmbench", tmp_path)
    write_lines(tmp_path / "answers" / "run.v1.jsonl", answer("mmbench", data, ["A"]))
    flags = ["--annotation-file", data / get("mmbench").question_file, "--result-dir", tmp_path / "answers"]
    more = ["--upload-dir", tmp_path / "upload", "--experiment", "run.v1"]
    main = runpy.run_path(str(ROOT / "scripts" / "convert_mmbench_for_submission.py"))["main"]
    main([str(value) for value in (*flags, *more)])
    assert openpyxl.load_workbook(tmp_path / "upload" / "run.v1.xlsx").active.max_row == 13


PROBLEM = {
    "question": "Which?", "choices": ["dog", "cat"], "answer": 1, "hint": "A photo.", "image": "image.png",
    "lecture": "Cats purr.", "solution": "It purrs.",
}  # fmt: skip


@pytest.mark.parametrize(
    ("prompt_format", "asked", "answered"),
    [
        ("CQM-A", "<image>\nContext: A photo.\nWhich?\nA. dog\nB. cat", "B"),
        ("QCM-LEA", "<image>\nWhich?\nContext: A photo.\nA. dog\nB. cat", "Cats purr. It purrs. The answer is B."),
    ],
)
def test_sqa_to_llava(tmp_path: Path, prompt_format: str, asked: str, answered: str) -> None:
    bare = PROBLEM | {"hint": "", "image": None, "lecture": "", "solution": ""}
    write(tmp_path / "problems.json", {"5": PROBLEM, "6": bare})
    write(tmp_path / "pid_splits.json", {"test": ["5", "6"]})
    command = ["scripts/convert_sqa_to_llava.py", "convert_to_llava", "--base-dir", tmp_path, "--split", "test"]
    done = python(*command, "--prompt-format", prompt_format)
    assert (done.returncode, done.stdout) == (0, "Number of samples: 2\n")
    file = tmp_path / f"llava_test_{prompt_format}.json"
    first, second = json.loads(file.read_text())
    said = [{"from": "human", "value": asked}, {"from": "gpt", "value": answered}]
    assert first == {"id": "5", "image": "5/image.png", "conversations": said}
    assert second["conversations"][0]["value"] == "Which?\nA. dog\nB. cat"
    assert "image" not in second
    question = next(iter(get("scienceqa").questions(file)))
    assert (question.image, question.prompt) == ("5/image.png", asked)


def test_sqa_to_llava_refuses_an_unknown_format(tmp_path: Path) -> None:
    done = python(
        "scripts/convert_sqa_to_llava.py", "--base-dir", tmp_path, "--split", "test", "--prompt-format", "X-A"
    )
    assert done.returncode == 2
    assert "unknown prompt format 'X-A'" in done.stderr
