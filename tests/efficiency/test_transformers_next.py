"""transformers' model around ours shares its tensors; that both say the same is tests/model/test_parity.py."""

from collections.abc import Callable

import pytest
import torch

from llava.constants import InputError
from llava.efficiency.transformers_next import around, their_name
from tests.conftest import Loaded


def test_no_tensor_is_copied(loaded: Callable[..., Loaded]) -> None:
    model = loaded().model
    theirs = around(model, 3)
    own = {their_name(name): tensor for name, tensor in model.state_dict().items()}
    assert {name: t.data_ptr() for name, t in theirs.state_dict().items()} == {n: t.data_ptr() for n, t in own.items()}
    assert not [name for name, tensor in (*theirs.named_parameters(), *theirs.named_buffers()) if tensor.is_meta]
    assert not theirs.training
    assert {p.dtype for p in theirs.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("version", "key", "value"),
    [
        ("v1.5", "image_aspect_ratio", "pad"),
        ("v1.6-vicuna", "mm_patch_merge_type", "spatial"),
        ("v1.6-vicuna", "mm_projector_type", "linear"),
    ],
)
def test_other_models_are_refused(
    loaded: Callable[..., Loaded], monkeypatch: pytest.MonkeyPatch, version: str, key: str, value: str
) -> None:
    model = loaded(version).model
    monkeypatch.setattr(model.config, key, value)
    with pytest.raises(InputError, match=f"{key} .* this model '{value}'"):
        around(model, 3)
