"""Damaged and hostile checkpoints: an answer or one line, never a traceback, in bounded time and memory."""

import json
import os
import pickle
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from llava.constants import InputError
from llava.model.builder import load_pretrained_model
from llava.model.miniature import write_miniature
from llava.model.stored import count_weights, read_header, weight_files
from llava.model.weights import refuse_infinite
from tests.model.hostile import INDEX, SHARD, answer, faults, spoilt, write_bin
from tests.model.test_miniature import read_weights

SECONDS = 60  # a good one takes a tenth of one; other jobs may run
MEBIBYTES = 1024


class TooLongError(BaseException):
    """A checkpoint was still being loaded; no `except Exception` on the way may take it for a damaged file."""


@contextmanager
def limited() -> Iterator[None]:
    """Stop what takes too long."""

    def stop(*_: Any) -> None:
        raise TooLongError

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def outcome(folder: Path) -> str:
    """Load and answer; what came of it, in a line."""
    try:
        with limited():
            return f"answered {answer(folder).shape[0]}"
    except InputError as error:
        said = str(error)
        return "refused" if len(said) < 700 and said.isprintable() else f"says too much: {said[:200]!r}"
    except BaseException as error:
        return f"{type(error).__name__}: {error}"[:200]


def survey(source: Path, target: Path, seed: int, each: int) -> dict[str, str]:
    """Spoil copies of a checkpoint; returns what neither answered nor was refused in a line."""
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    found = {name: outcome(spoilt(source, target, spoil)) for name, spoil in faults(source, seed, each)}
    assert {"answered 1", "refused"} <= {*found.values()}, "both must occur, or nothing was tried"
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - held
    assert grown < MEBIBYTES, f"{grown:.0f} MiB were taken"
    return {name: said for name, said in found.items() if said not in ("answered 1", "refused")}


def test_a_few_dozen_of_every_kind(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    assert survey(checkpoint("v1.6-vicuna"), tmp_path / "x", 0, 7) == {}


@pytest.mark.slow
def test_several_hundred(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    assert survey(checkpoint("v1.6-vicuna"), tmp_path / "x", 1, 90) == {}


@pytest.mark.slow
def test_several_hundred_where_the_tower_has_its_own_folder(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    assert survey(checkpoint("v1.5"), tmp_path / "x", 2, 60) == {}


# -------------------------------------------------------------------------------------------- what each refusal says


def refusal(folder: Path) -> str:
    with pytest.raises(InputError) as caught:
        load_pretrained_model(str(folder), device="cpu")
    assert len(str(caught.value)) < 500
    return str(caught.value)


@pytest.fixture
def copy(checkpoint: Callable[[str], Path], tmp_path: Path) -> Path:
    """A miniature that may be spoilt."""
    return shutil.copytree(checkpoint("v1.6-vicuna"), tmp_path / "llava")


def set_index(folder: Path, name: Any) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] = {key: name if file == SHARD else file for key, file in index["weight_map"].items()}
    (folder / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize("way", ["..", "absolute", "folder", "link"])
def test_an_index_names_files_of_its_own_folder_alone(way: str, copy: Path, tmp_path: Path) -> None:
    """The files are good ones, so that without the check each of these would load."""
    outside = tmp_path / "outside.safetensors"
    shutil.move(copy / SHARD, outside)
    (copy / "sub").mkdir()
    shutil.copy(outside, copy / "sub" / "x.safetensors")
    if way == "link":
        (copy / SHARD).symlink_to(outside)
    else:
        set_index(copy, {"..": "../outside.safetensors", "absolute": str(outside), "folder": "sub/x.safetensors"}[way])
    message = refusal(copy)
    assert "leads out of its folder" in message if way == "link" else "beside it" in message


def test_the_hubs_own_links_are_followed(copy: Path, tmp_path: Path) -> None:
    """`--model-path …/models--x--y/snapshots/123` is how clusters without network load what was fetched before."""
    snapshot, blobs = tmp_path / "models--x--y" / "snapshots" / "0123", tmp_path / "models--x--y" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(file for file in copy.iterdir() if file.is_file())):
        shutil.move(file, blobs / f"{number:064}")
        (snapshot / file.name).symlink_to(f"../../blobs/{number:064}")
    shutil.copytree(copy / "clip", snapshot / "clip")
    load_pretrained_model(str(snapshot), device="cpu")


def test_a_linked_folder_and_links_within_it(copy: Path, tmp_path: Path) -> None:
    shutil.move(copy / SHARD, copy / "other.safetensors")
    (copy / SHARD).symlink_to("other.safetensors")
    (tmp_path / "here").symlink_to(copy)
    load_pretrained_model(str(tmp_path / "here"), device="cpu")


@pytest.mark.parametrize("file", ["config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.model"])
@pytest.mark.parametrize("what", ["pipe", "folder", "broken link"])
def test_what_is_no_file_is_refused_and_not_waited_for(file: str, what: str, copy: Path) -> None:
    (copy / file).unlink()
    make = {"pipe": os.mkfifo, "folder": Path.mkdir, "broken link": lambda path: path.symlink_to("nowhere")}[what]
    make(copy / file)
    with limited():
        message = refusal(copy)
    assert file in message


@pytest.mark.parametrize("where", ["shard", "tower"])
def test_a_pickle_is_refused_in_plain_words(where: str, tmp_path: Path) -> None:
    """torch's message is a page long and says how to run what is in the file."""
    folder = write_miniature(tmp_path / "llava", "v1.5", file_format="bin", shards=1)
    file = folder / "pytorch_model-00001-of-00001.bin"
    if where == "tower":
        write_bin(folder / "clip", {})
        file = folder / "clip" / "pytorch_model.bin"
    file.write_bytes(pickle.dumps({"x": print}))
    message = refusal(folder)
    assert file.name in message
    assert "never loaded" in message
    assert "weights_only" not in message


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "lm_head.weight",
        "model.image_newline",
        "model.mm_projector.2.bias",
        "model.vision_tower.vision_tower.vision_model.encoder.layers.3.self_attn.k_proj.weight",
    ],
)
def test_one_number_that_is_none_is_found(name: str, value: float, copy: Path) -> None:
    """Of a word nobody uses, or of the tower's last layer, which only ranks patches: answers would look sound."""
    state = read_weights(copy)
    state[name].view(-1)[3] = value
    save_file(state, copy / "model.safetensors", metadata={"format": "pt"})
    message = refusal(copy)
    assert "NaN or infinite, in float32, in " in message
    assert name.replace("vision_model.", "") in message


def test_what_float16_cannot_hold_is_found(copy: Path) -> None:
    state = read_weights(copy)
    state["lm_head.weight"].view(-1)[3] = 1e6
    save_file(state, copy / "model.safetensors", metadata={"format": "pt"})
    load_pretrained_model(str(copy), device="cpu")
    with pytest.raises(InputError, match=r"in float16, in lm_head\.weight"):
        load_pretrained_model(str(copy), device="cpu", dtype="float16")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_all_tensors_are_named_and_none_else(dtype: torch.dtype) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2), torch.nn.Embedding(1, 2)).to(dtype)
    model.dtype = dtype
    refuse_infinite(model, "here")
    with torch.no_grad():
        model[0].bias[1] = torch.nan
        model[1].running_var[0] = torch.inf
    with pytest.raises(InputError, match=r"in 0\.bias, 1\.running_var; "):
        refuse_infinite(model, "here")
    refuse_infinite(model.to("meta"), "here")


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.complex64])
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_what_is_no_float_is_refused(kind: str, dtype: torch.dtype, copy: Path) -> None:
    """transformers casts them: a checkpoint of some other quantisation would answer nonsense."""
    state = read_weights(copy)
    state["model.norm.weight"] = state["model.norm.weight"].to(dtype)
    if kind == "bin":
        write_bin(copy, state)
    else:
        save_file(state, copy / "model.safetensors", metadata={"format": "pt"})
    message = refusal(copy)
    assert "no floating-point numbers in model.norm.weight" in message


@pytest.mark.parametrize("file_format", ["safetensors", "bin"])
def test_weights_are_counted_without_being_read(file_format: str, tmp_path: Path) -> None:
    folder = write_miniature(tmp_path, file_format=file_format, shards=3)
    state = read_weights(folder)
    assert [file.name for file in weight_files(str(folder))] == sorted(f.name for f in folder.glob("*-of-*"))
    assert count_weights(str(folder)) == sum(tensor.numel() for tensor in state.values())
    assert count_weights(str(folder), quantised=True) == 2 * count_weights(str(folder))
    header = read_header(next(folder.glob("*-00002-of-*")))
    assert header.items() <= {name: (tensor.numel(), True) for name, tensor in state.items()}.items()
