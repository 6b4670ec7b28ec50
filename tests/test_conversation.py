"""The templates, to the byte: a changed space is a changed token, and the model has never seen it."""

from copy import deepcopy

import pytest
from PIL import Image

from llava.conversation import Conversation, SeparatorStyle, conv_templates, default_conversation

VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
HUMAN = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)
LLAMA_2 = (
    "[INST] <<SYS>>\nYou are a helpful language and vision assistant. You are able to understand the visual content "
    "that the user provides, and assist the user with a variety of tasks using natural language.\n<</SYS>>\n\n"
)
CHATML = "<|im_start|>system\nAnswer the questions.<|im_end|>"
Q = "<image>\nWhat is shown?"

OPEN = {
    "vicuna_v1": f"{VICUNA} USER: {Q} ASSISTANT:",
    "v1": f"{VICUNA} USER: {Q} ASSISTANT:",
    "llava_v1": f"{HUMAN} USER: {Q} ASSISTANT:",
    "mistral_instruct": f"[INST] {Q} [/INST]",
    "llava_llama_2": f"{LLAMA_2}{Q} [/INST]",
    "chatml_direct": f"{CHATML}<|im_start|>user\n{Q}<|im_end|><|im_start|>assistant\n",
    "mistral_direct": f"{CHATML}<|im_start|>user\n{Q}<|im_end|><|im_start|>assistant\n",
    "plain": f"{Q}\n",
}
TWO_TURNS = {
    "vicuna_v1": f"{VICUNA} USER: {Q} ASSISTANT: A cat.</s>USER: Sure? ASSISTANT:",
    "llava_v1": f"{HUMAN} USER: {Q} ASSISTANT: A cat.</s>USER: Sure? ASSISTANT:",
    "mistral_instruct": f"[INST] {Q} [/INST] A cat. </s>[INST] Sure? [/INST]",
    "llava_llama_2": f"{LLAMA_2}{Q} [/INST] A cat. </s><s>[INST] Sure? [/INST]",
    "chatml_direct": (
        f"{CHATML}<|im_start|>user\n{Q}<|im_end|><|im_start|>assistant\nA cat.<|im_end|>"
        "<|im_start|>user\nSure?<|im_end|><|im_start|>assistant\n"
    ),
}


def said(name: str, *messages: object) -> Conversation:
    conv = conv_templates[name].copy()
    for turn, message in enumerate(messages):
        conv.append_message(conv.roles[turn % 2], message)
    return conv


@pytest.mark.parametrize("name", OPEN)
def test_an_open_turn_is_exact(name: str) -> None:
    assert said(name, Q, None).get_prompt() == OPEN[name]


@pytest.mark.parametrize("name", TWO_TURNS)
def test_two_turns_are_exact(name: str) -> None:
    assert said(name, Q, "A cat.", "Sure?", None).get_prompt() == TWO_TURNS[name]


def test_vicuna_prompt_as_a_plain_string() -> None:
    """Written out in full, with nothing put together by the test."""
    assert said("vicuna_v1", "<image>\nWhat?", None).get_prompt() == (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions. USER: <image>\nWhat? ASSISTANT:"
    )


def test_a_closed_turn_ends_in_the_separator() -> None:
    assert said("vicuna_v1", Q, "A cat.").get_prompt() == f"{VICUNA} USER: {Q} ASSISTANT: A cat.</s>"
    assert said("mistral_instruct", Q, "A cat.").get_prompt() == f"[INST] {Q} [/INST] A cat. </s>"


def test_plain_is_the_image_and_then_the_caption() -> None:
    assert said("plain", "<image>", "A cat.").get_prompt().split() == ["<image>", "A", "cat."]


@pytest.mark.parametrize("name", conv_templates)
def test_templates_start_empty_and_open_turns_end_without_a_space(name: str) -> None:
    """A trailing space would become a word mark of its own in front of the answer."""
    assert not conv_templates[name].messages
    assert not said(name, Q, None).get_prompt().endswith(" ")


@pytest.mark.parametrize("name", conv_templates)
def test_an_image_tuple_reads_as_its_text(name: str) -> None:
    picture = Image.new("RGB", (4, 4))
    assert said(name, (Q, picture, "Pad"), None).get_prompt() == said(name, Q, None).get_prompt()
    assert said(name, (Q, picture, "Pad"), None).dict() == said(name, Q, None).dict()


@pytest.mark.parametrize("duplicate", [Conversation.copy, deepcopy], ids=["copy", "deepcopy"])
def test_copies_are_independent(duplicate: object) -> None:
    first = said("vicuna_v1", Q, None)
    second = duplicate(first)  # type: ignore[operator]
    second.messages[1][1] = "A cat."  # as lmms-eval fills in the answer
    second.append_message("USER", "Sure?")
    assert first.get_prompt() == OPEN["vicuna_v1"]
    assert conv_templates["vicuna_v1"].messages == []
    assert first.sep_style is second.sep_style is SeparatorStyle.TWO


def test_templates_that_derive_from_another_share_no_turns() -> None:
    lists = {id(conv.messages) for conv in conv_templates.values()}
    assert len(lists) == len({id(conv) for conv in conv_templates.values()})


def test_what_callers_read() -> None:
    conv = conv_templates["vicuna_v1"]
    assert default_conversation is conv is conv_templates["default"] is conv_templates["v1"]
    assert conv.roles == ("USER", "ASSISTANT")
    assert (conv.sep_style, conv.sep, conv.sep2, conv.version) == (SeparatorStyle.TWO, " ", "</s>", "v1")
    assert [style.name for style in SeparatorStyle] == ["SINGLE", "TWO", "MPT", "PLAIN", "LLAMA_2"]
