"""The benchmarks' scripts: short, complete, true to the programs they call, and run from end to end."""

import argparse
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from llava.eval.benchmarks import available, get
from llava.eval.benchmarks.base import read_jsonl
from llava.model import llava_arch
from llava.model.llava_arch import retention_ratio
from tests.eval.data import write_benchmark

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "scripts" / "v1_5" / "eval"
NAMES = {
    "vqav2": "vqav2", "gqa": "gqa", "vizwiz": "vizwiz", "sqa": "scienceqa", "textvqa": "textvqa", "pope": "pope",
    "mme": "mme", "mmbench": "mmbench", "mmbench_cn": "mmbench_cn", "mmvet": "mmvet",
}  # fmt: skip
OTHERS = {"check_data", "pocket", "run_grid"}
LINE_101 = f"globalcom2-{retention_ratio}"


def bash(script: str, *words: Any, **variables: Any) -> subprocess.CompletedProcess[str]:
    """Run a script with these variables alone."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "LD_LIBRARY_PATH") if name in os.environ}
    settings = {"PYTHON": sys.executable, "OMP_NUM_THREADS": 1, "HF_HUB_OFFLINE": 1} | variables
    return subprocess.run(
        ["bash", SCRIPTS / f"{script}.sh", *map(str, words)],
        env=kept | {name: str(value) for name, value in settings.items()},
        capture_output=True,
        text=True,
    )


def dry(script: str, *words: Any, **variables: Any) -> list[list[str]]:
    """Return the commands a script would run, without the interpreter."""
    done = bash(script, *words, DRY_RUN=1, **variables)
    assert (done.returncode, done.stderr) == (0, "")
    commands = [shlex.split(line) for line in done.stdout.splitlines()]
    assert {command.pop(0) for command in commands} == {sys.executable}
    return commands


@cache
def made(name: str, root: Path) -> Path:
    write_benchmark(name, root)
    return root


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """What `playground/data/eval` is to the real scripts, with one miniature benchmark more at every call."""
    root = tmp_path_factory.mktemp("data")
    return lambda script: made(NAMES[script], root)


def test_one_script_for_each_benchmark_and_back() -> None:
    found = {file.stem for file in SCRIPTS.glob("*.sh") if not file.stem.startswith("_")}
    assert found == NAMES.keys() | OTHERS
    assert set(NAMES.values()) <= set(available())


@pytest.mark.parametrize("script", NAMES)
def test_scripts_are_short_and_parse(script: str) -> None:
    file = SCRIPTS / f"{script}.sh"
    subprocess.run(["bash", "-n", file], check=True)
    assert len(file.read_text().splitlines()) <= 25
    assert file.read_text().startswith("#!/usr/bin/env bash\n# ")


def test_what_scripts_share_is_strict() -> None:
    assert "\nset -euo pipefail\n" in (SCRIPTS / "_common.sh").read_text()
    assert all('/_common.sh"' in (SCRIPTS / f"{name}.sh").read_text() for name in (*NAMES, *OTHERS))


@pytest.mark.parametrize("script", NAMES)
def test_commands_are_what_the_programs_take(script: str, parsed: Callable[[list[str]], argparse.Namespace]) -> None:
    answer, score = map(parsed, dry(script))
    benchmark = get(NAMES[script])
    folder = Path("playground/data/eval") / benchmark.folder
    assert answer.benchmark == score.benchmark == benchmark.name
    assert answer.model_path == "./liuhaotian/llava-next-7b"
    assert (answer.method, answer.retention_ratio, answer.profile, answer.limit) == ("globalcom2", None, None, None)
    assert (answer.temperature, answer.conv_mode, answer.num_processes) == (0, None, 1)
    assert Path(answer.question_file) == folder / benchmark.question_file
    assert Path(answer.image_folder) == folder / benchmark.image_folder
    assert answer.max_new_tokens == benchmark.max_new_tokens
    assert answer.single_pred_prompt == (NAMES[script] in ("scienceqa", "mmbench", "mmbench_cn"))
    assert answer.lang == ("cn" if script == "mmbench_cn" else None)
    assert score.data == folder
    assert Path(answer.answers_file) == score.answers_file == folder / f"answers/llava-next-7b/{LINE_101}.jsonl"
    # Where upstream makes a file for somebody else, so do we.
    assert (score.export is None) == (script in ("sqa", "textvqa", "pope"))


@pytest.mark.parametrize("script", NAMES)
def test_variables(script: str, parsed: Callable[[list[str]], argparse.Namespace]) -> None:
    variables = {"CKPT": "my models/v 1", "METHOD": "globalcom2(alpha=0.3)", "RATIO": 0.5, "PROFILE": "corrected"}
    more = {"LIMIT": 8, "OUT": "/o u t", "DATA": "/d a t a", "BATCH": 3, "NUM_PROCESSES": 2}
    launch, scoring = dry(script, "--num-beams", 2, **variables, **more)
    assert launch[:2] == ["-m", "llava.eval.launch"]
    answer, score = parsed(launch), parsed(scoring)
    assert answer.model_path == "my models/v 1"
    assert (answer.method, answer.retention_ratio, answer.profile) == ("globalcom2(alpha=0.3)", "0.5", "corrected")
    assert (answer.limit, answer.batch_size, answer.num_processes, answer.num_beams) == (8, 3, 2, 2)
    folder = get(NAMES[script]).folder
    assert Path(answer.question_file).is_relative_to(f"/d a t a/{folder}")
    assert score.data == Path("/d a t a") / folder
    file = score.answers_file
    assert str(file) == answer.answers_file
    assert file.parent == Path(f"/o u t/{folder}/answers/v 1")
    assert all(word in file.name for word in ("globalcom2", "alpha=0.3", "0.5", "corrected", "8"))
    assert score.export is None  # a part is no submission


@pytest.mark.parametrize(
    ("variables", "processes"),
    [
        ({}, 1),
        ({"CUDA_VISIBLE_DEVICES": ""}, 1),
        ({"CUDA_VISIBLE_DEVICES": "3"}, 1),
        ({"CUDA_VISIBLE_DEVICES": "0,1,5"}, 3),
        ({"CUDA_VISIBLE_DEVICES": "0,1", "NUM_PROCESSES": 1}, 1),
    ],
)
def test_one_process_for_each_device(variables: dict[str, Any], processes: int) -> None:
    command = dry("textvqa", **variables)[0]
    assert command[command.index("--num-processes") + 1] == str(processes)
    assert ("llava.eval.launch" in command) == (processes > 1)


def test_runs_that_differ_have_files_that_differ() -> None:
    settings: list[dict[str, Any]] = [
        {}, {"RATIO": 0.5}, {"PROFILE": "paper"}, {"METHOD": "uniform"}, {"METHOD": "globalcom2(temperature=5)"},
        {"METHOD": "none"}, {"OCR": 0}, {"CKPT": "other"}, {"METHOD": "uniform", "PROFILE": "paper"},
    ]  # fmt: skip
    commands = [dry("textvqa", **setting)[0] for setting in settings]
    files = [command[command.index("--answers-file") + 1] for command in commands]
    assert len(set(files)) == len(files)
    assert files[0].endswith(f"/{LINE_101}.jsonl")
    # The ratio in force, wherever it comes from; without compression there is one.
    assert dry("textvqa", LLAVA_RETENTION_RATIO=0.5)[1] == dry("textvqa", RATIO=0.5)[1]
    assert dry("textvqa", METHOD="none")[1] == dry("textvqa", METHOD="none", RATIO=0.5)[1]


@pytest.mark.parametrize(
    ("above", "line", "ratio"), [("", "0.1", "0.1"), ("import json\n", "0.5  # half", "0.5"), ("# R\n", "1/4", "1_4")]
)
def test_the_edited_ratio_names_the_file_wherever_its_line_has_moved(
    tmp_path: Path, above: str, line: str, ratio: str
) -> None:
    shutil.copytree(SCRIPTS, tmp_path / "scripts/v1_5/eval")
    source = Path(llava_arch.__file__).read_text(encoding="utf-8").replace(f"= {retention_ratio}\n", f"= {line}\n")
    (tmp_path / "llava/model").mkdir(parents=True)
    (tmp_path / "llava/model/llava_arch.py").write_text(above + source, encoding="utf-8")
    script = tmp_path / "scripts/v1_5/eval/textvqa.sh"
    settings = {"PATH": os.environ["PATH"], "PYTHON": sys.executable, "DRY_RUN": "1"}
    done = subprocess.run(["bash", script], env=settings, capture_output=True, text=True, check=True)
    assert f"/globalcom2-{ratio}.jsonl " in done.stdout


@pytest.mark.parametrize(("ocr", "there"), [(0, True), (1, False)])
def test_textvqa_without_ocr(ocr: int, there: bool) -> None:
    assert ("--no-ocr" in dry("textvqa", OCR=ocr)[0]) == there


@pytest.mark.parametrize("script", ["pope", "mmbench"])
@pytest.mark.parametrize("processes", [1, 2])
def test_a_missing_checkpoint(script: str, processes: int, data: Callable[[str], Path]) -> None:
    done = bash(script, DATA=data(script), CKPT="./no/such", NUM_PROCESSES=processes)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"error: no checkpoint at \./no/such; put .+, or set CKPT .+\n", done.stderr)


@pytest.mark.parametrize("script", NAMES)
def test_missing_data(script: str, tmp_path: Path, checkpoint: Callable[..., Path]) -> None:
    done = bash(script, DATA=tmp_path, CKPT=checkpoint(), NUM_PROCESSES=2)
    assert (done.returncode, done.stdout) == (2, "")
    benchmark = get(NAMES[script])
    assert done.stderr.startswith(f"error: {benchmark.name} lacks {tmp_path / benchmark.folder}/")
    assert done.stderr.endswith(f"; get it from {benchmark.source}\n")
    assert not list(tmp_path.iterdir())


def test_missing_labels_are_said_before_anything_runs(tmp_path: Path, checkpoint: Callable[..., Path]) -> None:
    (write_benchmark("textvqa", tmp_path) / "TextVQA_0.5.1_val.json").unlink()
    done = bash("textvqa", DATA=tmp_path, CKPT=checkpoint())
    assert done.returncode == 2
    assert "lacks" in done.stderr
    assert "TextVQA_0.5.1_val.json" in done.stderr


def test_without_the_packages(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexit 1\n")
    python.chmod(0o755)
    done = bash("pope", PYTHON=python)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1


SLEEPER = """#!/bin/sh
case "$*" in *llava.eval.answer*) exec {python} -c '
import time
from pathlib import Path
from llava.utils import run_command
def main():
    Path("{mark}").touch()
    try:
        time.sleep(100)
    except KeyboardInterrupt as stop:
        stop.add_note("3 of 9 answers kept")
        raise
run_command(main)';; esac
"""


@pytest.mark.parametrize(
    ("script", "number", "all_of_them", "code"),
    [
        ("run_grid", signal.SIGINT, True, 130),
        ("run_grid", signal.SIGTERM, False, 143),
        ("pope", signal.SIGTERM, 1, 143),
    ],
)
def test_an_interrupted_script_ends_with_its_command(
    tmp_path: Path, script: str, number: int, all_of_them: bool, code: int
) -> None:
    """Whether everybody hears of it, as in a terminal, or the script alone."""
    python, mark = tmp_path / "python", tmp_path / "started"
    python.write_text(SLEEPER.format(python=sys.executable, mark=mark))
    python.chmod(0o755)
    settings = {"PATH": os.environ["PATH"], "PYTHON": str(python), "CKPT": "hub/id", "OUT": str(tmp_path / "out")}
    process = subprocess.Popen(
        ["bash", SCRIPTS / f"{script}.sh"],
        env=settings,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: [signal.signal(each, signal.SIG_DFL) for each in (signal.SIGINT, signal.SIGTERM)],
    )
    while not mark.exists():
        assert process.poll() is None, process.communicate()
    (os.killpg if all_of_them else os.kill)(process.pid, number)
    out, err = process.communicate(timeout=60)  # returns once nobody holds the pipes any more
    assert (process.returncode, out, err) == (code, "", "interrupted: 3 of 9 answers kept\n")


def run_to_the_end(script: str, data: Path, out: Path, model: Path, **variables: Any) -> None:
    done = bash(script, "--max-new-tokens", 4, DATA=data, OUT=out, CKPT=model, LIMIT=8, **variables)
    assert done.returncode == 0, done.stderr
    name = NAMES[script]
    scored = "server" if name == "mmvet" else "local"
    (n,) = re.findall(rf"^{name}: {scored} score, n = (\d+)$", done.stdout, re.MULTILINE)
    assert 0 < int(n) <= 8
    if scored == "local":
        assert re.search(r"^\w+ +\d+\.\d\d  95% interval \[", done.stdout, re.MULTILINE)
    (answers,) = (out / get(name).folder / "answers" / model.name).glob("*.jsonl")
    assert len(read_jsonl(answers)) == 8


@pytest.mark.parametrize(
    "script", [s if s in ("pope", "textvqa") else pytest.param(s, marks=pytest.mark.slow) for s in NAMES]
)
def test_from_questions_to_a_score(
    script: str, data: Callable[[str], Path], tmp_path: Path, checkpoint: Callable[..., Path]
) -> None:
    run_to_the_end(script, data(script), tmp_path, checkpoint())


@pytest.mark.slow
def test_two_processes(data: Callable[[str], Path], tmp_path: Path, checkpoint: Callable[..., Path]) -> None:
    run_to_the_end("gqa", data("gqa"), tmp_path, checkpoint(), CUDA_VISIBLE_DEVICES="0,1", RATIO=0.5)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_unreadable_pictures_end_in_a_score_and_exit_code_3(
    processes: int, tmp_path: Path, checkpoint: Callable[..., Path]
) -> None:
    """VizWiz, whose submission must be whole: that it cannot be made does not hide the score nor the code."""
    picture = next((write_benchmark("vizwiz", tmp_path) / "test").glob("*01.jpg"))
    picture.write_text("no picture")
    settings = {"DATA": tmp_path, "OUT": tmp_path, "CKPT": checkpoint(), "NUM_PROCESSES": processes}
    for _ in range(2):  # finished or not
        done = bash("vizwiz", "--max-new-tokens", 4, **settings)
        assert done.returncode == 3, done.stderr
        assert "vizwiz: local score, n = 9" in done.stdout
        assert done.stderr.count("could not ask: ") == 1
        (said,) = (line for line in done.stderr.splitlines() if line.startswith(f"could not ask: {picture.name}"))
        assert said.endswith("(3 questions: 3, 4, 5)")
        assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("script", ["vqav2", "gqa", "vizwiz", "mme", "mmbench", "mmbench_cn", "mmvet"])
def test_whole_runs_are_exported(
    script: str, data: Callable[[str], Path], tmp_path: Path, checkpoint: Callable[..., Path]
) -> None:
    if script.startswith("mmbench"):
        pytest.importorskip("openpyxl")
    done = bash(script, "--max-new-tokens", 4, DATA=data(script), OUT=tmp_path, CKPT=checkpoint())
    assert done.returncode == 0, done.stderr
    written = [Path(file) for file in re.findall(r"^wrote (.+)$", done.stdout, re.MULTILINE)]
    assert written
    folder = tmp_path / get(NAMES[script]).folder / "answers_upload" / "llava-next-7b" / LINE_101
    assert {file.parent for file in written} == {folder}


def test_check_data_when_something_is_there(tmp_path: Path) -> None:
    write_benchmark("mmbench_cn", tmp_path)
    write_benchmark("mmvet", tmp_path)
    done = bash("check_data", DATA=tmp_path)
    assert (done.returncode, done.stderr) == (2, "")
    assert "  SHORT      llava-mm-vet.jsonl: 218 questions; 12 found\n" in done.stdout
    assert done.stdout.endswith(f"1 of {len(available())} complete\n")


def test_check_data_when_nothing_is_there(tmp_path: Path) -> None:
    done = bash("check_data", DATA=tmp_path)
    assert done.returncode == 2
    for benchmark in map(get, NAMES.values()):
        assert benchmark.source in done.stdout
        for name, content in benchmark.contents.items():
            assert f"MISSING    {name}: {content}" in done.stdout
    assert done.stdout.endswith(f"0 of {len(available())} complete\n")


def test_gqas_labels_may_be_in_the_folder_of_its_archive(tmp_path: Path) -> None:
    data = write_benchmark("gqa", tmp_path)
    file = data / get("gqa").labels[0]
    (file.parent / "questions1.2").mkdir()
    file.rename(file.parent / "questions1.2" / file.name)
    assert get("gqa").lacking(data) == []


@pytest.mark.parametrize("name", NAMES.values())
def test_data_folders_say_what_belongs_there(name: str) -> None:
    benchmark = get(name)
    page = (ROOT / "playground" / "data" / "eval" / benchmark.folder / "README.md").read_text()
    for file in (*benchmark.contents, *benchmark.optional):
        assert f"| `{file}" in page
    (script,) = (script for script, of in NAMES.items() if of == name)
    assert f"bash scripts/v1_5/eval/{script}.sh\n" in page
    needed = {benchmark.question_file, benchmark.image_folder, *benchmark.labels} - {""}
    assert needed == {*benchmark.contents, *benchmark.optional} & needed
