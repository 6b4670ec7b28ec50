"""The line a run begins with: where, how, and where the ratio came from."""

import json
import shutil
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llava.compress import get
from llava.eval.start import ratio_source, start_line
from llava.model.builder import choose_method, read_config

LINE_101 = "ratio from line 101 of llava/model/llava_arch.py"
CONFIG = "ratio from the checkpoint's config.json"


@pytest.fixture
def source(checkpoint: Callable[..., Path], tmp_path: Path) -> Callable[..., str]:
    def found(method: str | None = None, ratio: str | None = None, **config: Any) -> str:
        file = tmp_path / "config.json"
        file.write_text(json.dumps(json.loads((checkpoint() / "config.json").read_text()) | config))
        args = Namespace(model_path=str(tmp_path), method=method, retention_ratio=ratio)
        return ratio_source(args, choose_method(read_config(str(tmp_path)), method, ratio))

    return found


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, LINE_101),
        ({"method": "uniform"}, LINE_101),
        ({"ratio": "0.5"}, "ratio from --retention-ratio"),
        ({"method": "uniform(retention_ratio=0.1)", "ratio": "0.5"}, "ratio from --method"),
        ({"retention_ratio": 0.3}, CONFIG),
        ({"retention_ratio": 0.3, "ratio": "0.5"}, "ratio from --retention-ratio"),
        ({"method": "none"}, "which no retention ratio applies to"),
        ({"method": "ficoco_v(r=3)"}, "which no retention ratio applies to"),
    ],
)
def test_where_the_ratio_came_from(source, monkeypatch, given, said):
    assert source(**given) == said
    monkeypatch.setenv("LLAVA_RETENTION_RATIO", "0.7")
    assert source(**given) == said.replace(LINE_101, "ratio from LLAVA_RETENTION_RATIO")


def test_the_methods_of_the_config_carries_a_ratio_too(checkpoint, tmp_path):
    shutil.copy(checkpoint() / "config.json", tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"method": "uniform(retention_ratio=0.1)"}))
    for ratio in (None, "0.5"):
        args = Namespace(model_path=str(tmp_path), method=None, retention_ratio=ratio)
        method = choose_method(read_config(str(tmp_path)), None, ratio)
        assert method.ratio == 0.1
        assert ratio_source(args, method) == CONFIG


@pytest.mark.parametrize(
    ("visible", "said"), [("", ""), ("-1", ""), ("0,1", "CUDA_VISIBLE_DEVICES=0,1 asks for a GPU")]
)
def test_a_gpu_that_is_not_there_is_said(loaded, checkpoint, monkeypatch, visible, said):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    args = Namespace(model_path=str(checkpoint()), method=None, retention_ratio=None)
    line = start_line(args, loaded().model)
    assert line.count("\n") == 1
    assert line.startswith(
        "running on cpu in float32 with sdpa attention: globalcom2(retention_ratio=0.25), ratio from"
    )
    assert said in line if said else "CUDA" not in line
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert "CUDA" not in start_line(args, loaded().model)
    assert "running on cpu by 3 processes in" in start_line(args, loaded().model, 3)


def test_a_ratio_without_effect_is_not_said(loaded, checkpoint, monkeypatch):
    args = Namespace(model_path=str(checkpoint()), method="none", retention_ratio="1.0")
    model = loaded().model
    monkeypatch.setattr(model, "_method", get("none", retention_ratio=1.0))
    assert start_line(args, model).endswith("attention: none(), which no retention ratio applies to\n")
