"""Where answers end if the caller does not say: as the checkpoint does, else at EOS or the model's window."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation import GenerationMixin

from llava.constants import IMAGE_TOKEN_INDEX, InputError, PromptTooLong
from llava.mm_utils import process_images
from llava.model.language_model.prefix import SharedPrefix
from tests.conftest import Loaded, picture
from tests.model.test_generate import quiet

# The fixture `model` gives every language-model class; 27 is more than transformers' own 20.
NEW = 27
SIZES = [(160, 120), (300, 200)]
IDS = torch.tensor([[1, 9, IMAGE_TOKEN_INDEX, 5, 6, 7, 8], [0, 0, 1, 10, IMAGE_TOKEN_INDEX, 5, 6]])
MASK = torch.tensor([[1] * 7, [0, 0, 1, 1, 1, 1, 1]])
ENDLESS = {"do_sample": False, "eos_token_id": None}


@pytest.fixture
def ask(model: Any) -> Callable[..., Tensor]:
    """Answer a padded batch about two pictures."""
    views = [process_images([picture(*size)], model.processor, model.config)[0] for size in SIZES]
    images = torch.stack(views) if views[0].ndim == 3 else views

    def answer(**given: Any) -> Any:
        given = {"images": images, "image_sizes": SIZES, "attention_mask": MASK} | given
        return model.generate(IDS, **(given if "generation_config" in given else ENDLESS | given))

    answer.spliced = model.splice_images(IDS, MASK, None, images, SIZES, "left")  # type: ignore[attr-defined]
    return answer


@pytest.fixture
def prompt(ask: Any) -> int:
    """Tokens of the longest row, its image included."""
    return ask.spliced.inputs_embeds.shape[1]


def says(monkeypatch: pytest.MonkeyPatch, model: Any, **settings: int | None) -> None:
    """Let the checkpoint's generation config say so."""
    for name in ("max_length", "max_new_tokens"):
        monkeypatch.setattr(model.generation_config, name, settings.get(name))


def test_the_checkpoints_own_is_kept(model: Any) -> None:
    assert model.generation_config.max_length == 4096


@pytest.mark.parametrize("beams", [1, 3])
def test_the_checkpoints_max_length(
    model: Any, ask: Any, prompt: int, monkeypatch: pytest.MonkeyPatch, beams: int
) -> None:
    says(monkeypatch, model, max_length=prompt + NEW)
    with quiet():
        out = ask(num_beams=beams)
    assert out.shape == (2, NEW)
    assert torch.equal(out, ask(num_beams=beams, max_new_tokens=NEW))
    # That is how transformers counts embeddings.
    given = {"inputs_embeds": ask.spliced.inputs_embeds, "attention_mask": ask.spliced.attention_mask}
    assert torch.equal(out, GenerationMixin.generate(model, **given, **ENDLESS, num_beams=beams))


@pytest.mark.parametrize("beams", [1, 2])
def test_without_one_the_window(model: Any, ask: Any, prompt: int, monkeypatch: pytest.MonkeyPatch, beams: int) -> None:
    says(monkeypatch, model)
    monkeypatch.setattr(model.config, "max_position_embeddings", prompt + NEW)
    with quiet():
        out = ask(num_beams=beams)
    assert out.shape == (2, NEW)
    assert torch.equal(out, ask(num_beams=beams, max_new_tokens=NEW))


def test_eos_ends_an_answer_before_that(model: Any, ask: Any, prompt: int, monkeypatch: pytest.MonkeyPatch) -> None:
    says(monkeypatch, model, max_length=prompt + NEW)
    long = ask()
    end = int(long[0, 9])
    out = ask(eos_token_id=end, pad_token_id=0)
    for row, whole in zip(out.tolist(), long.tolist(), strict=True):
        until = whole.index(end) + 1 if end in whole else NEW
        assert row[:until] == whole[:until]
        assert not any(row[until:])


def test_who_is_heard_first(model: Any, ask: Any, prompt: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The caller's argument, the caller's generation config, the checkpoint's; new tokens before a whole length."""
    says(monkeypatch, model, max_length=prompt + 9)
    config = GenerationConfig(do_sample=False, eos_token_id=383)  # None would be the model's
    with quiet():
        assert ask(generation_config=config).shape[1] == 9
        assert ask(max_length=prompt + 4).shape[1] == 4
        assert ask(max_new_tokens=3).shape[1] == 3
        config.max_new_tokens = 5
        assert ask(generation_config=config).shape[1] == 5
        config.max_new_tokens, config.max_length = None, prompt + 6
        assert ask(generation_config=config).shape[1] == 6
    assert config.max_length == prompt + 6
    assert ask(generation_config=config, max_new_tokens=2).shape[1] == 2
    says(monkeypatch, model, max_length=prompt + 9, max_new_tokens=7)
    with quiet():
        assert ask().shape[1] == 7
        assert ask(max_new_tokens=3).shape[1] == 3
    config.max_new_tokens, config.max_length = 4, None
    assert ask(generation_config=config).shape[1] == 4
    assert (model.generation_config.max_length, model.generation_config.max_new_tokens) == (prompt + 9, 7)


def test_text_alone(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    says(monkeypatch, model, max_length=5 + NEW)
    assert model.generate(torch.tensor([[1, 5, 6, 7, 8]]), **ENDLESS).shape == (1, NEW)


def test_after_a_prefix(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is cached counts, and so does padding, as in any batch of transformers."""
    prefix = SharedPrefix.empty(model, 1).extend(model, torch.tensor([[1, 5, 6, 7, 8, 9]]))
    rest = torch.tensor([[30, 31, 32], [0, 30, 31]])
    given = {"attention_mask": torch.tensor([[1, 1, 1], [0, 1, 1]]), **ENDLESS}
    says(monkeypatch, model, max_length=6 + 3 + NEW)
    with quiet():
        out = model.generate_after(prefix, rest, **given)
        assert torch.equal(out, model.generate_after(prefix, rest, max_new_tokens=NEW, **given))
    assert out.shape == (2, NEW)
    says(monkeypatch, model)
    monkeypatch.setattr(model.config, "max_position_embeddings", 6 + 3 + 21)
    assert model.generate_after(prefix, rest, **given).shape == (2, 21)
    monkeypatch.setattr(model.config, "max_position_embeddings", 6 + 3)
    with pytest.raises(PromptTooLong, match="9 tokens long"):
        model.generate_after(prefix, rest, **given)


def test_no_room_for_an_answer(model: Any, ask: Any, prompt: int, monkeypatch: pytest.MonkeyPatch) -> None:
    says(monkeypatch, model, max_length=prompt)
    said = rf"{prompt} tokens long with its images, which leaves no room for an answer within {prompt};.*max_new_tokens"
    with pytest.raises(PromptTooLong, match=said):
        ask()
    with pytest.raises(InputError, match="no room for an answer within 8"):
        ask(max_length=8)
    assert ask(max_new_tokens=2).shape[1] == 2
    says(monkeypatch, model)
    monkeypatch.setattr(model.config, "max_position_embeddings", prompt)
    with pytest.raises(PromptTooLong, match=said):
        ask()


def test_a_streamed_prompt_of_a_fresh_checkpoint(loaded: Callable[[], Loaded]) -> None:
    """Upstream's own call: nothing but ids and an image."""
    _, model, processor, _ = loaded()
    image = picture(90, 90)
    lengths: list[int] = []

    def stop(ids: Tensor, scores: Any, **more: Any) -> bool:
        lengths.append(ids.shape[1])
        return ids.shape[1] == 40

    views = process_images([image], processor, model.config)
    out = model.generate(IDS[:1], images=views, image_sizes=[image.size], stopping_criteria=[stop], **ENDLESS)
    assert out.shape == (1, 40)
