"""Training: a few steps learn, an interrupted run ends with the same bits, and what is written is a LLaVA-NeXT."""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from llava.compress import get
from llava.constants import InputError
from llava.mm_utils import process_images
from llava.model.builder import load_pretrained_model, load_tokenizer
from llava.model.miniature import state_shapes
from llava.output import DRAFT
from llava.pocket import talk, train
from llava.pocket.model import build_model, build_tower
from llava.pocket.questions import TASKS
from llava.pocket.scenes import CANVASES, TILE, WORDS
from llava.pocket.see import Seeing
from llava.pocket.talk import Talking
from llava.pocket.train import Config, Conversations, SceneViews, Stage, build_parser
from llava.pocket.write import ask_about
from tests.conftest import Command, file_limit
from tests.pocket.tiny import LANGUAGE, VISION, conversation, drawn, views_of

LONG = Stage(steps=20, scenes=2, rate=2e-3, warm_up=2)
BRIEF = Stage(steps=6, scenes=2, rate=2e-3, warm_up=2)
TWENTY = Config(vision=VISION, language=LANGUAGE, see=LONG, talk=LONG)
SIX = Config(vision=VISION, language=LANGUAGE, see=BRIEF, talk=BRIEF)


class Cut(Exception):
    """The power went."""


def run(config: Config, work: Path, *more: str) -> Path:
    """Train with the command's own parser."""
    words = ["--work", str(work), "--device", "cpu", "--workers", "0", "--log-every", "1", *more]
    return train.train(config, build_parser().parse_args(words))


@pytest.fixture(scope="module", autouse=True)
def _one_corpus() -> Iterator[None]:
    """Draw the tokenizer's scenes once; it is trained anew every time."""
    make, lines = train.corpus, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "corpus", lambda config: lines or lines.extend(make(config)) or lines)
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty steps a stage, by default in bfloat16; read-only for tests."""
    work = tmp_path_factory.mktemp("trained") / "work"
    assert run(TWENTY, work) == work / "checkpoint"
    return work


def state(file: Path) -> dict[str, Any]:
    return dict(torch.load(file, weights_only=True))


def tensors(value: Any, name: str = "") -> dict[str, Any]:
    """Whatever is in a nested state, by its way there."""
    if isinstance(value, dict | list | tuple):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {key: found for at, inner in items for key, found in tensors(inner, f"{name}/{at}").items()}
    return {name: value}


def assert_same_state(one: Path, other: Path) -> None:
    found, wanted = tensors(state(one)), tensors(state(other))
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        same = torch.equal(found[name], value) if isinstance(value, Tensor) else found[name] == value
        assert same, name


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def seeing(weights: dict[str, Tensor] | None = None) -> Seeing:
    torch.manual_seed(TWENTY.seed)
    model = Seeing(build_tower(*VISION))
    if weights:
        model.load_state_dict(weights)
    return model


def talking(work: Path, weights: dict[str, Tensor] | None = None) -> tuple[Talking, Any]:
    words = load_tokenizer(str(work / "frame"))
    torch.manual_seed(TWENTY.seed)
    model = Talking(build_model(VISION, LANGUAGE, len(words)))
    if weights:
        model.load_state_dict(weights)
    else:
        tower = {key.removeprefix("tower."): t for key, t in state(work / "see.pt")["model"].items() if "tower." in key}
        model.model.get_vision_tower().vision_tower.load_state_dict(tower)
    model.model.method = get("none")
    return model.eval(), words


def test_twenty_steps_of_seeing_lower_the_losses_on_new_scenes(trained: Path) -> None:
    batch = SceneViews("val", 6, range(1))[0]
    with torch.no_grad():
        before, after = seeing()(batch), seeing(state(trained / "see.pt")["model"])(batch)
    for name in ("kind_loss", "colour_loss", "character_loss"):
        assert after[name] < before[name] - 0.15, name


def test_twenty_steps_of_talking_lower_the_loss_on_new_scenes(trained: Path) -> None:
    before, words = talking(trained)
    after, _ = talking(trained, state(trained / "talk.pt")["model"])
    batch = conversation(drawn("val", 60)[:4], words, before.model.config)
    with torch.no_grad():
        assert after(batch)["loss"] < before(batch)["loss"] - 0.3
    frozen = [name for name in before.state_dict() if "vision_tower" in name]
    assert frozen
    assert all(torch.equal(before.state_dict()[name], after.state_dict()[name]) for name in frozen)


def test_the_log_has_a_row_a_step(trained: Path) -> None:
    for stage, losses in (("see", ["kind_loss", "caption_loss"]), ("talk", ["loss", "right"])):
        rows = [json.loads(line) for line in (trained / f"{stage}.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows] == list(range(1, 21))
        assert all(name in row for row in rows for name in losses)
        assert rows[-1][losses[0]] < rows[0][losses[0]]
        rates = [row["rate"] for row in rows]
        assert rates[:2] == [1e-3, 2e-3], "warming up"
        assert rates[1:] == sorted(rates[1:], reverse=True)
        assert 0 < rates[-1] < 0.05 * max(rates)


def cut_after(monkeypatch: pytest.MonkeyPatch, steps: int) -> Callable[[], None]:
    """Let so many steps be made from now on, then cut the power within the next; returns what undoes it."""
    made, step = count(), train.Optimizer.step

    def stepping(self: Any, number: int) -> float:
        if next(made) == steps:
            raise Cut
        return step(self, number)

    monkeypatch.setattr(train.Optimizer, "step", stepping)
    return lambda: monkeypatch.setattr(train.Optimizer, "step", step)


def cut_while_saving(monkeypatch: pytest.MonkeyPatch, number: int) -> Callable[[], None]:
    """Cut the power when half of the given save is on disk; returns what undoes it."""
    made, save = count(), train.write_whole

    def saving(file: Path, content: Any) -> None:
        if file.suffix == ".pt" and next(made) == number:
            file.with_name(file.name + DRAFT).write_bytes(content[: len(content) // 2])
            raise Cut
        save(file, content)

    monkeypatch.setattr(train, "write_whole", saving)
    return lambda: monkeypatch.setattr(train, "write_whole", save)


def interrupted(config: Config, work: Path, monkeypatch: pytest.MonkeyPatch, *more: str) -> Path:
    """Train with four cuts: before anything is kept, in stage 1, in stage 2, and in the middle of a save."""
    steps = config.see.steps
    cuts = [(cut_after, 0), (cut_after, steps - 2), (cut_after, steps // 2 + 2), (cut_while_saving, 1)]
    resume: list[str] = []
    for cut, number in cuts:
        undo = cut(monkeypatch, number)
        with pytest.raises(Cut):
            run(config, work, *more, *resume)
        undo()
        resume = ["--resume"]
    return run(config, work, *more, *resume)


def test_a_resumed_run_ends_with_the_same_bits(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted in both stages, the state kept after every step."""
    interrupted(TWENTY, tmp_path / "work", monkeypatch, "--save-minutes", "0")
    for name in ("see", "talk"):
        assert_same_state(tmp_path / "work" / f"{name}.pt", trained / f"{name}.pt")
        assert log_of(tmp_path / "work" / f"{name}.jsonl") == log_of(trained / f"{name}.jsonl")
    assert contents(tmp_path / "work" / "frame") == contents(trained / "frame")
    assert contents(tmp_path / "work" / "checkpoint") == contents(trained / "checkpoint")


def test_in_float32_too_with_steps_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that runs a minute a look, the state is some steps old when the power goes: they are made again."""
    run(SIX, tmp_path / "whole", "--fp32")
    looks = count()
    monkeypatch.setattr(train, "time", SimpleNamespace(monotonic=lambda: 60.0 * next(looks)))
    interrupted(SIX, tmp_path / "cut", monkeypatch, "--fp32", "--save-minutes", "3")
    for name in ("see.pt", "talk.pt"):
        assert_same_state(tmp_path / "cut" / name, tmp_path / "whole" / name)
    assert contents(tmp_path / "cut" / "checkpoint") == contents(tmp_path / "whole" / "checkpoint")
    for stage in ("see", "talk"):
        logs = [log_of(tmp_path / name / f"{stage}.jsonl") for name in ("cut", "whole")]
        assert logs[0] == logs[1], "steps that were lost are made, and logged, again"
        assert len(logs[0]) == 6


def test_on_a_full_disk_there_is_a_whole_state_or_none(tmp_path: Path) -> None:
    work = tmp_path / "work"
    with file_limit(8192), pytest.raises(InputError, match=r"^cannot write '.+see\.pt' \(File too large\)"):
        run(SIX, work)
    assert sorted(contents(work)) == ["config.json", "see.jsonl"]
    run(SIX, work, "--resume")
    assert (work / "checkpoint" / "model.safetensors").exists()


def test_an_interrupted_command_says_how_to_go_on(
    tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "train", stop)
    said = f"interrupted: what {str(tmp_path)!r} holds is kept, at most 3 minutes are lost; add --resume\n"
    assert command(train.main, "--work", tmp_path) == (130, "", said)


def log_of(file: Path) -> list[dict[str, float]]:
    """The rows of a log, without the time they took."""
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


@pytest.mark.slow
def test_worker_processes_change_nothing(tmp_path: Path) -> None:
    whole, helped = (run(SIX, tmp_path / workers, "--workers", workers) for workers in ("0", "2"))
    assert contents(whole) == contents(helped)


def test_precisions_differ(tmp_path: Path) -> None:
    one = replace(SIX, see=replace(BRIEF, steps=1), talk=replace(BRIEF, steps=1))
    weights = [run(one, tmp_path / name, *more) / "model.safetensors" for name, more in (("a", ()), ("b", ("--fp32",)))]
    assert weights[0].read_bytes() != weights[1].read_bytes()


def test_resuming_a_finished_training_changes_nothing(trained: Path) -> None:
    before = contents(trained)
    run(TWENTY, trained, "--resume")
    after = contents(trained)
    assert after.keys() == before.keys()
    assert {name for name in before if after[name] != before[name]} == set()


@pytest.mark.parametrize(
    ("config", "more", "said"),
    [
        (TWENTY, [], "holds a training; go on with --resume, or give another --work"),
        (replace(TWENTY, seed=1), ["--resume"], "holds a training with other settings; give another --work"),
        (replace(TWENTY, talk=replace(LONG, steps=21)), ["--resume"], "with other settings"),
        (TWENTY, ["--resume", "--fp32"], "with other settings"),
    ],
)
def test_what_is_there_is_not_overwritten(trained: Path, config: Config, more: list[str], said: str) -> None:
    before = contents(trained)
    with pytest.raises(InputError) as caught:
        run(config, trained, *more)
    assert said in str(caught.value)
    assert str(trained) in str(caught.value)
    assert contents(trained) == before


@pytest.mark.parametrize("more", [[], ["--resume"]])
def test_the_command_refuses_in_one_line(trained: Path, more: list[str], command: Command) -> None:
    code, out, err = command(train.main, "--work", trained, "--device", "cpu", *more)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("error: ")


def test_batches_follow_from_their_number_alone(words: Any, model: Any) -> None:
    """Batch 5 is the same whether a run began at 0 or at 4; no two are alike."""
    early, late = SceneViews("train", 2, range(9)), SceneViews("train", 2, range(4, 9))
    assert (len(early), len(late)) == (9, 5)
    assert torch.equal(early[5].pixels, late[1].pixels)
    assert torch.equal(early[5].labels, late[1].labels)
    assert not torch.equal(early[5].labels[0], early[6].labels[0])
    talks = [Conversations("train", LONG, steps, words, model.config) for steps in (range(12), range(4, 12))]
    for step in (5, 9):
        one, other = talks[0][step], talks[1][step - 4]
        assert torch.equal(one.ids, other.ids)
        assert torch.equal(one.labels, other.labels)
        assert all(torch.equal(a, b) for a, b in zip(one.views, other.views, strict=True))


def test_small_canvases_come_first_and_a_batch_has_one(words: Any, model: Any) -> None:
    data = Conversations("train", LONG, range(20), words, model.config)
    batches = [data[step] for step in range(20)]
    for step, batch in enumerate(batches):
        assert len(set(batch.sizes)) == 1
        across, down = (side // TILE for side in batch.sizes[0])
        assert across * down == (1 if step < 10 else 2) or step >= 15
        assert [view.shape[0] for view in batch.views] == [1 + across * down] * 2
        assert set(batch.tasks) <= set(talk.LONG if step % 2 else talk.SHORT)
    assert {batch.sizes[0] for batch in batches[15:]} <= {(TILE * cols, TILE * rows) for cols, rows in CANVASES}
    assert {task for batch in batches for task in batch.tasks} == set(TASKS)


def test_every_canvas_is_met_in_the_end_with_both_kinds_of_tasks(words: Any, model: Any) -> None:
    stage = Stage(steps=100, scenes=1, rate=1e-3)
    data = Conversations("train", stage, range(80, 100), words, model.config)
    met = {(data[step].sizes[0], step % 2) for step in range(20)}
    assert met == {((TILE * cols, TILE * rows), kind) for cols, rows in CANVASES for kind in (0, 1)}


def test_answers_are_told_less_and_less(words: Any, model: Any) -> None:
    """Of a long training: most contexts give the answer away at first, none from the middle on."""
    stage = Stage(steps=1000, scenes=2, rate=1e-3)
    data = Conversations("train", stage, range(1000), words, model.config)
    shares = []
    for first in (1, 251, 501):
        texts = [words.decode(row) for step in range(first, first + 20, 2) for row in data[step].ids]
        told = [bool(re.search(r"thing is an? \w+\.|The \w+ is \w+\.|says|答案是", text)) for text in texts]
        shares.append(sum(told) / len(told))
    assert shares[0] > shares[1] > 0
    assert shares[2] == 0


def test_the_tokenizer_knows_the_questions_and_spells_what_signs_say(trained: Path) -> None:
    """A word that were one token would be told from its outline, not read."""
    words = load_tokenizer(str(trained / "frame"))
    assert (words.bos_token_id, words.eos_token_id, words.unk_token_id) == (1, 2, 0)
    for text in (*WORDS, *map(str, range(10, 100))):
        pieces = words.tokenize(text)
        assert [piece for piece in pieces if piece != "▁"] in ([*text], [f"▁{text[0]}", *text[1:]]), pieces
    for task in TASKS:
        for _, asked in ask_about(drawn("val", 60), task):
            for text in (asked.prompt, asked.answer):
                ids = words(text).input_ids
                assert words.decode(ids, skip_special_tokens=True) == text
                assert len(ids) < 0.6 * len(text.encode()) + 8


@pytest.fixture(scope="module")
def loaded(trained: Path) -> Any:
    return load_pretrained_model(str(trained / "checkpoint"), None, device="cpu")


def test_the_checkpoint_has_the_published_names_and_shapes(trained: Path) -> None:
    folder = trained / "checkpoint"
    config, clip = (json.loads((folder / name / "config.json").read_text()) for name in (".", "clip"))
    weights = load_file(folder / "model.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in weights.items()} == state_shapes(config, clip)
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}
    assert config["architectures"] == ["LlavaLlamaForCausalLM"]
    assert config["mm_patch_merge_type"] == "spatial_unpad"
    assert config["image_grid_pinpoints"] == [[96 * cols, 96 * rows] for cols, rows in CANVASES]
    files = {"config.json", "generation_config.json", "tokenizer.model", "tokenizer_config.json", "model.safetensors"}
    assert contents(folder).keys() == {*files, "clip/config.json", "clip/preprocessor_config.json"}


def test_the_checkpoint_loads_as_what_was_trained(trained: Path, loaded: Any) -> None:
    """Its weights are the trained ones rounded to float16, and what it says differs by no more than that."""
    words, model, *_ = loaded
    trained_model, own_words = talking(trained, state(trained / "talk.pt")["model"])
    for name, tensor in trained_model.model.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor.half().float()), name
    assert model.state_dict().keys() == trained_model.model.state_dict().keys()
    batch = conversation(drawn("val", 60)[:2], words, model.config)
    again = conversation(drawn("val", 60)[:2], own_words, trained_model.model.config)
    assert torch.equal(batch.ids, again.ids)
    assert torch.equal(batch.prefix, again.prefix)
    model.method, said = get("none"), []
    for one in (model, trained_model.model):
        hook = one.register_forward_hook(lambda module, inputs, output: said.append(output.logits))
        with torch.no_grad():
            Talking(one)(batch)
        hook.remove()
    torch.testing.assert_close(said[0], said[1], atol=5e-3, rtol=5e-3)
    assert said[0].std() > 0.1


def test_its_processor_is_that_of_training(loaded: Any) -> None:
    _, model, processor, _ = loaded
    for scene, wanted in zip(drawn("val", 6), views_of(drawn("val", 6)), strict=True):
        assert torch.equal(process_images([scene.image], processor, model.config)[0], wanted)


@pytest.mark.parametrize("config", [Config(), train.LARGE])
def test_a_checkpoint_is_16_mib_at_most(config: Config) -> None:
    with torch.device("meta"):
        model = build_model(config.vision, config.language, 640)
    assert 2 * sum(weight.numel() for weight in model.parameters()) < 16 * 2**20


@pytest.mark.parametrize(("more", "config"), [([], Config()), (["--large"], train.LARGE)])
def test_the_command_trains_one_of_two(
    more: list[str], config: Config, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Config] = []
    monkeypatch.setattr(train, "train", lambda config, args: given.append(config))
    assert command(train.main, "--work", tmp_path, *more)[0] == 0
    assert given == [config]
