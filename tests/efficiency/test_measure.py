"""The measuring command on a miniature: what it counts is true; how long things take is nobody's business here."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from llava.compress import get
from llava.compress.trace import Trace
from llava.efficiency import measure, naive_profile
from llava.efficiency.ideal import ideal, phi, work
from llava.efficiency.measure import HF, Subject, Theirs, subject_of
from llava.efficiency.ops import Fusion, total
from llava.efficiency.request import Request
from llava.efficiency.shapes import MODELS
from tests.conftest import Command, picture

Run = Callable[..., tuple[int, str, str]]
PARTS = {"preprocessing", "tower", "selection", "projector", "prefill", "decode", "other", "first token", "request"}


@pytest.fixture
def run(checkpoint: Callable[..., Path], command: Command) -> Run:
    """Run the command on a miniature; returns exit code, stdout and stderr."""

    def measured(*words: object, model: object = None) -> tuple[int, str, str]:
        given = ["--model", model or checkpoint(), "--device", "cpu", "--dtype", "float32", "--image-size", "160x120"]
        return command(measure.main, *given, "--text-tokens", 9, "--repeats", 2, *words)

    return measured


@pytest.fixture
def subject(checkpoint: Callable[..., Path]) -> Subject:
    words = ["--model", str(checkpoint()), "--device", "cpu", "--dtype", "float32", "--image-size", "160x120"]
    return subject_of(measure.build_parser().parse_args([*words, "--text-tokens", "9", "--output-tokens", "4"]))


def rows_of(out: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(out)["rows"]
    return found


def test_every_part_is_there_and_they_add_up(run: Run) -> None:
    code, out, _ = run("--ratios", 1, 0.5, 0.25, "--against", "hf", "--output-tokens", 3, "--json")
    assert code == 0
    rows = rows_of(out)
    ratios = ["none()", "globalcom2(retention_ratio=0.5)", "globalcom2(retention_ratio=0.25)"]
    assert [row["method"] for row in rows] == [*ratios, HF]
    for row in rows[:3]:
        assert row["seconds"].keys() == PARTS
        for part, spread in row["seconds"].items():
            assert spread["low"] <= spread["median"] <= spread["high"], part
            assert part == "other" or spread["median"] > 0
    assert rows[3]["seconds"].keys() == PARTS - {"tower", "selection", "projector"}
    assert rows[0]["tokens"] == rows[3]["tokens"] > rows[1]["tokens"] > rows[2]["tokens"]
    assert [row["first token"].keys() >= {"speedup", "limit", "phi"} for row in rows] == [False, True, True, False]
    assert rows[0]["request"] == {"speedup": 1.0}
    for row in rows[1:3]:
        assert (
            row["request"]["speedup"] == rows[0]["seconds"]["request"]["median"] / row["seconds"]["request"]["median"]
        )
        assert row["request"]["phi"] == phi(row["request"]["speedup"], row["request"]["limit"])
    # Keys and values of 3 layers, 2 heads of 16, in float32; the last token produced is never cached.
    assert [row["kv_bytes"] for row in rows] == [2 * 3 * 32 * 4 * (row["tokens"] + 2) for row in rows[:3]] + [None]
    assert rows[0]["peak_bytes"] >= rows[1]["peak_bytes"] >= rows[2]["peak_bytes"] > 0  # the tower may need most


def test_a_run_is_the_sum_of_its_parts(subject: Subject) -> None:
    seconds, trace, _ = subject.ask(get("globalcom2", retention_ratio=0.25), batch=2)
    parts = {part: taken for part, taken in seconds.items() if part not in ("first token", "request")}
    assert sum(parts.values()) == pytest.approx(seconds["request"])
    assert seconds["first token"] == pytest.approx(seconds["request"] - seconds["decode"])
    assert len(trace.images) == 2


def test_both_models_are_asked_the_same(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same picture and words into both, and the same answer out."""
    answers: list[torch.Tensor] = []

    def keep(model: Any) -> None:
        generate = model.generate

        def kept(*args: Any, **kwargs: Any) -> Any:
            out = generate(*args, **kwargs)
            answers.append(out if isinstance(out, torch.Tensor) else out.sequences)
            return out

        monkeypatch.setattr(model, "generate", kept)

    keep(subject.model)
    _, trace, _ = subject.ask(get("none"), 1)
    theirs = Theirs(subject=subject, tokens=trace.sequence_lengths[0] - subject.text)
    keep(theirs.model)
    with torch.no_grad():
        theirs.ask(1)
    ours, other = answers
    assert torch.equal(ours, other[:, -4:])
    assert ours.shape == (1, 4)


@pytest.mark.parametrize(("batch", "more"), [(1, 1), (3, 1), (2, 4)])
def test_the_ideal_request_scales_every_stage_by_its_work(subject: Subject, batch: int, more: int) -> None:
    def request(spec: str, batch: int) -> Request:
        trace: Trace = subject.ask(get(spec), 1)[1]
        return measure._request(subject, trace, batch)

    before, after = request("none", batch), request("globalcom2(retention_ratio=0.25)", batch * more)
    base = {"preprocessing": 1.0, "tower": 8.0, "selection": 0.5, "projector": 2.0, "prefill": 40.0, "decode": 6.0}
    found = ideal(base | {"other": 3.0}, before, after)
    kept = {name: sum(op.flops * op.times for op in ops) for name, ops in after.stages(Fusion.ATTENTION).items()}
    full = {name: sum(op.flops * op.times for op in ops) for name, ops in before.stages(Fusion.ATTENTION).items()}
    assert (found["preprocessing"], found["other"], found["tower"]) == (more, 3 * more, 8 * more)
    assert found["projector"] == pytest.approx(2 * more * after.kept / before.kept)
    assert found["prefill"] == pytest.approx(40 * kept["prefill"] / full["prefill"])
    assert found["selection"] == pytest.approx(8 * kept["selection"] / full["tower"])
    moved = [total(each.stages(Fusion.ATTENTION)["decode"]).bytes for each in (after, before)]
    assert found["decode"] == pytest.approx(6 * moved[0] / moved[1])
    parts = ("preprocessing", "other", "tower", "projector", "prefill", "selection")
    assert found["first token"] == pytest.approx(sum(found[part] for part in parts))
    assert found["request"] == pytest.approx(found["first token"] + found["decode"])
    assert more * work(before)["tower"] == work(after)["tower"]


def test_the_share_of_what_can_be_saved() -> None:
    assert phi(2.0, 4.0) == pytest.approx(0.5 / 0.75)
    assert phi(4.0, 4.0) == 1
    assert phi(1.0, 4.0) == 0
    assert phi(0.5, 2.0) == -2
    assert phi(2.0, 1.0) is None
    # The paper's own (7B, R = 10 %): 2.69 of 5.14.
    assert phi(2.69, 5.14) == pytest.approx(0.78, abs=0.005)


def test_methods_that_drop_inside_are_measured_too(run: Run) -> None:
    code, out, _ = run("--method", "fastv(layer=1, budget='after')", "--ratios", 0.25, "--json")
    assert code == 0
    full, dropped = rows_of(out)
    assert full["tokens"] == dropped["tokens"] == dropped["tokens_per_layer"][0] > dropped["tokens_per_layer"][1]
    assert dropped["kv_bytes"] < full["kv_bytes"]


def test_options_reach_the_model(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    ask = Subject.ask

    def spy(self: Subject, *args: Any) -> Any:
        seen.append((self.options, self.output, self.text, args[1]))
        return ask(self, *args)

    monkeypatch.setattr(Subject, "ask", spy)
    code, out, _ = run("--static-cache", "--output-tokens", 1, "--batch-size", 2, "--ratios", 0.5)
    assert code == 0
    assert set(map(str, seen)) == {str(({"cache_implementation": "static"}, 1, 9, 2))}
    head, _, *lines = out.splitlines()[2:]
    steps = [cell.strip() for cell in head.split("|")].index("per step")
    assert [line.split("|")[steps].strip() for line in lines] == ["–", "–"]  # the first token alone is no step


def test_a_static_cache_has_the_size_of_its_own_request(run: Run) -> None:
    """And not that of the longest one before, which transformers remembers."""
    code, out, _ = run("--static-cache", "--ratios", 0.1, "--json")
    full, compressed = rows_of(out)
    assert code == 0
    assert compressed["kv_bytes"] < 0.5 * full["kv_bytes"]


def test_transformers_model_has_a_batch_of_its_own(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it needs more memory it answers fewer at once, and is compared request by request."""
    monkeypatch.setattr(measure, "_most", lambda subject, method: 4)
    monkeypatch.setattr(measure, "_room", lambda ask, most, *name: most // 2)
    code, out, _ = run("--batch-size", "max", "--against", "hf", "--ratios", 0.5, "--json")
    assert code == 0
    rows = rows_of(out)
    assert [row["batch"] for row in rows] == [4, 4, 2]
    took = [row["seconds"]["request"]["median"] for row in rows]
    assert rows[2]["request"]["speedup"] == pytest.approx(took[0] / took[2] / 2)


def test_the_text_says_what_the_data_say(run: Run) -> None:
    code, out, _ = run("--ratios", 0.5, "--against", "hf")
    assert code == 0
    said, empty, head, rule, *lines = out.splitlines()
    assert "float32" in said
    assert f"torch {torch.__version__}" in said
    assert not empty
    assert len({line.count("|") for line in (head, rule, *lines)}) == 1
    assert [line.split("|")[1].strip() for line in lines] == ["none()", "globalcom2(0.5)", HF]


# --- the naive arrangement beside ours ---


def test_arrangements_are_compared_stage_by_stage(run: Run) -> None:
    code, out, _ = run("--profile-naive", "--ratios", 0.5, 0.25, "--json")
    assert code == 0
    rows = {row.pop("stage"): row for row in rows_of(out)}
    stages = ["preprocessing", "tower"]
    stages += [f"{name}, R = {ratio}" for ratio in (0.5, 0.25) for name in ("selection", "projector")]
    assert list(rows) == stages
    for name, row in rows.items():
        assert list(row) == ["naive", "ours", *["ours, released"] * name.startswith("selection")]
    for ratio in ("0.5", "0.25"):
        naive, ours = (rows[f"selection, R = {ratio}"][name] for name in ("naive", "ours"))
        assert ours["reads"] == 0 < naive["reads"]
        assert ours["launches"] < naive["launches"]
        assert ours["peak_bytes"] < naive["peak_bytes"]


def test_stages_can_be_chosen(run: Run) -> None:
    """Without the tower there is noise to select from, of as many tokens."""
    stages = ["projector", "selection"]
    code, out, _ = run("--profile-naive", "--ratios", 0.5, "--stages", *stages, "--json")
    assert code == 0
    assert [row["stage"] for row in rows_of(out)] == ["selection, R = 0.5", "projector, R = 0.5"]
    code, _, err = run("--profile-naive", "--stages", "prefill")
    assert (code, "prefill" in err) == (2, True)


def test_arrangements_that_differ_are_not_timed(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    compress = naive_profile.naive.compress

    def slip(*args: Any) -> Any:
        sequence, kept = compress(*args)
        return sequence, [kept[0], kept[1][1:], *kept[2:]]

    monkeypatch.setattr(naive_profile.naive, "compress", slip)
    with pytest.raises(RuntimeError, match="kept patches"):
        run("--profile-naive", "--ratios", 0.5)


def test_a_model_of_single_views_has_no_naive_arrangement(run: Run, checkpoint: Callable[..., Path]) -> None:
    code, out, err = run("--profile-naive", model=checkpoint("v1.5"))
    assert (code, out) == (2, "")
    assert "into crops" in err


# --- models ---


def test_a_name_stands_for_its_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[Any] = []

    class Built(Exception):
        pass

    def build(shape: Any, **given: Any) -> Any:
        built.append((shape, given))
        raise Built

    monkeypatch.setattr(measure, "random_model", build)
    words = ["--model", "llava-next-13b", "--layers", "4", "--device", "cpu", "--dtype", "float32"]
    with pytest.raises(Built):
        subject_of(measure.build_parser().parse_args(words))
    shape, given = built[0]
    known = MODELS["llava-next-13b"]
    assert shape.language == replace(known.language, layers=4, element_bytes=4)
    assert shape.tower == replace(known.tower, element_bytes=4)
    assert given == {"dtype": torch.float32, "device": torch.device("cpu")}


def test_a_checkpoint_is_measured_as_it_is(subject: Subject) -> None:
    assert subject.shape.language.layers == len(subject.model.get_model().layers) == 3
    assert subject.shape.language.element_bytes == 4
    assert subject.image.size == picture(160, 120).size


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--model", "nosuch"], "nosuch"),
        (["--layers", "2"], "--layers 2 is for"),
        (["--batch-size", "max"], "CUDA device"),
        (["--batch-size", "0"], "at least 1"),
        (["--ratios", "1.5"], "(0, 1], got 1.5"),
        (["--method", "nosuch"], "nosuch"),
        (["--method", "fastv", "--ratios", "0.1"], "fastv"),
        (["--dtype", "float8"], "float8"),
        (["--device", "cuda"], "no CUDA device"),
        (["--device", "meta"], "cannot be timed"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(run: Run, words: list[str], said: str) -> None:
    if said == "no CUDA device" and torch.cuda.is_available():
        pytest.skip("there is one")
    code, out, err = run(*words)
    assert (code, out) == (2, "")
    assert said in err.splitlines()[-1]


def test_the_largest_batch_needs_one_that_fits(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Subject, "device", torch.device("cuda"))
    rooms = iter([0, 50])

    def ask(room: int) -> Callable[..., None]:
        def answer(self: Subject, method: Any, batch: int) -> None:
            if batch > room:
                raise torch.OutOfMemoryError

        return answer

    monkeypatch.setattr(Subject, "ask", ask(next(rooms)))
    with pytest.raises(measure.InputError, match="not one request"):
        measure._most(subject, get("none"))
    monkeypatch.setattr(Subject, "ask", ask(next(rooms)))
    assert measure._most(subject, get("none")) == 45  # a tenth is left free
