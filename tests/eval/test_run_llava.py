"""The command: answers on stdout, ledger on stderr or as JSON, one line and exit code 2 for bad input."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from llava.compress import get
from llava.compress.trace import Trace
from llava.constants import InputError
from llava.eval import run_llava
from llava.eval.run_llava import ask, build_prompt, eval_model
from llava.mm_utils import get_model_name_from_path, load_image
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


# --- pictures of all kinds, and methods for one question -------------------------------------------------------------


@pytest.fixture
def sideways(tmp_path) -> tuple[Path, Image.Image]:
    """A photograph of a camera held upright, and as its file has it."""
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = picture(300, 200)
    stored.save(tmp_path / "sideways.png", exif=exif)
    return tmp_path / "sideways.png", stored


def test_pictures_are_turned_upright(command, sideways, loaded):
    file, stored = sideways
    tokenizer, model, processor, _ = loaded()

    def answer(*images, **options):
        trace = Trace()
        text = ask(tokenizer, model, processor, "what?", *images, trace=trace, max_new_tokens=4, **options)
        return text, trace.images[0].grid.image_size

    upright = stored.transpose(Image.Transpose.ROTATE_270)
    expected = answer([upright])
    assert expected[1] == (200, 300)
    for given in ([Image.open(file)], [load_image(file)], [load_image(file, exif=True)], [file], str(file)):
        assert answer(given) == expected
    assert answer([stored])[1] == (300, 200)
    account = json.loads(command("--image-file", file, "--json")[1])
    assert account["images"][0]["size"] == [200, 300]


def test_ask_takes_what_load_image_takes(photo, loaded, server, monkeypatch):
    tokenizer, model, processor, _ = loaded()
    expected = ask(tokenizer, model, processor, "what?", [picture(300, 200)], max_new_tokens=4)
    address = f"http://127.0.0.1:{server.server_address[1]}/photo.png"
    monkeypatch.setenv("LLAVA_ALLOW_LOCAL_URLS", "1")
    for given in (photo, str(photo), photo.read_bytes(), Image.open(photo), [photo], iter([photo]), address, [address]):
        assert ask(tokenizer, model, processor, "what?", given, max_new_tokens=4) == expected
    assert ask(tokenizer, model, processor, "what?", [], max_new_tokens=4)
    for wrong, said in ((None, "give a list"), ([None], "PIL picture"), ("nosuch.png", "does not exist")):
        with pytest.raises(InputError, match=said):
            ask(tokenizer, model, processor, "what?", wrong)


def kept(loaded, **options):
    tokenizer, model, processor, _ = loaded()
    trace = Trace()
    ask(tokenizer, model, processor, "what?", picture(300, 200), trace=trace, max_new_tokens=2, **options)
    return trace.ledger()["method"], trace.ledger()["images"][0]["kept"]


def test_a_method_for_one_question(loaded):
    model = loaded().model
    before = model.method
    assert kept(loaded, method="uniform", retention_ratio=0.5) == ("uniform(retention_ratio=0.5)", 18 + 48)
    assert kept(loaded, method="uniform(retention_ratio=0.5)", retention_ratio=0.1)[1] == 18 + 48  # as everywhere
    assert kept(loaded, method=get("random", retention_ratio=0.5))[1] == 18 + 48
    assert kept(loaded, method=get("random"), retention_ratio=0.5)[1] == 18 + 48
    assert kept(loaded, retention_ratio=0.5) == ("globalcom2(retention_ratio=0.5)", 18 + 48)
    assert kept(loaded, method="none")[1] == 132
    assert kept(loaded) == ("globalcom2()", 9 + 24)
    assert model.method is before
    for wrong in ({"method": "nosuch"}, {"retention_ratio": 2}, {"method": "tome(r=2)", "retention_ratio": 0.5}):
        with pytest.raises(InputError):
            kept(loaded, **wrong)
    assert model.method is before


def test_threads_with_methods_of_their_own(loaded):
    specs = ["uniform", "none", "hired", "fastv(layer=1, budget='after')"] * 2
    expected = {spec: kept(loaded, method=spec) for spec in set(specs)}
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda spec: kept(loaded, method=spec), specs))
    assert found == [expected[spec] for spec in specs]


def test_file_names_with_commas(command, tmp_path):
    first, second = tmp_path / "a, b.png", tmp_path / "c,d.png"
    picture(300, 200).save(first)
    picture(100, 300).save(second)
    both = json.loads(command("--image-file", first, "--image-file", second, "--json")[1])
    assert [image["size"] for image in both["images"]] == [[300, 200], [100, 300]]
    one = json.loads(command("--image-file", first, "--json")[1])
    assert [image["size"] for image in one["images"]] == [[300, 200]]
    assert "c,d.png: 100x300" in command("--image_file", second)[2]


@pytest.mark.parametrize(
    ("given", "sep", "found"),
    [
        ("a.png,b.png", ",", ["a.png", "b.png"]),
        ("a.png , b.png", None, ["a.png", "b.png"]),
        ("a.png;b,c.png", ";", ["a.png", "b,c.png"]),
        (["a.png,b.png"], ",", ["a.png", "b.png"]),
        (["a,b.png", "c.png"], ",", ["a,b.png", "c.png"]),
        ("https://x.org/a,b.png", ",", ["https://x.org/a,b.png"]),
        ("https://x.org/a,b.png, http://y.org/c.png", ",", ["https://x.org/a,b.png", "http://y.org/c.png"]),
        ("data:image/png;base64,AAAA", ",", ["data:image/png;base64,AAAA"]),
        (Path("a,b.png"), ",", [Path("a,b.png")]),
        (b"a,b", ",", [b"a,b"]),
        ("x" * 5000, ",", ["x" * 5000]),
    ],
)
def test_which_pictures_an_argument_names(given, sep, found):
    assert run_llava.image_sources(given, sep) == found


def test_an_address_is_an_image_file(command, server, monkeypatch):
    address = f"http://127.0.0.1:{server.server_address[1]}/photo.png"
    code, out, err = command("--image-file", address)
    assert (code, out) == (2, "")
    assert "LLAVA_ALLOW_LOCAL_URLS=1" in err
    assert err.count("\n") == 1
    monkeypatch.setenv("LLAVA_ALLOW_LOCAL_URLS", "1")
    code, out, err = command("--image-file", address)
    assert code == 0
    assert "image photo.png: 300x200" in err


def test_upstreams_quick_start(checkpoint, server, monkeypatch, capsys):
    """As LLaVA's README has it, but for the address and the model."""
    monkeypatch.setenv("LLAVA_ALLOW_LOCAL_URLS", "1")
    model_path = str(checkpoint())
    prompt = "What are the things I should be cautious about when I visit here?"
    image_file = f"http://127.0.0.1:{server.server_address[1]}/view.png"
    args = type(
        "Args",
        (),
        {
            "model_path": model_path,
            "model_base": None,
            "model_name": get_model_name_from_path(model_path),
            "query": prompt,
            "conv_mode": None,
            "image_file": image_file,
            "sep": ",",
            "temperature": 0,
            "top_p": None,
            "num_beams": 1,
            "max_new_tokens": 3,
        },
    )()
    eval_model(args)
    said = capsys.readouterr()
    assert said.out.strip()
    assert "image view.png: 300x200" in said.err


class Photo(BaseHTTPRequestHandler):
    """Answers every path with one picture."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        picture(300, 200).save(self.wfile, "PNG")

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[ThreadingHTTPServer]:
    served = ThreadingHTTPServer(("127.0.0.1", 0), Photo)
    Thread(target=served.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield served
    served.shutdown()
    served.server_close()
