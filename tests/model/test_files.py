"""Files of a hub repository: fetched, missing, or out of reach, without a network."""

import logging
from typing import Any

import httpx
import pytest
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, RepositoryNotFoundError

from llava.constants import InputError
from llava.eval import run_llava
from llava.model.files import find_file
from tests.conftest import picture

REPOSITORY = "liuhaotian/no-such-llava"


def failing(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        logging.getLogger("huggingface_hub.utils._http").warning("Retrying in 1s")
        raise error

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fail)


def test_a_hub_out_of_reach_is_one_line(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(InputError, match=r"the hub cannot be reached.*no-such-llava.*give the folder"):
        find_file(REPOSITORY, "config.json")  # offline, as all tests are
    failing(monkeypatch, LocalEntryNotFoundError("no connection"))
    with pytest.raises(InputError, match="the hub cannot be reached"):
        find_file(REPOSITORY, "config.json")
    assert caplog.messages == []
    assert logging.getLogger("huggingface_hub").level != logging.ERROR


def test_the_command_says_so_too(command, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    picture(9, 9).save(tmp_path / "photo.png")
    words = ["--model-path", REPOSITORY, "--query", "what?", "--image-file", tmp_path / "photo.png"]
    code, out, err = command(run_llava.main, *words)
    assert (code, out) == (2, "")
    assert "the hub cannot be reached" in err
    assert err.count("\n") == 1


def test_what_a_repository_lacks_is_no_fault(tmp_path, monkeypatch):
    failing(monkeypatch, EntryNotFoundError("no such file"))
    assert find_file(REPOSITORY, "tokenizer.model") is None
    # Offline, what is not in the cache of a repository that is there counts as lacking.
    snapshot = tmp_path / "models--liuhaotian--no-such-llava" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    reference = tmp_path / "models--liuhaotian--no-such-llava" / "refs" / "main"
    reference.parent.mkdir()
    reference.write_text("0123")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    failing(monkeypatch, LocalEntryNotFoundError("no connection"))
    assert find_file(REPOSITORY, "tokenizer.model") is None


def test_a_repository_that_there_is_not(monkeypatch):
    answer = httpx.Response(404, request=httpx.Request("GET", "https://huggingface.co"))
    failing(monkeypatch, RepositoryNotFoundError("404", response=answer))
    with pytest.raises(InputError, match="the hub shows no repository 'liuhaotian/no-such-llava'"):
        find_file(REPOSITORY, "config.json")
