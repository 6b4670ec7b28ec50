"""What is left out or fixed for speed changes no token: logits of the last position, static cache, compiled layers."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import CompileConfig, StaticCache

from llava.compress import available
from llava.constants import IMAGE_TOKEN_INDEX
from llava.mm_utils import process_images
from llava.model.builder import load_pretrained_model
from tests.conftest import Loaded, picture
from tests.methods import fitted

SIZES = [(120, 100), (60, 200)]
IDS = torch.tensor([[1, 9, IMAGE_TOKEN_INDEX, 5, 6, 7, 8], [1, 10, IMAGE_TOKEN_INDEX, 5, 6, 7, 11]])
MASK = torch.tensor([[1] * 7, [1] * 6 + [0]])
GREEDY = {"do_sample": False, "max_new_tokens": 6, "attention_mask": MASK, "pad_token_id": 0}
every_method = pytest.mark.parametrize("name", available())


@pytest.fixture
def ask(loaded: Callable[[], Loaded], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Answer about two pictures of different grids, in rows of different lengths."""
    _, model, processor, _ = loaded()
    views = [process_images([picture(*size)], processor, model.config)[0] for size in SIZES]

    def answer(name: str, own: Any = model, **given: Any) -> Any:
        monkeypatch.setattr(own, "method", fitted(name, 0.5))
        return own.generate(IDS, images=views, image_sizes=SIZES, **GREEDY, **given)

    return answer


@every_method
def test_logits_are_made_for_the_last_position_only(
    ask: Callable[..., Any], loaded: Callable[[], Loaded], name: str
) -> None:
    shapes: list[tuple[int, ...]] = []
    hook = loaded().model.lm_head.register_forward_hook(lambda module, args, out: shapes.append(tuple(out.shape)))
    ask(name)
    hook.remove()
    assert set(shapes) == {(2, 1, 384)}


@every_method
def test_a_static_cache_changes_no_token(ask: Callable[..., Any], name: str) -> None:
    out = ask(name, cache_implementation="static", return_dict_in_generate=True)
    assert type(out.past_key_values) is StaticCache
    assert torch.equal(out.sequences, ask(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["globalcom2", "fastv"])
def test_compiled_layers_change_no_token(ask: Callable[..., Any], checkpoint: Callable[[], Any], name: str) -> None:
    """Of a model of its own, as compiling cannot be undone; on this device transformers must be told to compile."""
    _, model, _, _ = load_pretrained_model(str(checkpoint()), device="cpu")
    plain = ask(name, model)
    model.get_vision_tower().compile_layers()
    assert all(layer._compiled_call_impl for layer in model.get_vision_tower().vision_tower.encoder.layers[:3])
    compiled = CompileConfig(mode="default")
    compiled._compile_all_devices = True
    assert torch.equal(ask(name, model, cache_implementation="static", compile_config=compiled), plain)
