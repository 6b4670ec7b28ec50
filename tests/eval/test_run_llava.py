"""The command: answers on stdout, ledger on stderr or as JSON, one line and exit code 2 for bad input."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from llava.eval import run_llava
from llava.eval.run_llava import ask, build_prompt, eval_model
from tests.conftest import picture


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photo.png"
    picture(300, 200).save(path)
    return path


@pytest.fixture
def command(command, checkpoint):
    def run(*arguments, model=None, query="what is this?"):
        words = ["--model-path", model or checkpoint(), "--query", query, "--max-new-tokens", "4"]
        return command(run_llava.main, *words, *arguments)

    return run


def test_answer_on_stdout_and_ledger_on_stderr(command, photo, loaded):
    code, out, err = command("--image-file", photo, "--retention-ratio", "0.25")
    assert code == 0
    tokenizer, model, processor, _ = loaded()
    assert out.strip() == ask(tokenizer, model, processor, "what is this?", [Image.open(photo)], max_new_tokens=4)
    assert "300x200, a 2x2 grid" in err
    assert "ratio 0.25: of 132 patches 33 planned to enter the language model" in err
    for stage in ("vision", "selection", "prefill", "decode"):
        assert stage in err


def test_json_holds_answer_and_account(command, photo, tmp_path):
    small = tmp_path / "small.png"
    picture(100, 300).save(small)
    code, out, err = command("--image-file", f"{photo},{small}", "--retention-ratio", "0.5", "--json")
    assert (code, err) == (0, "")
    account = json.loads(out)
    assert [image["size"] for image in account["images"]] == [[300, 200], [100, 300]]
    first = account["images"][0]
    assert first["patches_before"] == [36, 24, 24, 24, 24]
    assert first["kept"] == sum(first["patches_after"]) == first["planned"] == 18 + 48
    assert first["tokens"] == first["kept"] + first["newlines"]
    assert first["crop_ratios"] == [round(k / 24, 4) for k in first["patches_after"][1:]]
    assert account["retention_ratio"] == first["requested_ratio"] == 0.5
    assert set(account["seconds"]) == {"vision", "selection", "packing", "prefill", "decode"}
    assert isinstance(account["answer"], str)


def test_what_was_asked_for_is_reported_wherever_it_is_met(command, photo):
    for method, asked in (("fastv(layer=1)", 0.5), ("uniform", 0.5), ("none", 1.0)):
        words = ["--image-file", photo, "--method", method, "--retention-ratio", "0.5"]
        code, out, _ = command(*words, "--json")
        assert (code, json.loads(out)["retention_ratio"]) == (0, asked)
        assert f"ratio {asked:g}: of 132 patches" in command(*words)[2]
    code, out, _ = command("--image-file", photo, "--method", "tome(r=5)", "--json")
    assert (code, json.loads(out)["retention_ratio"]) == (0, None)
    assert "no ratio: of 132 patches 5 to 107 planned" in command("--image-file", photo, "--method", "tome(r=5)")[2]


def test_ratio_argument_goes_before_flag_before_environment_before_line_101(command, photo, monkeypatch):
    def kept(*arguments):
        return json.loads(command("--image-file", photo, "--json", *arguments)[1])["images"][0]["kept"]

    assert kept() == 9 + 24
    monkeypatch.setattr("llava.model.llava_arch.retention_ratio", 0.75)
    assert kept() == 27 + 72
    monkeypatch.setenv("LLAVA_RETENTION_RATIO", "0.5")
    assert kept() == kept("--method", "random") == 18 + 48
    assert kept("--retention-ratio", "1.0") == 132
    assert kept("--retention-ratio", "1.0", "--method", "uniform(retention_ratio=0.25)") == 9 + 24


def test_none_in_the_spec_means_not_given(command, photo):
    spec = "globalcom2(retention_ratio=None)"
    out = command("--image-file", photo, "--json", "--method", spec, "--retention-ratio", "0.5")[1]
    assert json.loads(out)["images"][0]["kept"] == 18 + 48


def test_the_checkpoints_own_method_is_used_unless_another_is_given(command, photo, tmp_path, checkpoint):
    folder = shutil.copytree(checkpoint(), tmp_path / "own")
    config = json.loads((folder / "config.json").read_text()) | {"method": "uniform", "retention_ratio": 0.5}
    (folder / "config.json").write_text(json.dumps(config))
    account = json.loads(command("--image-file", photo, "--json", model=folder)[1])
    assert account["method"] == "uniform(retention_ratio=0.5)"
    assert account["images"][0]["kept"] == 18 + 48
    other = command("--image-file", photo, "--json", "--method", "none", model=folder)[1]
    assert json.loads(other)["retention_ratio"] == 1.0  # what none did, whatever was asked


def test_a_long_question_is_one_line(command, photo):
    code, _, err = command("--image-file", photo, query="word " * 5000)
    assert code == 2
    assert "4096" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--retention-ratio", "0"], "got 0"),
        (["--retention-ratio", "-1"], "got -1"),
        (["--retention-ratio", "1.5"], "got 1.5"),
        (["--retention-ratio", "nan"], "got nan"),
        (["--retention-ratio", "abc"], "got abc"),
        (["--method", "nosuch"], "nosuch"),
        (["--method", "globalcom2(nosuch=1)"], "nosuch"),
        (["--method", "globalcom2("], "globalcom2("),
        (["--profile", "nosuch"], "nosuch"),
        (["--conv-mode", "nosuch"], "nosuch"),
        (["--max-new-tokens", "many"], "many"),
        (["--max-new-tokens", "0"], "max-new-tokens"),
        (["--num-beams", "0"], "num-beams"),
        (["--temperature", "nan"], "nan"),
        (["--temperature", "-1"], "-1"),
        (["--temperature", "1", "--top-p", "5"], "top-p"),
        (["--device", "cuda"], "cuda"),
        (["--nosuch"], "nosuch"),
    ],
)
def test_bad_option_is_one_line_and_code_2(command, photo, arguments, said):
    code, out, err = command("--image-file", photo, *arguments)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert said in err


def test_bad_ratio_in_the_environment_is_named(command, photo, monkeypatch):
    monkeypatch.setenv("LLAVA_RETENTION_RATIO", "quarter")
    code, out, err = command("--image-file", photo)
    assert (code, out) == (2, "")
    assert "LLAVA_RETENTION_RATIO" in err
    assert "quarter" in err


def _files(folder: Path) -> dict[str, Path]:
    """Picture files that are none, by what is wrong with them."""
    whole = folder / "whole.png"
    picture(64, 64).save(whole)
    data = whole.read_bytes()
    made = {"empty": b"", "truncated": data[: len(data) // 2], "no picture": b"hello, I am text" * 9}
    # The header alone says 20000 x 20000.
    side = (20000).to_bytes(4, "big")
    made["enormous"] = data[:16] + side + side + data[24:]
    zero = (0).to_bytes(4, "big")
    made["no pixels"] = data[:16] + zero + data[20:]
    paths = {name: folder / f"{name}.png" for name in made}
    for name, content in made.items():
        paths[name].write_bytes(content)
    return paths | {"missing": folder / "nosuch.png", "folder": folder}


@pytest.mark.parametrize("kind", ["empty", "truncated", "no picture", "enormous", "no pixels", "missing", "folder"])
def test_bad_picture_is_one_line_and_code_2(command, tmp_path, kind):
    path = _files(tmp_path)[kind]
    code, out, err = command("--image-file", path)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert path.name in err


@pytest.mark.parametrize("query", ["<image> and <image>", "<image>\n<image>\n<image>"])
def test_more_placeholders_than_images(command, photo, query):
    code, out, err = command("--image-file", photo, query=query)
    assert (code, out) == (2, "")
    assert f"{query.count('<image>')} <image>" in err
    assert "1 image(s)" in err


def test_fewer_placeholders_than_images(command, photo):
    code, _, err = command("--image-file", f"{photo},{photo}", query="<image> what?")
    assert code == 2
    assert "1 <image>" in err


@pytest.mark.parametrize("content", [None, "", "{", "[]", '{"model_type": "llava_mpt", "mm_vision_tower": "x"}'])
def test_unreadable_config_is_one_line_and_code_2(command, photo, tmp_path, content):
    folder = tmp_path / "broken"
    folder.mkdir()
    if content is not None:
        (folder / "config.json").write_text(content)
    code, out, err = command("--image-file", photo, model=folder)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1, err


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16"])
def test_any_mode_is_answered_as_rgb(command, tmp_path, mode):
    path = tmp_path / f"photo.{'tif' if mode == 'CMYK' else 'png'}"
    if mode == "I;16":
        Image.new("I;16", (90, 60), 30000).save(path)
    else:
        picture(90, 60).convert(mode).save(path)
    assert command("--image-file", path)[0] == 0


def test_first_frame_of_an_animation_counts(command, tmp_path):
    path = tmp_path / "moving.gif"
    picture(90, 60).save(path, save_all=True, append_images=[picture(90, 60, seed=1)])
    assert command("--image-file", path)[0] == 0


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (10000, 37), (37, 10000), (2, 3)])
def test_any_size_is_answered(command, tmp_path, size):
    path = tmp_path / "photo.png"
    picture(*size).save(path)
    for ratio in ("0.01", "0.25", "1"):
        code, out, _ = command("--image-file", path, "--json", "--retention-ratio", ratio)
        assert code == 0
        assert json.loads(out)["images"][0]["kept"] > 0


def test_readme_quick_start_object(checkpoint, photo, capsys):
    """LLaVA's README builds its arguments as a class with attributes."""
    values = {
        "model_path": str(checkpoint()),
        "model_base": None,
        "model_name": "llava-next-7b",
        "query": "what?",
        "conv_mode": None,
        "image_file": str(photo),
        "sep": ",",
        "temperature": 0,
        "top_p": None,
        "num_beams": 1,
        "max_new_tokens": 3,
    }
    eval_model(type("Args", (), values)())
    assert capsys.readouterr().out


def test_prompt_by_config():
    def config(**keys):
        return SimpleNamespace(**({"model_type": "llava_llama", "hidden_size": 4096} | keys))

    vicuna = build_prompt("What?", 2, config())
    assert vicuna.endswith(" USER: <image>\n<image>\nWhat? ASSISTANT:")
    assert build_prompt("a <image> b", 1, config()).count("<image>") == 1
    assert build_prompt("a <image-placeholder> b", 1, config()).endswith("USER: a <image> b ASSISTANT:")
    assert build_prompt("What?", 1, config(model_type="llava_mistral")) == "[INST] <image>\nWhat? [/INST]"
    assert "<im_start><image><im_end>\nWhat?" in build_prompt("What?", 1, config(mm_use_im_start_end=True))


def test_a_fresh_process_answers(checkpoint, photo):
    """The whole command once, as a user types it."""
    arguments = ["--model-path", checkpoint(), "--image-file", photo, "--query", "hi", "--max-new-tokens", "3"]
    done = subprocess.run(
        [sys.executable, "-m", "llava.eval.run_llava", *map(str, arguments)], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip()
    assert done.stderr.startswith("running on cpu in float32 with sdpa attention: globalcom2(retention_ratio=0.25), ")
    assert "\nmethod globalcom2()\n" in done.stderr


def test_tokens_by_layer_are_told_where_they_change():
    ledger = {"method": "x", "images": [], "sequence_lengths": [9], "seconds": {}}
    said = run_llava.describe(ledger | {"visual_per_layer": [[8, 8, 2, 2, 2, 2]]}, [])
    assert "visual tokens by layer, newlines included: 2 of 8, 4 of 2; on average 4.0" in said
    assert "by layer" not in run_llava.describe(ledger | {"visual_per_layer": [[8] * 6]}, [])
