"""The prompt templates of the published LLaVA checkpoints.

The strings are those the checkpoints were trained with; a changed byte changes the tokens. `vicuna_v1` serves
LLaVA-1.5 and LLaVA-NeXT on Vicuna, `mistral_instruct` LLaVA-NeXT on Mistral, `chatml_direct` the 34B model.
"""

import dataclasses
from enum import Enum, auto
from typing import Any

from llava.constants import InputError


class SeparatorStyle(Enum):
    """How turns are glued together."""

    SINGLE = auto()
    TWO = auto()
    MPT = auto()
    PLAIN = auto()
    LLAMA_2 = auto()


@dataclasses.dataclass
class Conversation:
    """A template and the turns said so far; `None` as a message leaves the turn open for the model."""

    system: str
    roles: tuple[str, str]
    messages: list[list[Any]] = dataclasses.field(default_factory=list)
    offset: int = 0
    sep_style: SeparatorStyle = SeparatorStyle.SINGLE
    sep: str = "###"
    sep2: str | None = None
    version: str = "Unknown"
    skip_next: bool = False

    def append_message(self, role: str, message: Any) -> None:
        """Add a turn; `message` is a text, a `(text, image, mode)` tuple, or None for the turn to be generated."""
        self.messages.append([role, message])

    def get_prompt(self) -> str:
        """Render the turns as the text the tokenizer gets."""
        turns = [(role, m[0] if isinstance(m, tuple) else m) for role, m in self.messages]
        return _RENDERERS[self.sep_style](self, turns)

    def copy(self) -> "Conversation":
        """Return an independent conversation with the same turns."""
        return dataclasses.replace(self, messages=[list(turn) for turn in self.messages])

    def dict(self) -> dict[str, Any]:
        """Return the template and its turns as plain data, images left out."""
        turns = [[role, m[0] if isinstance(m, tuple) else m] for role, m in self.messages]
        return {
            "system": self.system,
            "roles": self.roles,
            "messages": turns,
            "offset": self.offset,
            "sep": self.sep,
            "sep2": self.sep2,
        }


Turns = list[tuple[str, str | None]]


def _ends(conv: Conversation) -> tuple[str, str]:
    """The separators after a user's and after the model's turn."""
    return conv.sep, conv.sep if conv.sep2 is None else conv.sep2


def _labelled(conv: Conversation, turns: Turns) -> str:
    ends = _ends(conv)
    said = (f"{r}: {m}{ends[i % 2]}" if m else f"{r}:" for i, (r, m) in enumerate(turns))
    return conv.system + conv.sep + "".join(said)


def _chatml(conv: Conversation, turns: Turns) -> str:
    return conv.system + conv.sep + "".join(f"{r}{m}{conv.sep}" if m else r for r, m in turns)


def _plain(conv: Conversation, turns: Turns) -> str:
    ends = _ends(conv)
    return conv.system + "".join(f"{m}{ends[i % 2]}" if m else "" for i, (_, m) in enumerate(turns))


def _llama_2(conv: Conversation, turns: Turns) -> str:
    system = f"<<SYS>>\n{conv.system}\n<</SYS>>\n\n" if conv.system else ""
    text = ""
    for i, (_, message) in enumerate(turns):
        if not message:
            continue
        said = (
            f"{conv.sep}[INST] {system if i == 0 else ''}{message} [/INST]"
            if i % 2 == 0
            else f" {message} {_ends(conv)[1]}"
        )
        text += said
    # The tokenizer adds the first begin-of-sequence itself.
    return text.removeprefix(conv.sep)


_RENDERERS = {
    SeparatorStyle.SINGLE: _labelled,
    SeparatorStyle.TWO: _labelled,
    SeparatorStyle.MPT: _chatml,
    SeparatorStyle.PLAIN: _plain,
    SeparatorStyle.LLAMA_2: _llama_2,
}


def _assistant(who: str) -> str:
    return (
        f"A chat between a curious {who} and an artificial intelligence assistant. "
        f"The assistant gives helpful, detailed, and polite answers to the {who}'s questions."
    )


conv_vicuna_v1 = Conversation(
    system=_assistant("user"),
    roles=("USER", "ASSISTANT"),
    sep_style=SeparatorStyle.TWO,
    sep=" ",
    sep2="</s>",
    version="v1",
)
conv_llava_v1 = dataclasses.replace(conv_vicuna_v1, system=_assistant("human"), messages=[])
conv_llava_v0 = Conversation(system=_assistant("human"), roles=("Human", "Assistant"), sep="###")
conv_llava_plain = Conversation(system="", roles=("", ""), sep_style=SeparatorStyle.PLAIN, sep="\n", version="plain")
conv_llava_llama_2 = Conversation(
    system=(
        "You are a helpful language and vision assistant. "
        "You are able to understand the visual content that the user provides, "
        "and assist the user with a variety of tasks using natural language."
    ),
    roles=("USER", "ASSISTANT"),
    sep_style=SeparatorStyle.LLAMA_2,
    sep="<s>",
    sep2="</s>",
    version="llama_v2",
)
conv_mistral_instruct = dataclasses.replace(conv_llava_llama_2, system="", messages=[], sep="")
conv_chatml_direct = Conversation(
    system="<|im_start|>system\nAnswer the questions.",
    roles=("<|im_start|>user\n", "<|im_start|>assistant\n"),
    sep_style=SeparatorStyle.MPT,
    sep="<|im_end|>",
    version="mpt",
)

default_conversation = conv_vicuna_v1
conv_templates = {
    "default": conv_vicuna_v1,
    "v1": conv_vicuna_v1,
    "vicuna_v1": conv_vicuna_v1,
    "llava_v1": conv_llava_v1,
    "llava_v0": conv_llava_v0,
    "plain": conv_llava_plain,
    "v0_plain": conv_llava_plain,
    "llava_llama_2": conv_llava_llama_2,
    "mistral_instruct": conv_mistral_instruct,
    "chatml_direct": conv_chatml_direct,
    "mistral_direct": conv_chatml_direct,
}


def check_template(name: str | None) -> None:
    """Refuse a name no template has; None stands for the checkpoint's own.

    Raises:
        InputError: there is no such template.
    """
    if name is not None and name not in conv_templates:
        raise InputError(f"unknown conversation template {name!r}; choose from {', '.join(sorted(conv_templates))}")


def template_name(config: Any) -> str:
    """Return the key of the template a checkpoint was trained with, read from its config and never from its name."""
    if "mistral" in config.model_type:
        return "mistral_instruct"
    # LLaVA-NeXT-34B stands on Yi, whose width no Vicuna has.
    return "chatml_direct" if config.hidden_size == 7168 else "vicuna_v1"
