"""What answers depend on: the same however it is typed and wherever it lies, another where answers are."""

import argparse
import json
import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llava.eval import answer, record
from llava.eval.benchmarks.base import Question
from llava.eval.record import configuration, differences, fingerprint
from llava.model.builder import read_config
from tests.conftest import picture

# Of a record written before fingerprints: paths and options as typed.
EARLY = (
    *("method", "questions", "model_path", "model_base", "vision_tower", "dtype", "load_8bit", "load_4bit"),
    *("conv_mode", "benchmark", "temperature", "top_p", "num_beams", "max_new_tokens", "num_chunks", "chunk_idx"),
    *("image_folder", "single_pred_prompt", "all_rounds", "lang", "no_ocr"),
)
QUESTIONS = [Question(id=n, text="what?", image=f"{n}.png") for n in range(12)]
Made = Callable[..., dict[str, Any]]


@pytest.fixture
def place(tmp_path: Path, checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a checkpoint, pictures and questions, which is the working directory."""
    shutil.copytree(checkpoint(), tmp_path / "model")
    (tmp_path / "images").mkdir()
    for n in range(12):
        picture(20, 20, seed=n).save(tmp_path / "images" / f"{n}.png")
    (tmp_path / "questions.jsonl").write_text("{}\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def made(place: Path) -> Made:
    def make(*more: str, model: str = "model", images: str = "images") -> dict[str, Any]:
        words = ["--benchmark", "vqav2", "--model-path", model, "--question-file", "questions.jsonl"]
        args = answer.parse([*words, "--image-folder", images, "--answers-file", "a", *more])
        found = configuration(args, read_config(model), "none()", QUESTIONS)
        return dict(json.loads(json.dumps(found)))  # as it comes back from the disk

    return make


def early(found: dict[str, Any], args: dict[str, Any] | None = None) -> dict[str, Any]:
    """The record that an earlier version would have written, with the options as typed."""
    return {key: found[key] for key in EARLY} | {"dtype": None, "conv_mode": None, "top_p": None} | (args or {})


SPELLINGS = ["./model", "model/", "{}/model", "images/../model", "link", "copy", "moved/model"]


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_another_spelling_of_a_checkpoint_is_the_same(made, place, spelling):
    before = made()
    (place / "link").symlink_to("model")
    shutil.copytree("model", "copy")
    (place / "moved").mkdir()
    (place / "moved" / "model").symlink_to(place / "copy")
    (place / "copy" / "README.md").write_text("not what answers depend on")
    now = made(model=spelling.format(place))
    assert differences(before, now) == differences(now, before) == []
    is_copy = spelling in ("copy", "moved/model")  # earlier records say nothing of what was in a folder
    assert (differences(early(before), now) == []) == (not is_copy)


@pytest.mark.parametrize("images", ["./images", "images/", "{}/images", "elsewhere"])
def test_a_moved_image_folder_is_the_same(made, place, images):
    before = made()
    shutil.copytree("images", "elsewhere")
    now = made(images=images.format(place))
    assert differences(before, now) == differences(early(before), now) == []


def test_pictures_that_came_or_went_change_nothing_and_others_do(made, place):
    before = made()
    (place / "images" / "0.png").unlink()
    assert differences(before, made()) == differences(made(), before) == []
    picture(20, 20, seed=77).save("images/3.png")
    assert differences(before, made()) == ["picture '3.png' is another"]
    os.mkfifo("images/0.png")
    assert made()["pictures"].keys() == {f"{n}.png" for n in range(1, record.SAMPLE)}


SAME = [["--dtype", "float32"], ["--dtype", "float"], ["--device", "cpu"], ["--conv-mode", "vicuna_v1"],
        ["--top-p", "0.9"],
        ["--batch-size", "3"], ["--num-workers", "2"], ["--vision-tower", "model/clip"]]  # fmt: skip


@pytest.mark.parametrize("more", SAME)
def test_what_is_in_force_anyway_may_be_asked_for(made, more):
    assert differences(made(), made(*more)) == []
    if more[0] != "--vision-tower":  # earlier records do not say which the config's was
        assert differences(early(made()), made(*more)) == []


OTHER = [["--dtype", "bfloat16"], ["--conv-mode", "llava_v0"], ["--temperature", "0.5"], ["--num-beams", "2"],
         ["--max-new-tokens", "9"], ["--lang", "cn"], ["--load-4bit"], ["--num-chunks", "2"]]  # fmt: skip


@pytest.mark.parametrize("more", OTHER)
def test_what_makes_other_answers_is_another_and_named(made, more):
    before, now = made(), made(*more)
    key = more[0].strip("-").replace("-", "_")
    (said,) = differences(before, now)
    assert said == f"{key} {before[key]!r}, now {now[key]!r}"
    if key not in ("dtype", "conv_mode"):
        assert differences(early(before), now) == [said]


def rewrite(file: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


CHANGES = {
    "config": lambda root: (root / "config.json").write_text(
        json.dumps(json.loads((root / "config.json").read_text()) | {"rope_theta": 5.0})
    ),
    "generation": lambda root: (root / "generation_config.json").write_text('{"repetition_penalty": 2.0}'),
    "tokenizer": lambda root: (root / "tokenizer.model").write_bytes(b"another"),
    "processor": lambda root: (root / "clip" / "preprocessor_config.json").write_text("{}"),
    "adapter": lambda root: (root / "mm_projector.bin").write_bytes(b"another"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_checkpoint_with_other_files_is_another(made, place, change):
    before = made()
    change(place / "model")
    (said,) = differences(before, made())
    assert said.endswith("with other files")
    assert "model" in said or "vision_tower" in said


def test_where_things_lie_and_the_method_are_no_part_of_a_checkpoint(made, place):
    before = made()
    file = place / "model" / "config.json"
    kept = json.loads(file.read_text())
    file.write_text(json.dumps({"retention_ratio": 0.1, **dict(reversed(kept.items())), "_name_or_path": "/elsewhere"}))
    assert differences(before, made()) == []


@pytest.mark.parametrize("whole", [2**24, 2**12])
def test_one_weight_makes_another_checkpoint(place, monkeypatch, whole):
    """In small files every byte counts, in large ones some of every tensor."""
    monkeypatch.setattr(record, "WHOLE", whole)
    before = fingerprint("model")
    assert fingerprint("model") == before
    (file, *_) = sorted((place / "model").glob("model*.safetensors"))
    data = file.read_bytes()
    for name in ("model.mm_projector.0.weight", "model.norm.weight", "lm_head.weight"):
        files = [f for f in (place / "model").glob("model*.safetensors") if name in load_file(f)]
        kept = files[0].read_bytes()
        rewrite(files[0], lambda tensors, name=name: tensors.update({name: tensors[name] + 1}))
        assert fingerprint("model") != before, name
        files[0].write_bytes(kept)
    assert fingerprint("model") == before
    file.write_bytes(data[:-4])
    assert fingerprint("model") != before
    file.write_bytes(b"\xff" * len(data))  # no header: its loader says so
    assert fingerprint("model") != before


def test_an_archive_is_known_by_its_checksums(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "WHOLE", 100)
    for name, value in (("one", 1.0), ("two", 2.0)):
        (tmp_path / name).mkdir()
        weights = torch.zeros(99_999)
        weights[12345] = value
        torch.save({"weights": weights}, tmp_path / name / "pytorch_model.bin")
    assert zipfile.is_zipfile(tmp_path / "one" / "pytorch_model.bin")
    assert fingerprint(str(tmp_path / "one")) != fingerprint(str(tmp_path / "two"))


def test_a_hub_repository_is_known_by_its_commit(tmp_path, monkeypatch):
    snapshot = tmp_path / "snapshots" / "abc123" / "config.json"
    monkeypatch.setattr(record, "find_file", lambda path, name: snapshot)
    assert fingerprint("owner/name") == "owner/name@abc123"
    monkeypatch.setattr(record, "find_file", lambda path, name: pytest.fail("nothing is fetched"))
    assert fingerprint("openai/clip-vit-large-patch14-336", known=True) == "openai/clip-vit-large-patch14-336"


def test_the_dtype_is_the_devices(made, monkeypatch):
    words = argparse.Namespace(dtype=None, device=None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert record._dtype(words) == "float16"
    assert record._dtype(argparse.Namespace(dtype=None, device="cpu")) == "float32"
    assert record._dtype(argparse.Namespace(dtype="half", device=None)) == "float16"
