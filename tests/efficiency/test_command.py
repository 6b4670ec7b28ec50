"""`python -m llava.efficiency`: its output read back, and bad input in one line."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from llava.efficiency import __main__ as efficiency
from llava.efficiency import report
from llava.efficiency.paper import figures
from tests.conftest import Command
from tests.efficiency.test_paper import PRINTED

Run = Any


@pytest.fixture
def run(command: Command) -> Run:
    def go(*words: str) -> str:
        code, out, _ = command(efficiency.main, *words)
        assert code == 0
        return out

    return go


def test_paper_tables_as_text(run: Run) -> None:
    text = run("--paper-tables")
    rows = re.findall(r"^ +(\d+)% +(\d+) +(\S+) +(\S+) +(=|!!!) +\|((?: +[\d.]+)+)$", text, re.MULTILINE)
    assert len(rows) == 40
    columns = [PRINTED[table][column].split() for table in PRINTED for column in PRINTED[table]]
    assert [row[2] for row in rows] == [digit for column in columns for digit in column]
    beside = [[float(number) for number in row[5].split()] for row in rows]
    assert beside == [pytest.approx([*f.corrected.values()], abs=0.00051) for f in figures()]
    assert all(printed == formula and mark == "=" for _, _, printed, formula, mark, _ in rows)
    assert all(int(tokens) * 100 == 2880 * int(ratio) for ratio, tokens, *_ in rows)
    assert "40 of 40 printed figures come out of their formulas, digit for digit." in text
    assert text.count("Prefill Time (ms) = Σ over operators of max(OPs ÷ 312e12") == 2
    assert max(map(len, text.splitlines())) <= 120


def test_paper_tables_as_json(run: Run) -> None:
    data = json.loads(run("--paper-tables", "--json"))
    assert (data["reproduced"], data["printed"]) == (40, 40)
    assert len(data["figures"]) == 40
    assert all(figure["agrees"] and figure["printed"] == figure["reproduced"] for figure in data["figures"])
    assert data["formulas"].keys() == {"Table V", "Table VI"}
    assert len(data["speedups"]) == 8


def test_paper_tables_that_do_not_come_out_fail(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "paper_data", lambda: {"reproduced": 39, "printed": 40})
    assert command(efficiency.main, "--paper-tables", "--json")[0] == 1


def test_paper_tables_need_no_torch() -> None:
    code = (
        "import sys, runpy\nsys.argv = ['x', '--paper-tables']\n"
        "runpy.run_module('llava.efficiency', run_name='__main__')\nprint(sorted(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    modules = set(re.findall(r"'([^']+)'", done.stdout.splitlines()[-1]))
    assert "llava.efficiency.paper" in modules
    assert not modules & {"torch", "transformers", "numpy", "PIL", "matplotlib", "huggingface_hub"}


ARGUMENTS = ("--method", "globalcom2", "--retention-ratio", "0.25", "--device", "h200", "--image-size", "640x480")


def test_analysis_as_json(run: Run) -> None:
    data = json.loads(run(*ARGUMENTS, "--json", "--text-tokens", "64", "--output-tokens", "3"))
    base, after = data["uncompressed"], data["compressed"]
    assert (base["visual_tokens"], after["visual_tokens"], after["newlines"]) == (2340, 612, 36)
    assert (data["planned"], after["patches"], data["requested_ratio"]) == (576, 576, 0.25)
    assert after["tokens_per_layer"] == [676] * 32
    assert after["kv_bytes"] == 676 * 524288
    assert after["mean_visual_tokens_per_layer"] == 612
    assert after["kv_entries_per_layer"] == 676
    assert base["stages"].keys() == {"tower", "selection", "projector", "prefill", "decode"}
    for side in (base, after):
        assert all(stage["matmul_flops"] == 2 * stage["macs"] for stage in side["stages"].values())
        moved = side["bytes_moved"]
        assert moved["unfused"]["prefill"] > moved["flash"]["prefill"] > moved["fused"]["prefill"]
        assert side["footprint"]["flash"]["weights"] == side["footprint"]["unfused"]["weights"]
    assert base["stages"]["tower"] == after["stages"]["tower"]
    assert after["stages"]["projector"]["macs"] * 4 == base["stages"]["projector"]["macs"]
    (device,) = data["devices"].values()
    for fusion in ("unfused", "flash", "fused"):
        found = device[fusion]
        limit = found["speedup_limit"]
        assert limit["request"] == pytest.approx(found["uncompressed"]["request"] / found["compressed"]["request"])
        parts = found["compressed"]
        first = sum(parts[stage] for stage in ("tower", "selection", "projector", "prefill"))
        assert parts["first token"] == pytest.approx(first)
        assert parts["request"] == pytest.approx(first + parts["decode"])
    assert device["largest_batch"]["compressed"] > device["largest_batch"]["uncompressed"]


def test_analysis_as_text(run: Run) -> None:
    text = run(*ARGUMENTS)
    blocks = text.split("\n\n")
    assert " ".join(blocks[0].split()).startswith(
        "llava-next-7b, globalcom2(retention_ratio=0.25), ratio 0.25; image of 640x480, 5 views (2x2 crops);"
    )
    line = {match[1].strip(): match[2].split() for match in re.finditer(r"^(.{34})(.+)$", text, re.MULTILINE)}
    assert line["visual tokens"] == ["2340", "612", "26.2%"]
    assert line["KV cache (MiB)"] == ["1200.00", "336.00", "28.0%"]
    flops = [float(line[stage][1]) for stage in ("tower", "selection", "projector", "prefill", "decode")]
    assert sum(flops) == pytest.approx(float(line["all"][1]), abs=5e-4)
    assert float(line["prefill, fused"][0]) > float(line["prefill, fused"][1])
    assert [block.split()[0] for block in blocks if "least time" in block] == ["H200:"]


def test_all_devices_are_the_default(run: Run) -> None:
    text = run("--image-size", "336X336", "--model", "llava-1.5-7b")
    assert re.findall(r"^(\S+): least time", text, re.MULTILINE) == [
        "A100-40G",
        "A100-80G",
        "A800-80G",
        "H100",
        "H200",
        "L40S",
        "RTX4090",
    ]
    assert max(map(len, text.splitlines())) <= 120


def test_a_plan_that_is_a_range_is_told(run: Run) -> None:
    text = run("--method", "globalcom2(profile='released')", "--retention-ratio", "0.5", "--device", "H100")
    assert re.search(r"; \d+ to \d+ patches are planned, as what is kept depends", " ".join(text.split()))
    data = json.loads(run("--method", "globalcom2(profile='paper')", "--device", "H100", "--json"))
    low, high = data["planned"]
    assert low < data["compressed"]["patches"] < high


def test_the_ratio_of_the_environment_counts(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAVA_RETENTION_RATIO", "0.1")
    assert json.loads(run("--device", "H100", "--json"))["compressed"]["patches"] == 287  # 57 + 230


def test_a_picture_is_drawn(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    run("--device", "H200", "--plot", str(file))
    with Image.open(file) as image:
        assert min(image.size) > 300
        assert len(set(image.convert("RGB").get_flattened_data())) > 50


def test_without_matplotlib(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert_one_line(command, "drawing needs matplotlib", "--device", "H200", "--plot", str(tmp_path / "a.png"))


def assert_one_line(command: Command, message: str, *words: str) -> None:
    code, out, err = command(efficiency.main, *words)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--model", "llava-next-70b"), "unknown model 'llava-next-70b'"),
        (("--model", "no/such/folder"), "there is no folder 'no/such/folder'"),
        (("--method", "nosuch"), "unknown method 'nosuch'"),
        (("--retention-ratio", "1.5"), "retention_ratio must be a number in (0, 1], got 1.5"),
        (("--method", "uniform(profile='paper')"), "uniform has no profile 'paper'"),
        (("--device", "TPU"), "unknown device 'TPU'"),
        (("--image-size", "640"), "must be WIDTHxHEIGHT in pixels, got '640'"),
        (("--image-size", "0x480"), "must be WIDTHxHEIGHT"),
        (("--text-tokens", "-1"), "must be at least 0, got -1"),
        (("--output-tokens", "0"), "must be at least 1, got 0"),
        (("--batch-size", "many"), "invalid integer value: 'many'"),
        (("--paper-tables", "--plot", "a.png"), "leave --paper-tables out"),
        (("--method", "thumbnail_only", "--plot", "a.png"), "there is nothing to draw"),
        (("--plot", "/dev/null/a.png", "--device", "H200"), "cannot write '/dev/null/a.png' (Not a directory)"),
        (("--plot", "/dev/full", "--device", "H200"), "cannot write '/dev/full' (No space left on device)"),
        (("--nosuch",), "unrecognized arguments"),
    ],
)
def test_bad_input_is_one_line(command: Command, words: tuple[str, ...], message: str) -> None:
    assert_one_line(command, message, *words)
