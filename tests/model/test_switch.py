"""`model.method` takes methods, names and calls; what only looks like it is refused and never ignored."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from llava.compress import get
from llava.constants import InputError
from llava.model.llava_arch import GlobalCom2, LlavaMetaForCausalLM, LlavaMetaModel
from llava.model.switch import LOOKALIKES
from tests.conftest import Loaded


@pytest.fixture
def model(loaded: Callable[..., Loaded], monkeypatch: pytest.MonkeyPatch) -> Any:
    found = loaded("v1.5").model
    monkeypatch.setattr(found, "method", found.method)
    return found


@pytest.mark.parametrize(
    "spec", ["uniform", "fastv(layer=1)", "globalcom2(profile='released', retention_ratio=0.5)", " none "]
)
def test_a_name_or_a_call_is_read_as_everywhere(model: Any, spec: str) -> None:
    model.method = spec
    assert model.method == get(spec)
    model.method = chosen = get("random(seed=3)")
    assert model.method is chosen


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("nosuch", "unknown method 'nosuch'"),
        ("uniform(gamma=1)", "no field gamma"),
        ("uniform(retention_ratio=1.5)", r"\(0, 1\]"),
        ("uniform(", "cannot read method"),
        ("", "cannot read method"),
        (None, "got None; 'none' compresses nothing"),
        (0.1, r"got 0\.1"),
        (GlobalCom2, "got <class"),
        ({"method": "uniform"}, "got {'method'"),
    ],
)
def test_anything_else_is_refused(model: Any, value: Any, said: str) -> None:
    before = model.method
    with pytest.raises(InputError, match=said):
        model.method = value
    assert model.method is before


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("retention_ratio", 0.1, 'write model.method = "uniform(retention_ratio=0.1)"'),
        ("ratio", 0.1, 'write model.method = "uniform(retention_ratio=0.1)"'),
        ("keep_ratio", "0.5", "write model.method = \"uniform(retention_ratio='0.5')\""),
        ("profile", "released", "write model.method = \"uniform(profile='released')\""),
        ("alpha", 0.3, 'write model.method = "globalcom2(alpha=0.3)"'),
        ("compressor", get("fastv(layer=1)"), "write model.method = 'fastv(layer=1)'"),
        ("compression_method", "tome", "write model.method = 'tome'"),
    ],
)
def test_lookalikes_say_what_to_do(model: Any, name: str, value: Any, said: str) -> None:
    model.method = "uniform(retention_ratio=0.5)"
    with pytest.raises(InputError) as refused:
        setattr(model, name, value)
    assert str(refused.value) == f"setting {name} on a model changes nothing; {said}"
    assert str(model.method) == "uniform(retention_ratio=0.5)"


def test_what_is_not_compressed_is_not_advised_a_ratio(model: Any) -> None:
    model.method = "none"
    with pytest.raises(InputError, match=r"globalcom2\(retention_ratio=0\.1\)"):
        model.retention_ratio = 0.1


@pytest.mark.parametrize("name", LOOKALIKES)
def test_every_lookalike_is_refused_and_not_there(model: Any, name: str) -> None:
    with pytest.raises(InputError, match=f"setting {name} on a model"):
        setattr(model, name, 0.1)
    assert not hasattr(model, name)
    assert name not in vars(model)
    for base in type(model).__mro__:  # nothing of transformers' or torch's is hidden
        assert name not in vars(base) or base.__module__ == "llava.model.switch"


@pytest.mark.parametrize("name", ["method", "retention_ratio", "profile", "compressor"])
def test_the_inner_model_has_no_switch(model: Any, name: str) -> None:
    with pytest.raises(InputError, match=r"the whole model's: model\.method = …"):
        setattr(model.get_model(), name, "uniform")
    assert not hasattr(model.get_model(), name)


def test_other_attributes_are_as_in_any_module() -> None:
    class Inner(LlavaMetaModel, nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            nn.Module.__init__(self)

    class Own(LlavaMetaForCausalLM, nn.Module):
        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.model, self.scale, self.rest = Inner(), nn.Parameter(torch.ones(1)), [3]

    own = Own()
    assert "__setattr__" not in {
        name for base in Own.__mro__ if base.__module__.startswith("llava") for name in vars(base)
    }
    assert [name for name, _ in own.named_parameters()] == ["scale"]
    assert [name for name, _ in own.named_children()] == ["model"]
    assert own.rest == [3]
    assert str(own.method) == "globalcom2()"
    own.method = "none"
    assert (str(own.method), str(Own().method)) == ("none()", "globalcom2()")
    assert set(own.state_dict()) == {"scale"}
    with pytest.raises(AttributeError, match="no attribute 'retention_ratio'"):
        _ = own.retention_ratio
