"""From prompts to ids: sentencepiece itself is the reference, as the checkpoints were trained on its ids."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch

from llava.constants import IMAGE_TOKEN_INDEX
from llava.conversation import conv_templates
from llava.mm_utils import tokenizer_image_token
from llava.model.builder import load_tokenizer

BOS, IMAGE = 1, IMAGE_TOKEN_INDEX
SPECIAL = ("<s>", "</s>", "<unk>")
VICUNA_IDS = [
    *(1, 319, 13563, 1546, 263, 12758, 1404, 322, 385, 23116, 21082, 20255, 29889, 450, 20255, 4076, 8444, 29892),
    *(13173, 29892, 322, 1248, 568, 6089, 304, 278, 1404, 29915, 29879, 5155, 29889, 3148, 1001, 29901, 29871),
    *(-200, 29871, 13, 5618),
]
TEXTS = [
    "A chat between a curious user and an artificial intelligence assistant.",
    "\nWhat is shown in this image?",
    "\nWhat's this: 3 cats, 12.5 kg?\nAnswer the question using a single word or phrase. ASSISTANT:",
    "USER: ",
    "",
    "x",
    "two  spaces and a tab\t.",
    "trailing space ",
    "ünïcödé — 请直接回答选项字母。 🙂",
    "[INST] what [/INST]",
    "A. left\nB. right\n\nC. no",
]


@pytest.fixture(scope="module")
def tokenizer(checkpoint: Callable[[str], Path]) -> Any:
    return load_tokenizer(str(checkpoint("v1.6-vicuna")))


@pytest.fixture(scope="module")
def pieces(checkpoint: Callable[[str], Path]) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(checkpoint("v1.6-vicuna") / "tokenizer.model"))


@pytest.mark.parametrize("settings", ["absent", "v1.5", "v1.6"])
def test_settings_files_as_published(
    settings: str, pieces: Any, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """A repository of 2023 writes its special tokens as objects and its padding as null, or has no settings at all."""
    shutil.copy(checkpoint("v1.6-vicuna") / "tokenizer.model", tmp_path)
    special = {"__type": "AddedToken", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    tokens = {
        name: {**special, "content": content} for name, content in zip(("bos", "eos", "unk"), SPECIAL, strict=True)
    }
    if settings == "v1.5":
        given: dict[str, Any] = {f"{name}_token": token for name, token in tokens.items()}
        given |= {"pad_token": None, "model_max_length": 2048, "sp_model_kwargs": {}}
    else:
        given = dict(zip(("bos_token", "eos_token", "unk_token"), SPECIAL, strict=True))
        kinds = {
            str(i): special | {"content": token, "special": True} for i, token in enumerate(("<unk>", "<s>", "</s>"))
        }
        given |= {
            "pad_token": "<unk>",
            "added_tokens_decoder": kinds,
            "sp_model_kwargs": {},
            "spaces_between_special_tokens": False,
        }
    given |= {"add_bos_token": True, "add_eos_token": False, "legacy": False, "padding_side": "right"}
    given |= {"clean_up_tokenization_spaces": False, "tokenizer_class": "LlamaTokenizer"}
    if settings != "absent":
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(given))
        (tmp_path / "special_tokens_map.json").write_text(json.dumps({"bos_token": "<s>", "pad_token": "<unk>"}))
    tokenizer = load_tokenizer(str(tmp_path))
    for text in TEXTS:
        assert tokenizer(text).input_ids == [BOS, *pieces.encode(text)]
    assert tokenizer.pad_token_id == 0


@pytest.mark.parametrize("text", TEXTS)
def test_ids_are_sentencepiece_ids(text: str, tokenizer: Any, pieces: Any) -> None:
    assert tokenizer(text).input_ids == [BOS, *pieces.encode(text)]


def test_special_ids_and_padding(tokenizer: Any) -> None:
    assert (tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert tokenizer.pad_token_id == 0
    assert tokenizer("a</s>").input_ids[-1] == 2, "the separator between turns is one id"


@pytest.mark.parametrize("text", [text for text in TEXTS if text == text.strip()])
def test_decoding_gives_the_text_back(text: str, tokenizer: Any) -> None:
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text


@pytest.mark.parametrize(
    "chunks",
    [
        ["just text"],
        [""],
        ["", "\nWhat is shown?"],
        ["USER: ", "\nWhat is shown? ASSISTANT:"],
        ["USER: ", "\n", "\nWhich image shows a cat?"],
        ["", "", "", ""],
        ["Describe ", ""],
        ["USER: Image 1: ", " Image 2: ", "  what differs? ASSISTANT:"],
    ],
    ids=["text", "empty", "first", "one", "two", "three-images-only", "last", "space-after-image"],
)
def test_every_chunk_keeps_its_own_word_mark(chunks: list[str], tokenizer: Any, pieces: Any) -> None:
    expected = [BOS, *pieces.encode(chunks[0])]
    for chunk in chunks[1:]:
        expected += [IMAGE, *pieces.encode(chunk)]
    prompt = "<image>".join(chunks)
    assert tokenizer_image_token(prompt, tokenizer) == expected
    tensor = tokenizer_image_token(prompt, tokenizer, return_tensors="pt")
    assert isinstance(tensor, torch.Tensor)
    assert (tensor.dtype, tensor.tolist()) == (torch.long, expected)


def test_the_bare_word_mark_on_both_sides_of_an_image(tokenizer: Any, pieces: Any) -> None:
    """What AutoTokenizer's choice for `model_type: llava` gets wrong: it leaves these marks out."""
    mark = pieces.piece_to_id("▁")
    assert mark != pieces.unk_id()
    ids = tokenizer_image_token("USER: <image>\nWhat", tokenizer)
    at = ids.index(IMAGE)
    assert ids[at - 1] == ids[at + 1] == mark
    assert ids[at + 2] == pieces.piece_to_id("<0x0A>")
    assert ids.count(BOS) == 1


def test_another_placeholder_id(tokenizer: Any) -> None:
    usual, other = (tokenizer_image_token("a<image>b", tokenizer, index) for index in (IMAGE, -7))
    assert [-7 if i == IMAGE else i for i in usual] == other


@pytest.mark.parametrize("kind", ["np", "tf", "list"])
def test_other_return_types_are_refused(kind: str, tokenizer: Any) -> None:
    with pytest.raises(ValueError, match=kind):
        tokenizer_image_token("a", tokenizer, return_tensors=kind)


def test_without_a_begin_of_sequence_nothing_is_dropped(tokenizer: Any) -> None:
    class Bare:
        """A tokenizer that adds no special ids (Qwen's kind)."""

        bos_token_id = None

        def __call__(self, text: str) -> Any:
            return type("Encoding", (), {"input_ids": list(text.encode())})

    assert tokenizer_image_token("ab<image>c", Bare()) == [97, 98, IMAGE, 99]
    assert tokenizer_image_token("<image>c", Bare()) == [IMAGE, 99]


@pytest.mark.checkpoint
@pytest.mark.skipif("LLAVA_VICUNA_TOKENIZER" not in os.environ, reason="names a folder with Vicuna's tokenizer.model")
def test_vicuna_ids() -> None:
    tokenizer = load_tokenizer(os.environ["LLAVA_VICUNA_TOKENIZER"])
    conv = conv_templates["vicuna_v1"].copy()
    conv.append_message(conv.roles[0], "<image>\nWhat is shown?")
    conv.append_message(conv.roles[1], None)
    assert tokenizer_image_token(conv.get_prompt(), tokenizer)[: len(VICUNA_IDS)] == VICUNA_IDS
