"""`generate` and `forward` with images: a batch equals its rows, cached equals uncached, errors name both numbers."""

import logging
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteriaList, TextIteratorStreamer, TextStreamer

from llava.anyres import AnyResGrid
from llava.compress import get
from llava.compress.base import Views
from llava.compress.trace import Trace
from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX, InputError
from llava.mm_utils import KeywordsStoppingCriteria, process_images
from llava.model.builder import load_pretrained_model
from llava.model.miniature import SIDE, TILE
from tests.conftest import Loaded, picture
from tests.methods import MOVED, fitted

IMG, EOS, N = IMAGE_TOKEN_INDEX, 2, SIDE**2
GREEDY = {"do_sample": False, "max_new_tokens": 10}
METHODS = ["globalcom2(retention_ratio=0.25)", "none"]
Size = tuple[int, int]


@pytest.fixture
def model(loaded: Callable[..., Loaded]) -> Any:
    return loaded().model


@pytest.fixture
def use(model: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """Give the shared model a method until the end of the test."""

    def choose(spec: str) -> Any:
        monkeypatch.setattr(model, "method", get(spec))
        return model

    return choose


@pytest.fixture
def pixels(loaded: Callable[..., Loaded]) -> Callable[..., list[Tensor]]:
    """Views of pictures of the given sizes, as `process_images` makes them."""
    processor, config = loaded().processor, loaded().model.config

    def make(*sizes: Size) -> list[Tensor]:
        return [process_images([picture(*size)], processor, config)[0] for size in sizes]

    return make


def prompt(length: int, *images_at: int, seed: int = 0) -> Tensor:
    """Random ids `[length]` with placeholders at the given places."""
    ids = torch.randint(4, 384, (length,), generator=torch.Generator().manual_seed(1000 * seed + length))
    ids[0] = 1
    ids[list(images_at)] = IMG
    return ids


# Prompts of different lengths: one image, none, two of different grids, an image at the very end, one hair-thin.
ROWS = [prompt(9, 3), prompt(14), prompt(20, 2, 11), prompt(6, 5), prompt(12, 1)]
SIZES: list[list[Size]] = [[(300, 200)], [], [(90, 400), (120, 60)], [(250, 250)], [(1000, 10)]]
FLAT = [size for sizes in SIZES for size in sizes]


def pad(rows: list[Tensor], side: str) -> dict[str, Tensor]:
    def fill(parts: list[Tensor]) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence(parts, batch_first=True, padding_value=0, padding_side=side)

    return {"input_ids": fill(rows), "attention_mask": fill([torch.ones_like(row) for row in rows])}


def trim(row: Tensor) -> list[int]:
    """The answer without the padding behind its end."""
    ids = row.tolist()
    return ids[: ids.index(EOS) + 1] if EOS in ids else ids


def alone(model: Any, pixels: Any, **settings: Any) -> list[list[int]]:
    """The answers of all rows, each asked on its own."""
    answers = []
    for row, sizes in zip(ROWS, SIZES, strict=True):
        out = model.generate(row[None], images=pixels(*sizes) or None, image_sizes=sizes or None, **settings)
        answers += [trim(ids) for ids in out]
    return answers


# --- the output ---


@pytest.mark.parametrize("spec", METHODS)
def test_new_tokens_only(use: Any, pixels: Any, spec: str) -> None:
    model = use(spec)
    images, sizes, ids = pixels((300, 200)), [(300, 200)], ROWS[0][None]
    out = model.generate(ids, images=images, image_sizes=sizes, **GREEDY, min_new_tokens=10)
    assert out.shape == (1, 10)
    with torch.no_grad():
        logits = model(input_ids=ids, images=images, image_sizes=sizes).logits
    best = logits[0, -1].topk(2).indices.tolist()
    assert out[0, 0] == best[best[0] == EOS]  # min_new_tokens forbids the end


def test_input_ids_is_another_name_of_inputs(use: Any, pixels: Any) -> None:
    model = use(METHODS[0])
    given = {"images": pixels((300, 200)), "image_sizes": [(300, 200)], **GREEDY}
    first = model.generate(ROWS[0][None], **given)
    assert torch.equal(first, model.generate(inputs=ROWS[0][None], **given))
    assert torch.equal(first, model.generate(input_ids=ROWS[0][None], **given))
    assert torch.equal(first, model.generate(ROWS[0][None], given.pop("images"), given.pop("image_sizes"), **given))


def test_position_ids_of_the_prompt_are_of_no_use(use: Any, pixels: Any) -> None:
    # They count placeholders, not image tokens; the positions follow from the spliced sequence.
    model, given = use(METHODS[0]), {"images": pixels((300, 200)), "image_sizes": [(300, 200)], **GREEDY}
    out = model.generate(ROWS[0][None], **given, position_ids=torch.arange(9)[None])
    assert torch.equal(out, model.generate(ROWS[0][None], **given))


def test_text_alone_equals_the_language_model(use: Any) -> None:
    model = use(METHODS[0])
    ids = ROWS[1][None]
    for _ in range(8):
        with torch.no_grad():
            ids = torch.cat((ids, model(input_ids=ids).logits[:, -1:].argmax(-1)), dim=1)
    assert model.generate(ROWS[1][None], do_sample=False, max_new_tokens=8)[0].tolist() == trim(ids[0, 14:])


@pytest.mark.parametrize("empty", [[], ()])
def test_no_images_may_be_said_with_an_empty_list(use: Any, empty: Any) -> None:
    model = use(METHODS[0])
    expected = model.generate(ROWS[1][None], **GREEDY)
    assert torch.equal(model.generate(ROWS[1][None], images=empty, image_sizes=empty, **GREEDY), expected)


def test_the_answer_depends_on_image_and_method(use: Any, pixels: Any) -> None:
    # Without this the comparisons below would show little.
    answers = {tuple(answer) for spec in METHODS for answer in alone(use(spec), pixels, **GREEDY)}
    assert len(answers) >= 8


# --- batches ---


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("spec", METHODS)
def test_a_batch_equals_its_rows(use: Any, pixels: Any, spec: str, side: str) -> None:
    model = use(spec)
    out = model.generate(**pad(ROWS, side), images=pixels(*FLAT), image_sizes=FLAT, **GREEDY)
    assert [trim(row) for row in out] == alone(model, pixels, **GREEDY)


@pytest.mark.parametrize("version", ["v1.5", "v1.6-mistral"])
def test_batches_on_the_other_checkpoints(loaded: Any, monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    model, processor = loaded(version).model, loaded(version).processor
    monkeypatch.setattr(model, "method", get(METHODS[0]))

    def make(*sizes: Size) -> list[Tensor]:
        return [process_images([picture(*size)], processor, model.config)[0] for size in sizes]

    out = model.generate(**pad(ROWS, "right"), images=make(*FLAT), image_sizes=FLAT, **GREEDY)
    assert [trim(row) for row in out] == alone(model, make, **GREEDY)


@pytest.mark.parametrize("spec", METHODS)
def test_a_batch_of_texts_alone_equals_its_rows(use: Any, spec: str) -> None:
    model, rows = use(spec), [prompt(9), prompt(14), prompt(3)]
    out = model.generate(**pad(rows, "right"), **GREEDY)
    assert [trim(row) for row in out] == [trim(model.generate(row[None], **GREEDY)[0]) for row in rows]


def test_rows_of_one_length_need_no_mask(use: Any, pixels: Any) -> None:
    model, rows, sizes = use(METHODS[0]), [prompt(9, 3), prompt(9, 4, seed=1)], [(300, 200), (90, 400)]
    out = model.generate(torch.stack(rows), images=pixels(*sizes), image_sizes=sizes, **GREEDY)
    for row, size, answer in zip(rows, sizes, out, strict=True):
        one = model.generate(row[None], images=pixels(size), image_sizes=[size], **GREEDY)
        assert trim(answer) == trim(one[0])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("spec", METHODS)
@torch.no_grad()
def test_logits_of_a_batch_equal_those_alone(
    use: Any, pixels: Any, monkeypatch: pytest.MonkeyPatch, spec: str, side: str
) -> None:
    model = use(spec)
    monkeypatch.setattr(model.config, "tokenizer_padding_side", side)  # where `forward` pads
    # The incoming side does not matter: padding is taken out before images go in.
    batch = model(**pad(ROWS, "right"), images=pixels(*FLAT), image_sizes=FLAT).logits
    for row, sizes, logits in zip(ROWS, SIZES, batch, strict=True):
        one = model(input_ids=row[None], images=pixels(*sizes) or None, image_sizes=sizes or None).logits[0]
        own = logits[-len(one) :] if side == "left" else logits[: len(one)]
        assert (own - one).abs().max() <= 1e-4


@pytest.mark.parametrize("spec", METHODS)
@torch.no_grad()
def test_images_of_a_call_are_compressed_each_on_its_own(use: Any, pixels: Any, spec: str) -> None:
    model = use(spec)
    together = model.compress_images(pixels(*FLAT), FLAT)
    for size, packed in zip(FLAT, together, strict=True):
        (one,) = model.compress_images(pixels(size), [size])
        assert torch.equal(one.origin, packed.origin)
        torch.testing.assert_close(one.features, packed.features, atol=1e-5, rtol=1e-5)


# --- ways to search ---


@pytest.mark.parametrize("spec", METHODS)
def test_cached_equals_uncached(use: Any, pixels: Any, spec: str) -> None:
    model = use(spec)
    given = {**pad(ROWS, "left"), "images": pixels(*FLAT), "image_sizes": FLAT, **GREEDY}
    assert torch.equal(model.generate(**given, use_cache=True), model.generate(**given, use_cache=False))


def test_a_static_cache_changes_nothing(use: Any, pixels: Any) -> None:
    given = {"images": pixels((300, 200)), "image_sizes": [(300, 200)], **GREEDY}
    model = use(METHODS[0])
    static = model.generate(ROWS[0][None], **given, cache_implementation="static", disable_compile=True)
    assert torch.equal(static, model.generate(ROWS[0][None], **given))


@torch.no_grad()
def test_a_hand_written_decoding_loop(use: Any, pixels: Any) -> None:
    """One new token passes by the images, as upstream has it, even where the caller hands them over again."""
    model = use(METHODS[0])
    given = {"images": pixels((300, 200)), "image_sizes": [(300, 200)]}
    first = model(input_ids=ROWS[0][None], use_cache=True, **given)
    token = torch.tensor([[77]])
    step = model(input_ids=token, past_key_values=first.past_key_values, use_cache=True, **given).logits
    whole = model(input_ids=torch.cat((ROWS[0][None], token), dim=1), **given).logits
    assert (step[0, -1] - whole[0, -1]).abs().max() <= 1e-4


@pytest.mark.parametrize("spec", METHODS)
def test_beams(use: Any, pixels: Any, spec: str) -> None:
    model, search = use(spec), {"num_beams": 3, "do_sample": False, "max_new_tokens": 6}
    out = model.generate(**pad(ROWS, "right"), images=pixels(*FLAT), image_sizes=FLAT, **search)
    assert [trim(row) for row in out] == alone(model, pixels, **search)
    assert [trim(row) for row in out] != alone(model, pixels, do_sample=False, max_new_tokens=6)


def test_several_beams_are_returned(use: Any, pixels: Any) -> None:
    search = {"num_beams": 3, "num_return_sequences": 2, "do_sample": False, "max_new_tokens": 5}
    out = use(METHODS[0]).generate(**pad(ROWS, "left"), images=pixels(*FLAT), image_sizes=FLAT, **search)
    assert len(out) == 2 * len(ROWS)
    assert all(out[i].tolist() != out[i + 1].tolist() for i in range(0, len(out), 2))


def test_sampling_follows_the_seed(use: Any, pixels: Any) -> None:
    model, answers = use(METHODS[0]), []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        sampled = model.generate(
            ROWS[0][None],
            images=pixels((300, 200)),
            image_sizes=[(300, 200)],
            do_sample=True,
            temperature=1.5,
            top_p=0.95,
            max_new_tokens=10,
            num_return_sequences=3,
        )
        assert len(sampled) == 3
        answers.append(sampled.tolist())
    assert answers[0] == answers[1] != answers[2]
    assert answers[0][0] != answers[0][1]


@pytest.mark.parametrize("how", ["argument", "generation_config", "model"])
def test_sampling_settings_reach_the_search(use: Any, pixels: Any, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    # With top_k=1 sampling can only be greedy, whichever way the caller asked for it.
    model = use(METHODS[0])
    given = {"images": pixels((300, 200)), "image_sizes": [(300, 200)], "max_new_tokens": 10, "top_k": 1}
    greedy = model.generate(ROWS[0][None], **given, do_sample=False)
    if how == "argument":
        given["do_sample"] = True
    elif how == "generation_config":
        given["generation_config"] = GenerationConfig(do_sample=True, pad_token_id=0, eos_token_id=EOS)
    else:
        monkeypatch.setattr(model.generation_config, "do_sample", True)
    assert torch.equal(model.generate(ROWS[0][None], **given), greedy)


def test_a_generation_config_is_obeyed(use: Any, pixels: Any) -> None:
    given = {"images": pixels((300, 200)), "image_sizes": [(300, 200)]}
    config = GenerationConfig(max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=EOS)
    assert use(METHODS[0]).generate(ROWS[0][None], **given, generation_config=config).shape == (1, 4)


def test_scores_are_returned_on_request(use: Any, pixels: Any) -> None:
    given = {"images": pixels((300, 200)), "image_sizes": [(300, 200)], **GREEDY}
    out = use(METHODS[0]).generate(ROWS[0][None], **given, return_dict_in_generate=True, output_scores=True)
    assert torch.stack(out.scores, dim=1).argmax(-1).tolist() == out.sequences.tolist()


@pytest.mark.parametrize("skip_prompt", [True, False])
def test_streaming_yields_the_answer(
    loaded: Any, use: Any, pixels: Any, skip_prompt: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    model, tokenizer = use(METHODS[0]), loaded().tokenizer
    given = {"inputs": ROWS[0][None], "images": pixels((300, 200)), "image_sizes": [(300, 200)], **GREEDY}
    answer = tokenizer.decode(model.generate(**given)[0], skip_special_tokens=True)
    assert answer.strip()
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=skip_prompt, timeout=60, skip_special_tokens=True)
    worker = threading.Thread(target=model.generate, kwargs={**given, "streamer": streamer})
    worker.start()
    pieces = list(streamer)
    worker.join()
    assert "".join(pieces) == answer
    capsys.readouterr()
    model.generate(**given, streamer=TextStreamer(tokenizer, skip_prompt=skip_prompt, skip_special_tokens=True))
    assert capsys.readouterr().out.removesuffix("\n") == answer


# --- when to stop ---


@pytest.mark.parametrize("wrap", [list, StoppingCriteriaList])
def test_stopping_criteria_are_obeyed(use: Any, pixels: Any, wrap: Any) -> None:
    lengths: list[int] = []

    def third(ids: Tensor, scores: Any, **kwargs: Any) -> bool:
        lengths.append(ids.shape[1])
        return ids.shape[1] >= 3

    criteria = wrap([third])
    given = {"images": pixels((300, 200)), "image_sizes": [(300, 200)], "min_new_tokens": 5}
    trace = Trace()
    out = use(METHODS[0]).generate(ROWS[0][None], **given, **GREEDY, stopping_criteria=criteria, trace=trace)
    assert out.shape == (1, 3)
    assert lengths == [1, 2, 3]  # the criteria see new tokens only
    assert len(criteria) == 1  # the caller's list is not grown by the clock
    assert trace.seconds["prefill"] > 0


def test_keywords_stop_the_answer(loaded: Any, use: Any, pixels: Any) -> None:
    model, tokenizer = use(METHODS[0]), loaded().tokenizer
    given = {"images": pixels((300, 200)), "image_sizes": [(300, 200)], "do_sample": False}
    # The weights are noise: take as keyword a token of the answer that the tokenizer reads as itself.
    full = model.generate(ROWS[0][None], **given, max_new_tokens=60, min_new_tokens=60)[0].tolist()
    words = [(i, tokenizer.decode([token])) for i, token in enumerate(full)]
    at, word = next((i, w) for i, w in words if tokenizer(w).input_ids == [1, full[i]] and full.index(full[i]) == i)
    criteria = KeywordsStoppingCriteria([word], tokenizer, ROWS[0][None])
    out = model.generate(ROWS[0][None], **given, max_new_tokens=60, min_new_tokens=60, stopping_criteria=[criteria])
    assert out[0].tolist() == full[: at + 1]


@contextmanager
def quiet() -> Iterator[None]:
    """Fail on any warning, by `warnings` or by transformers' logger, which says each only once per process."""
    from transformers.utils import logging as library

    library.warning_once.cache_clear()
    records: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            yield
    finally:
        logger.removeHandler(handler)
    assert records == []


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0, "top_p": None},
        {"temperature": 0.0, "top_p": 1.0, "top_k": 50},
        {"temperature": 0.2, "top_p": 0.7, "num_beams": 2},
        {"temperature": 0, "top_p": None, "num_beams": 1, "use_cache": True, "pad_token_id": 0},
    ],
)
def test_greedy_search_ignores_sampling_settings_quietly(use: Any, pixels: Any, settings: dict[str, Any]) -> None:
    given = {"images": pixels((300, 200)), "image_sizes": [(300, 200)], "do_sample": False, "max_new_tokens": 4}
    beams = {"num_beams": settings.get("num_beams", 1)}
    expected = use(METHODS[0]).generate(ROWS[0][None], **given, **beams)
    with quiet():
        out = use(METHODS[0]).generate(ROWS[0][None], **given, **settings)
    assert torch.equal(out, expected)


def test_sampling_is_quiet_too(use: Any, pixels: Any) -> None:
    """It follows the seed and the temperature: near 0 it is greedy, at 9 it is not."""
    given = {"images": pixels((300, 200)), "image_sizes": [(300, 200)], "max_new_tokens": 4, "min_new_tokens": 4}

    def sampled(seed: int, temperature: float) -> list[int]:
        torch.manual_seed(seed)
        with quiet():
            out = use(METHODS[0]).generate(ROWS[0][None], **given, do_sample=True, temperature=temperature)
        return out[0].tolist()

    greedy = use(METHODS[0]).generate(ROWS[0][None], **given, do_sample=False)[0].tolist()
    assert sampled(1, 1e-4) == sampled(2, 1e-4) == greedy
    assert sampled(1, 9.0) == sampled(1, 9.0)
    assert sampled(1, 9.0) != sampled(2, 9.0)


# --- shapes of `images` ---


@pytest.mark.parametrize(("spec", "tokens"), [("none", N), ("globalcom2(retention_ratio=0.25)", N // 4)])
@pytest.mark.parametrize("image_sizes", [None, [(300, 200), (90, 400)]])
def test_a_4d_tensor_bypasses_merging(use: Any, pixels: Any, spec: str, tokens: int, image_sizes: Any) -> None:
    """VLMEvalKit's path: single views, no newline, even on an AnyRes checkpoint; GlobalCom² ranks them all the same."""
    model, trace = use(spec), Trace()
    images = torch.stack([views[0] for views in pixels((300, 200), (90, 400))])
    ids = torch.stack([prompt(9, 3), prompt(9, 4)])
    out = model.generate(ids, images=images, image_sizes=image_sizes, trace=trace, **GREEDY)
    assert out.shape[0] == 2
    assert trace.sequence_lengths == [8 + tokens] * 2
    assert [(len(i.packed.origin), i.packed.newlines) for i in trace.images] == [(tokens, 0)] * 2
    if spec != "none":
        scores = record_scores(model, images)[:, 0]
        for image, score in zip(trace.images, scores, strict=True):
            assert image.packed.origin.tolist() == sorted(score.topk(tokens).indices.tolist())


@torch.no_grad()
def record_scores(model: Any, images: Tensor) -> Tensor:
    """Head-mean [CLS] logits `[B, 1, N]` of the last layer, written out anew."""
    tower = model.get_vision_tower()
    hidden = tower.hidden(images)
    layer = tower.vision_tower.encoder.layers[-1]
    x, heads = layer.layer_norm1(hidden), tower.config.num_attention_heads
    query, key = (
        proj(x).unflatten(-1, (heads, -1)).transpose(1, 2) for proj in (layer.self_attn.q_proj, layer.self_attn.k_proj)
    )
    return (query[:, :, :1] @ key.mT)[..., 1:].mean(1)


def test_a_5d_tensor_is_a_list_of_images(use: Any, pixels: Any) -> None:
    model, sizes = use(METHODS[0]), [(300, 200), (250, 250)]  # as many crops both
    ids, images = torch.stack([prompt(9, 3), prompt(9, 4)]), pixels(*sizes)
    settings = {"image_sizes": sizes, **GREEDY}
    out = model.generate(ids, images=torch.stack(images), **settings)
    assert torch.equal(out, model.generate(ids, images=images, **settings))
    assert torch.equal(out, model.generate(ids, images=torch.stack(images), image_sizes=torch.tensor(sizes), **GREEDY))


@pytest.mark.parametrize(("spec", "tokens"), [("none", N), ("globalcom2(retention_ratio=0.25)", N // 4)])
def test_a_list_of_single_views_is_closed_by_a_newline(use: Any, pixels: Any, spec: str, tokens: int) -> None:
    # On an AnyRes checkpoint a single view in a list goes through the merging: its tokens and one newline.
    trace, images = Trace(), [views[0] for views in pixels((300, 200), (90, 400))]
    ids = torch.stack([prompt(9, 3), prompt(9, 4)])
    use(spec).generate(ids, images=images, trace=trace, **GREEDY)
    assert trace.sequence_lengths == [8 + tokens + 1] * 2
    assert [i.packed.origin[-1].item() for i in trace.images] == [-1, -1]


@pytest.mark.parametrize("spec", METHODS)
@torch.no_grad()
def test_half_precision_images_are_accepted(use: Any, pixels: Any, spec: str) -> None:
    # Harnesses cast to float16 whatever the model is.
    model, sizes = use(spec), [(300, 200)]
    images = [image.half() for image in pixels(*sizes)]
    own = model(input_ids=ROWS[0][None], images=images, image_sizes=sizes).logits
    same = model(input_ids=ROWS[0][None], images=[i.float() for i in images], image_sizes=sizes).logits
    assert own.dtype == torch.float32
    assert torch.equal(own, same)
    assert len(model.generate(ROWS[0][None], images=images, image_sizes=sizes, **GREEDY)) == 1


# --- what is refused ---


def refused(model: Any, pattern: str, ids: Tensor, how: str = "generate", **given: Any) -> None:
    call = model.generate if how == "generate" else model
    with pytest.raises(InputError, match=pattern):
        call(input_ids=ids, **given)


@pytest.mark.parametrize("how", ["generate", "forward"])
def test_sizes_are_needed_for_several_views(use: Any, pixels: Any, how: str) -> None:
    refused(use("none"), "image_sizes", ROWS[0][None], how, images=pixels((300, 200)))


def test_sizes_must_match_the_images(use: Any, pixels: Any) -> None:
    model = use("none")
    refused(model, "2 .*1 ", ROWS[0][None], images=pixels((300, 200)), image_sizes=[(300, 200)] * 2)
    refused(model, "400x90.*4.*5", ROWS[0][None], images=pixels((300, 200)), image_sizes=[(400, 90)])


@pytest.mark.parametrize("how", ["generate", "forward"])
@pytest.mark.parametrize(("placeholders", "images"), [(0, 1), (2, 1), (1, 2), (3, 2)])
def test_placeholders_must_match_the_images(use: Any, pixels: Any, placeholders: int, images: int, how: str) -> None:
    sizes = [(300, 200)] * images
    ids = prompt(9, *range(2, 2 + placeholders))[None]
    refused(use("none"), rf"{placeholders}\D.*{images}\D", ids, how, images=pixels(*sizes), image_sizes=sizes)


@pytest.mark.parametrize("how", ["generate", "forward"])
def test_placeholders_without_any_image(use: Any, how: str) -> None:
    # Let through, the placeholder would reach the embedding: an IndexError, on CUDA an assertion that ends the process.
    refused(use("none"), r"1\D.*0\D", ROWS[0][None], how, images=None)


def test_ids_without_a_batch_dimension_are_refused(use: Any, pixels: Any) -> None:
    # What `tokenizer_image_token` returns; taken as it is, every id would become a prompt of its own.
    refused(use("none"), "ids", ROWS[0], images=pixels((300, 200)), image_sizes=[(300, 200)])


@pytest.mark.parametrize("how", ["generate", "forward"])
def test_an_overlong_prompt_names_both_lengths(
    use: Any, pixels: Any, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    model, size, trace = use("none"), (300, 200), Trace()
    given = {"images": pixels(size), "image_sizes": [size]}
    model.generate(ROWS[0][None], **given, **GREEDY, trace=trace)
    (length,) = trace.sequence_lengths
    monkeypatch.setattr(model.config, "max_position_embeddings", length - 1)
    refused(model, rf"\b{length}\b.*\b{length - 1}\b", ROWS[0][None], how, **given)
    # It is the compressed length that counts, and the limit itself is no error.
    monkeypatch.setattr(model, "method", get("globalcom2(retention_ratio=0.5)"))
    model.generate(ROWS[0][None], **given, **GREEDY)
    monkeypatch.setattr(model, "method", get("none"))
    monkeypatch.setattr(model.config, "max_position_embeddings", length)
    model.generate(ROWS[0][None], **given, do_sample=False, max_new_tokens=1)


def test_embeddings_are_not_taken(model: Any) -> None:
    embeds = torch.zeros(1, 4, 64)
    with pytest.raises(NotImplementedError, match="inputs_embeds are made from them"):
        model.generate(inputs_embeds=embeds)
    with pytest.raises(NotImplementedError, match="inputs_embeds are made from them"):
        model.generate(ROWS[0][None], inputs_embeds=embeds)


# --- loss ---


@pytest.mark.parametrize("spec", METHODS)
@torch.no_grad()
def test_the_loss_is_the_answers_cross_entropy(use: Any, pixels: Any, spec: str) -> None:
    model, size = use(spec), (300, 200)
    given = {"input_ids": ROWS[0][None], "images": pixels(size), "image_sizes": [size]}
    labels = ROWS[0][None].clone()
    labels[:, :5] = IGNORE_INDEX  # the prompt, image included; 4 tokens of answer remain
    out = model(**given, labels=labels)
    logits = model(**given).logits
    assert torch.equal(out.logits, logits)
    expected = F.cross_entropy(logits[0, -5:-1], ROWS[0][-4:])
    torch.testing.assert_close(out.loss, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out["loss"], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("spec", METHODS)
@torch.no_grad()
def test_the_loss_of_a_batch(use: Any, pixels: Any, spec: str) -> None:
    """All tokens labelled, placeholders too, as lmms-eval's `labels = input_ids.clone()` leaves them."""
    model, batch = use(spec), pad(ROWS, "right")
    out = model(**batch, images=pixels(*FLAT), image_sizes=FLAT, labels=batch["input_ids"].clone())
    losses = []
    for row, sizes in zip(ROWS, SIZES, strict=True):
        images = pixels(*sizes)
        logits = model(input_ids=row[None], images=images or None, image_sizes=sizes or None).logits[0]
        lengths = [len(p.origin) for p in model.compress_images(images, sizes)] if sizes else []
        place = 0  # of the next token in the compressed sequence
        for token in row.tolist():
            if token == IMG:
                place += lengths.pop(0)
                continue
            if place:  # the first token has nothing before it
                losses.append(F.cross_entropy(logits[place - 1], torch.tensor(token)))
            place += 1
    torch.testing.assert_close(out.loss, torch.stack(losses).mean(), atol=1e-4, rtol=1e-4)


def test_labels_are_ignored_on_images_and_padding(use: Any, pixels: Any) -> None:
    model, batch = use(METHODS[0]), pad(ROWS, "right")
    s = model.splice_images(
        batch["input_ids"], batch["attention_mask"], batch["input_ids"], images=pixels(*FLAT), image_sizes=FLAT
    )
    assert (s.labels[s.visual] == IGNORE_INDEX).all()
    assert (s.labels[~s.attention_mask.bool()] == IGNORE_INDEX).all()
    for labels, row in zip(s.labels, ROWS, strict=True):
        assert labels[labels != IGNORE_INDEX].tolist() == row[row != IMG].tolist()


# --- the upstream function ---


@pytest.mark.parametrize("spec", METHODS)
def test_the_upstream_tuple(use: Any, pixels: Any, spec: str) -> None:
    model, size, cache = use(spec), (300, 200), object()
    ids = ROWS[0][None]
    out = model.prepare_inputs_labels_for_multimodal(ids, None, None, cache, ids, pixels(size), image_sizes=[size])
    new_ids, positions, mask, past, embeds, labels = out
    (packed,) = model.compress_images(pixels(size), [size])
    length = 8 + len(packed.origin)
    assert new_ids is None
    assert past is cache
    assert embeds.shape == (1, length, 64)
    assert labels.shape == (1, length)
    assert positions is None or positions.tolist() == [list(range(length))]
    assert mask is None or (mask.shape == (1, length) and mask.all())
    torch.testing.assert_close(embeds[0, 3:-5], packed.features)
    assert torch.equal(embeds[0, :3], model.get_model().embed_tokens(ids[0, :3]))


@pytest.mark.parametrize("name", MOVED)
def test_what_works_inside_the_language_model_is_not_left_out_silently(use: Any, pixels: Any, name: str) -> None:
    model, ids, size = use(str(fitted(name, 0.5))), ROWS[0][None], (300, 200)
    given = {"images": pixels(size), "image_sizes": [size]}
    with pytest.raises(InputError, match=r"inside the language model.*generate"):
        model(input_ids=ids, **given)
    with pytest.raises(InputError, match=r"inside the language model.*generate"):
        model.prepare_inputs_labels_for_multimodal(ids, None, None, None, ids, **given)
    assert model(input_ids=ROWS[1][None]).logits.shape[1] == len(ROWS[1]), "text alone is no matter of it"


@pytest.mark.parametrize(("ids", "with_images"), [(prompt(9)[None], False), (torch.tensor([[7]]), True)])
def test_the_upstream_tuple_without_images_and_while_decoding(
    use: Any, pixels: Any, ids: Tensor, with_images: bool
) -> None:
    positions, mask, cache, labels = torch.arange(3), torch.ones(1, 3), object(), torch.ones(1, 3)
    images = pixels((300, 200)) if with_images else None
    out = use("none").prepare_inputs_labels_for_multimodal(ids, positions, mask, cache, labels, images, [(300, 200)])
    assert all(a is b for a, b in zip(out, (ids, positions, mask, cache, None, labels), strict=True))


# --- nothing lost, nothing done in vain ---


@pytest.mark.parametrize("sizes", [[(300, 200)], [(1000, 10)], [(90, 400), (40, 50)], FLAT])
@torch.no_grad()
def test_ratio_1_is_no_compression_bit_for_bit(use: Any, pixels: Any, sizes: list[Size]) -> None:
    given = {"input_ids": prompt(12, *range(2, 2 + len(sizes)))[None], "images": pixels(*sizes), "image_sizes": sizes}
    plain = use("none")(**given).logits
    full = use("globalcom2(retention_ratio=1.0)")(**given).logits
    assert torch.equal(plain, full)


@torch.no_grad()
def test_ratio_1_is_no_compression_for_single_views_too(use: Any, pixels: Any) -> None:
    images = pixels((300, 200))[0][:2]
    ids = prompt(9, 2, 5)[None]
    plain = use("none")(input_ids=ids, images=images).logits
    assert torch.equal(plain, use("globalcom2(retention_ratio=1)")(input_ids=ids, images=images).logits)


@contextmanager
def watched(module: Any) -> Iterator[list[tuple[int, ...]]]:
    """The shape of what a module is called with, call by call."""
    calls: list[tuple[int, ...]] = []
    handle = module.register_forward_pre_hook(
        lambda _, args, kwargs: calls.append(tuple((args[0] if args else next(iter(kwargs.values()))).shape)),
        with_kwargs=True,
    )
    yield calls
    handle.remove()


@pytest.mark.parametrize("spec", METHODS)
def test_one_tower_call_and_no_layer_in_vain(use: Any, pixels: Any, monkeypatch: pytest.MonkeyPatch, spec: str) -> None:
    model, images, trace = use(spec), pixels(*FLAT), Trace()
    clip = model.get_vision_tower().vision_tower
    monkeypatch.setitem(vars(clip.encoder.layers[-1]), "forward", lambda *args, **kwargs: pytest.fail("last layer run"))
    with watched(clip.embeddings) as calls, watched(model.get_model().mm_projector) as projected:
        model.generate(**pad(ROWS, "left"), images=images, image_sizes=FLAT, trace=trace, **GREEDY)
    assert calls == [(sum(len(views) for views in images), 3, TILE, TILE)]
    kept = [image.selection.count.sum().item() for image in trace.images]
    assert sum(shape[0] for shape in projected) == sum(kept)
    assert all(len(shape) == 2 for shape in projected)
    if spec != "none":
        grids = [image.grid for image in trace.images]
        assert kept == [int(0.25 * N) + int(0.25 * sum(grid.crop_patches())) for grid in grids]


def test_attention_stays_fused(use: Any, pixels: Any) -> None:
    model = use(METHODS[0])
    before = len(hooks_of(model))
    model.generate(ROWS[0][None], images=pixels((300, 200)), image_sizes=[(300, 200)], **GREEDY)
    assert model.config._attn_implementation == "sdpa"
    assert model.get_vision_tower().config._attn_implementation == "sdpa"
    assert len(hooks_of(model)) == before


def hooks_of(model: Any) -> list[Any]:
    return [hook for m in model.modules() for hook in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]


# --- half precision ---


@pytest.fixture(scope="module")
def bf16(checkpoint: Any) -> Any:
    return load_pretrained_model(str(checkpoint("v1.6-vicuna")), dtype=torch.bfloat16)[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("profile", ["corrected", "released", "paper"])
def test_the_same_scores_select_the_same_in_any_dtype(dtype: torch.dtype, profile: str) -> None:
    grid = AnyResGrid(image_size=(300, 200), crops=(2, 2), side=SIDE)
    features, logits = torch.randn(5, N, 8), {-1: torch.randn(5, 4, 1 + N)}
    method = get("globalcom2", profile=profile, retention_ratio=0.3)
    full, half = (
        method.select(Views(features=f, grid=grid, cls_logits=logits)) for f in (features, features.to(dtype))
    )
    assert torch.equal(full.kept, half.kept)
    assert torch.equal(full.order, half.order)


@pytest.mark.parametrize("spec", METHODS)
@torch.no_grad()
def test_bfloat16_stays_close(use: Any, bf16: Any, pixels: Any, monkeypatch: pytest.MonkeyPatch, spec: str) -> None:
    """Logits of size 1 (up to 4) differ by 0.02 on average and at most 0.25, given the float32 run's selection."""
    model, trace = use(spec), Trace()
    monkeypatch.setattr(bf16, "method", model.method)
    images = pixels(*FLAT)
    ids = prompt(16, 2, 4, 6, 8, 9)[None]
    packed = model.compress_images(images, FLAT, trace)
    exact = model(input_ids=ids, images=images, image_sizes=FLAT).logits
    chosen = [image.selection for image in trace.images]
    monkeypatch.setattr(type(model.method), "select_all", lambda self, batch: chosen)
    again = bf16.compress_images(images, FLAT)
    rounded = bf16(input_ids=ids, images=images, image_sizes=FLAT).logits
    assert all(torch.equal(a.origin, b.origin) for a, b in zip(packed, again, strict=True))
    assert rounded.dtype == torch.bfloat16
    assert {p.features.dtype for p in again} == {torch.bfloat16}
    assert exact.abs().max() > 2
    difference = (rounded.float() - exact).abs()
    assert difference.mean() <= 0.02
    assert difference.max() <= 0.25


@pytest.mark.parametrize("spec", METHODS)
def test_a_bfloat16_model_answers_batches(bf16: Any, pixels: Any, monkeypatch: pytest.MonkeyPatch, spec: str) -> None:
    monkeypatch.setattr(bf16, "method", get(spec))
    assert {p.dtype for p in bf16.parameters()} == {torch.bfloat16}
    for images in (pixels(*FLAT), [image.half() for image in pixels(*FLAT)]):
        out = bf16.generate(**pad(ROWS, "right"), images=images, image_sizes=FLAT, **GREEDY)
        assert len(out) == len(ROWS)


# --- the account ---


@pytest.mark.parametrize("spec", [*METHODS, "globalcom2(retention_ratio=0.5, profile='paper')", "uniform", "random"])
def test_the_ledger_adds_up(use: Any, pixels: Any, spec: str) -> None:
    model, trace = use(spec), Trace()
    out = model.generate(**pad(ROWS, "right"), images=pixels(*FLAT), image_sizes=FLAT, trace=trace, **GREEDY)
    ledger = trace.ledger()
    assert set(ledger) == {"method", "images", "sequence_lengths", "visual_per_layer", "seconds"}
    assert ledger["method"] == str(model.method)
    assert [tuple(image["size"]) for image in ledger["images"]] == FLAT
    for image in ledger["images"]:
        before, after = image["patches_before"], image["patches_after"]
        assert before[0] == N
        assert len(before) == len(after) == 1 + image["grid"][0] * image["grid"][1]
        assert all(0 <= kept <= whole for kept, whole in zip(after, before, strict=True))
        assert image["kept"] == sum(after)
        assert image["tokens"] == image["kept"] + image["newlines"]
        assert image["requested_ratio"] == (1.0 if spec == "none" else model.method.ratio)
        low, high = image["planned"] if isinstance(image["planned"], list) else [image["planned"]] * 2
        assert low <= image["kept"] <= high
        assert image["kept_ratio"] == pytest.approx(image["kept"] / sum(before), abs=1e-4)
        for ratio, kept, whole in zip(image["crop_ratios"], after[1:], before[1:], strict=True):
            assert ratio == (pytest.approx(kept / whole, abs=1e-4) if whole else None)
    tokens = iter(image["tokens"] for image in ledger["images"])
    lengths = [
        (row != IMG).sum().item() + sum(next(tokens) for _ in sizes) for row, sizes in zip(ROWS, SIZES, strict=True)
    ]
    assert ledger["sequence_lengths"] == lengths
    assert set(ledger["seconds"]) == {"vision", "selection", "packing", "prefill", "decode"}
    assert all(seconds >= 0 for seconds in ledger["seconds"].values())
    assert len(out) == len(ROWS)


def test_a_trace_changes_no_answer(use: Any, pixels: Any) -> None:
    model = use(METHODS[0])
    given = {"images": pixels((300, 200)), "image_sizes": [(300, 200)], **GREEDY}
    assert torch.equal(model.generate(ROWS[0][None], **given), model.generate(ROWS[0][None], **given, trace=Trace()))


def test_the_ratio_is_looked_up_at_every_call(use: Any, pixels: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Argument, else LLAVA_RETENTION_RATIO, else the line that users edit, which is read when it is needed."""
    model, size = use("globalcom2"), (300, 200)
    crops = sum(AnyResGrid(image_size=size, crops=(2, 2), side=SIDE).crop_patches())

    def kept() -> int:
        trace = Trace()
        model.generate(ROWS[0][None], images=pixels(size), image_sizes=[size], trace=trace, **GREEDY)
        return trace.ledger()["images"][0]["kept"]

    def wanted(ratio: float) -> int:
        return int(ratio * N) + int(ratio * crops)

    assert len({wanted(ratio) for ratio in (0.25, 0.5, 0.75, 0.1)}) == 4
    assert kept() == wanted(0.25)
    monkeypatch.setattr("llava.model.llava_arch.retention_ratio", 0.5)
    assert kept() == wanted(0.5)
    monkeypatch.setenv("LLAVA_RETENTION_RATIO", "0.75")
    assert kept() == wanted(0.75)
    monkeypatch.setattr(model, "method", get("globalcom2(retention_ratio=0.1)"))
    assert kept() == wanted(0.1)
    monkeypatch.setattr(model, "method", get("globalcom2"))
    monkeypatch.setenv("LLAVA_RETENTION_RATIO", "1.5")
    with pytest.raises(InputError, match=r"LLAVA_RETENTION_RATIO.*1\.5"):
        kept()
