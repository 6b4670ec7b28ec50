"""Commands complain in one line, and upstream's `disable_torch_init`."""

import pytest
import torch

from llava.constants import InputError
from llava.utils import OneLineParser, disable_torch_init, run_command


def parser() -> OneLineParser:
    made = OneLineParser(prog="answer")
    made.add_argument("--image-file", required=True)
    made.add_argument("--method", choices=["none", "globalcom2"])
    made.add_argument("--count", type=int)
    return made


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "--image-file"),
        (["--image-file"], "--image-file"),
        (["--image-file", "a.png", "--count", "many"], "many"),
        (["--image-file", "a.png", "--method", "magic"], "magic"),
        (["--image-file", "a.png", "--no-such-flag"], "--no-such-flag"),
        (["--image-file", "a.png", "two\nlines"], "two"),
    ],
)
def test_a_parser_complains_in_one_line(arguments, named, capsys):
    with pytest.raises(SystemExit) as ended:
        parser().parse_args(arguments)
    out, err = capsys.readouterr()
    assert ended.value.code == 2
    assert out == ""
    assert err.startswith("answer: error: ")
    assert named in err
    assert err.count("\n") == 1
    assert err.endswith("\n")


def test_a_parser_still_parses_and_helps(capsys):
    assert parser().parse_args(["--image-file", "a.png", "--count", "3"]).count == 3
    with pytest.raises(SystemExit) as ended:
        parser().parse_args(["--help"])
    assert ended.value.code == 0
    assert "--image-file" in capsys.readouterr().out


def fail_with(error: BaseException) -> None:
    raise error


@pytest.mark.parametrize("message", ["ratio must be in (0, 1], got 7", "two\nlines", " much \t space \r\n"])
def test_an_input_error_is_one_line_and_code_2(message, capsys):
    with pytest.raises(SystemExit) as ended:
        run_command(lambda: fail_with(InputError(message)))
    out, err = capsys.readouterr()
    assert ended.value.code == 2
    assert out == ""
    assert err == f"error: {' '.join(message.split())}\n"


@pytest.mark.parametrize(
    "error", [ValueError("ours"), RuntimeError("x"), KeyError("k"), OSError(5), FileNotFoundError(2, "ours", "x")]
)
def test_other_exceptions_keep_their_traceback(error, capsys):
    with pytest.raises(type(error)) as raised:
        run_command(lambda: fail_with(error))
    assert raised.value is error
    assert capsys.readouterr() == ("", "")


def test_a_command_may_choose_its_exit_code():
    with pytest.raises(SystemExit) as ended:
        run_command(lambda: fail_with(SystemExit(7)))
    assert ended.value.code == 7


def test_a_command_that_works_says_nothing(capsys):
    done = []
    assert run_command(lambda: done.append("ran")) is None
    assert done == ["ran"]
    assert capsys.readouterr() == ("", "")


def test_disable_torch_init(monkeypatch):
    layers = (torch.nn.Linear(3, 3), torch.nn.LayerNorm(3))
    for layer in layers:
        monkeypatch.setattr(type(layer), "reset_parameters", type(layer).reset_parameters)  # undone afterwards
    disable_torch_init()
    draws = torch.get_rng_state()
    assert torch.nn.Linear(3, 4).weight.shape == (4, 3)
    for layer in layers:
        layer.weight.data.fill_(7)
        layer.reset_parameters()
        assert (layer.weight == 7).all()
    assert torch.equal(torch.get_rng_state(), draws)
    torch.nn.Embedding(3, 3)  # other layers are not meant
    assert not torch.equal(torch.get_rng_state(), draws)
