"""Dropping inside the language model is masking what was dropped, with less to compute and less to keep."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from llava.compress import get
from llava.compress.base import Compressor
from llava.compress.stages import PAD, TEXT, LayerTokens, Reduction
from llava.compress.trace import Trace
from llava.constants import IMAGE_TOKEN_INDEX, InputError
from llava.mm_utils import process_images
from llava.model.language_model.inside import gather_kept
from tests.conftest import picture
from tests.model.test_prefix import SIZES, ids

TOKENS = 6


class EveryOther(Compressor):  # type: ignore[misc]
    """Behind layer 0 the first two thirds of the image tokens, behind layer 1 every other of them."""

    name = "everyother"
    query_agnostic = False
    positions = "keep"

    @property
    def llm_points(self) -> tuple[int, ...]:
        return (0, 1)

    def visual_per_layer(self, n_visual: int, depth: int) -> tuple[int, ...]:
        return n_visual, 2 * n_visual // 3, *[2 * n_visual // 3 // 2] * (depth - 2)

    def reduce_in_llm(self, tokens: LayerTokens) -> Reduction:
        kept = tuple(self.visual_per_layer(n, tokens.depth)[tokens.layer + 1] for n in tokens.n_visual)
        place = tokens.image.cumsum(1) - 1
        if tokens.layer == 0:
            chosen = place < torch.tensor(kept)[:, None]
        else:
            chosen = (place % 2 == 1) & (place // 2 < torch.tensor(kept)[:, None])
        return Reduction(keep=~tokens.image | chosen, n_visual=kept, positions=self.positions)


class Repacking(EveryOther):
    """The same, with positions closed up."""

    positions = "repack"


def prompt(seed: int, images: int = 1) -> Tensor:
    slot = torch.tensor([IMAGE_TOKEN_INDEX])
    parts = [torch.cat((ids(3 + seed % 3, 10 * seed + turn), slot)) for turn in range(images)]
    return torch.cat((*parts, ids(5 + 2 * seed, seed)))


def given(model: Any, sizes: Sequence[tuple[int, int]]) -> dict[str, Any]:
    images = [picture(*size, seed=number) for number, size in enumerate(sizes)]
    return {"images": process_images(images, model.processor, model.config), "image_sizes": list(sizes)}


def batch(rows: list[Tensor]) -> dict[str, Tensor]:
    pad = torch.nn.utils.rnn.pad_sequence
    mask = pad([torch.ones_like(row) for row in rows], batch_first=True)
    return {"inputs": pad(rows, batch_first=True), "attention_mask": mask}


@torch.no_grad()
def masked(model: Any, method: Compressor, row: Tensor, **images: Any) -> list[int]:
    """Answer one prompt by running everything in every layer, what was dropped masked, without cache or hooks."""
    inner = model.get_model()
    s = model.splice_images(row[None], padding_side="left", **images)
    embeds, role = s.inputs_embeds, s.role
    length, answer = embeds.shape[1], []
    alive = [torch.ones(length, dtype=torch.bool)]  # per stage, which prompt tokens are there
    memo: dict[str, Tensor] = {}
    for _ in range(TOKENS):
        total = embeds.shape[1]
        causal = torch.ones(total, total).tril().bool()
        hidden, before, stage, seen_at = embeds, embeds, 0, torch.arange(total)
        for index, layer in enumerate(inner.layers):
            if index - 1 in method.llm_points:
                stage += 1
                if len(alive) == stage:  # only at prefill
                    places = alive[-1].nonzero().flatten()
                    tokens = LayerTokens(
                        layer=index - 1,
                        depth=len(inner.layers),
                        hidden=hidden[:, places],
                        role=role[:, places],
                        n_visual=s.n_visual,
                        attention=lambda rows, i=index - 1, x=before, p=places, at=seen_at: by_hand(
                            inner, i, x[:, p], at[p], rows
                        ),
                        n_text=(int((role == TEXT).sum()),),
                        entry=embeds,
                        memo=memo,
                    )
                    kept = torch.zeros_like(alive[-1])
                    kept[places[method.reduce_in_llm(tokens).keep[0]]] = True
                    alive.append(kept)
            there = torch.cat((alive[stage], torch.ones(total - length, dtype=torch.bool)))
            positions = torch.arange(total)
            if stage and getattr(method, "positions", "keep") == "repack":
                positions = (there.cumsum(0) - 1).clamp_min(0)
            bias = torch.zeros(total, total).masked_fill(~(causal & (there | torch.eye(total).bool())), -torch.inf)
            before, seen_at = hidden, positions
            hidden = layer(
                hidden,
                attention_mask=bias[None, None],
                position_ids=positions[None],
                position_embeddings=inner.rotary_emb(hidden, position_ids=positions[None]),
            )
        answer.append(int(model.lm_head(inner.norm(hidden))[0, -1].argmax()))
        embeds = torch.cat((embeds, inner.embed_tokens(torch.tensor([answer[-1:]]))), 1)
    return answer


def by_hand(inner: Any, index: int, hidden: Tensor, positions: Tensor, rows: Tensor) -> Tensor:
    """Attention of a layer as the textbook has it, head by head."""
    layer = inner.layers[index]
    attention = layer.self_attn
    x = layer.input_layernorm(hidden)[0]
    cos, sin = (t[0] for t in inner.rotary_emb(hidden, position_ids=positions[None]))
    width, groups = attention.head_dim, attention.num_key_value_groups

    def rotated(states: Tensor) -> Tensor:
        left, right = states.chunk(2, -1)
        return states * cos + torch.cat((-right, left), -1) * sin

    heads = []
    for head in range(attention.q_proj.weight.shape[0] // width):
        q = rotated(x @ attention.q_proj.weight[head * width : (head + 1) * width].T)
        group = head // groups
        k = rotated(x @ attention.k_proj.weight[group * width : (group + 1) * width].T)
        scores = (q @ k.T) * width**-0.5
        scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -torch.inf)
        heads.append(scores.softmax(-1))
    return torch.stack(heads)[:, rows[0]][None]


# What drops, and may be compared with masking.
METHODS = [
    EveryOther(),
    Repacking(),
    get("fastv(layer=1, retention_ratio=0.5)"),
    get("fastv(layer=2, retention_ratio=0.75)"),
    get("fastv(layer=1, retention_ratio=0.1, budget='after')"),
    get("fastv(layer=1, retention_ratio=0.3, budget='after', profile='released')"),
    get("sparsevlm(layers=(0, 1), retention_ratio=0.6, recycle=False)"),
    get("sparsevlm(layers=(0, 1), retention_ratio=0.5, recycle=False, positions='keep')"),
]
# What merges as well, see test_merging.py.
MERGING = [
    get("sparsevlm(layers=(0, 1), retention_ratio=0.6)"),
    get("sparsevlm(layers=(1,), retention_ratio=0.75, positions='keep')"),
    get("sparsevlm(layers=(0,), retention_ratio=0.1, budget='paper', full=100)"),
    get("ficoco_l(control_encoding_layer=0, r=7)"),
    get("ficoco_l(control_encoding_layer=-1, retention_ratio=0.7, positions='repack')"),
    get("ficoco_l(control_encoding_layer=-1, layers=1, retention_ratio=0.5, profile='paper')"),
]


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_dropping_is_masking(model: Any, method: Compressor) -> None:
    differ = 0
    for seed, size in enumerate(SIZES):
        row, images = prompt(seed), given(model, [size])
        model.method = get("none")
        wanted = masked(model, method, row, **images)
        whole = model.generate(row[None], **images, max_new_tokens=TOKENS, min_new_tokens=TOKENS)[0].tolist()
        model.method = method
        found = model.generate(row[None], **images, max_new_tokens=TOKENS, eos_token_id=None)[0].tolist()
        assert found == wanted
        differ += found != whole
    assert differ or method.ratio >= 0.5, "dropping makes a difference"


@pytest.mark.parametrize("method", METHODS + MERGING, ids=str)
def test_a_padded_batch_is_its_rows(model: Any, method: Compressor) -> None:
    model.method = method
    rows = [prompt(0), prompt(1), prompt(2), ids(6, 9), prompt(3, images=2)]
    sizes = [*SIZES, (84, 84), (300, 200)]
    images = given(model, sizes)
    owned = [[0], [1], [2], [], [3, 4]]
    trace = Trace()
    together = model.generate(**batch(rows), **images, max_new_tokens=TOKENS, eos_token_id=None, trace=trace)
    for number, (row, own) in enumerate(zip(rows, owned, strict=True)):
        mine = given(model, sizes)
        mine = {key: [mine[key][i] for i in own] for key in mine} if own else {"images": None, "image_sizes": None}
        if own and torch.is_tensor(images["images"]) and images["images"].ndim == 4:
            mine["images"] = torch.stack(mine["images"])
        alone = model.generate(row[None], **mine, max_new_tokens=TOKENS, eos_token_id=None)
        assert together[number].tolist() == alone[0].tolist()
    depth = len(model.get_model().layers)
    assert len(trace.visual_per_layer) == len(rows)
    for ran in trace.visual_per_layer:
        assert ran == method.visual_per_layer(ran[0], depth)
    assert trace.visual_per_layer[3] == (0,) * depth


@pytest.mark.parametrize("method", METHODS + MERGING, ids=str)
def test_caches_are_short(model: Any, method: Compressor) -> None:
    model.method = method
    row, images, trace = prompt(1), given(model, [SIZES[0]]), Trace()
    output = model.generate(
        row[None], **images, max_new_tokens=3, eos_token_id=None, trace=trace, return_dict_in_generate=True
    )
    text = len(row) - 1
    lengths = [layer.keys.shape[-2] for layer in output.past_key_values.layers]
    assert lengths == [text + visual + 2 for visual in trace.visual_per_layer[0]]


def test_keeping_all_is_no_method(model: Any) -> None:
    rows, images = [prompt(0), prompt(1)], given(model, SIZES[:2])
    answers = []
    for method in (
        "none",
        "fastv(layer=1, retention_ratio=1.0)",
        "sparsevlm(layers=(0, 1), retention_ratio=1.0)",
        "ficoco_l(control_encoding_layer=0, retention_ratio=1.0)",
        "ficoco_l(AT=False)",
    ):
        model.method = get(method)
        answers.append(
            [
                model.generate(**batch(rows), **images, max_new_tokens=TOKENS, **more).tolist()
                for more in ({}, {"num_beams": 3})
            ]
        )
    assert all(answer == answers[0] for answer in answers[1:])


@pytest.mark.parametrize("method", [METHODS[2], *MERGING], ids=str)
def test_beams_of_a_batch_are_those_of_its_rows(model: Any, method: Compressor) -> None:
    model.method = method
    rows, images = [prompt(0), prompt(2)], given(model, [SIZES[0], SIZES[2]])
    more = {"max_new_tokens": TOKENS, "num_beams": 3, "eos_token_id": None}
    together = model.generate(**batch(rows), **images, **more).tolist()
    for number, row in enumerate(rows):
        alone = {key: value[number : number + 1] for key, value in images.items()}
        assert model.generate(row[None], **alone, **more)[0].tolist() == together[number]


def test_nothing_is_left_behind(model: Any) -> None:
    model.method = METHODS[2]
    row, images = prompt(0), given(model, [SIZES[0]])
    model.generate(row[None], **images, max_new_tokens=2)
    assert_untouched(model)
    model.method = get("fastv(layer=2, retention_ratio=0.1)")  # 2 of 3 layers run on all: 67 % at least
    with pytest.raises(InputError, match=r"layer=2 of 3 keeps 66\.67%"):
        model.generate(row[None], **images, max_new_tokens=2)
    model.method = get("fastv(layer=3, budget='after')")
    with pytest.raises(InputError, match="the model has 3 layers"):
        model.generate(row[None], **images, max_new_tokens=2)
    assert_untouched(model)


def assert_untouched(model: Any) -> None:
    for layer in model.get_model().layers:
        assert not layer._forward_pre_hooks
        assert "forward" not in vars(layer)
        assert not any(module._forward_hooks for module in layer.modules())


def test_a_layer_is_whole_again_after_its_middle(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    row, images = prompt(0), given(model, [SIZES[0]])
    model.method = get("ficoco_l(control_encoding_layer=0, r=3)")
    model.generate(row[None], **images, max_new_tokens=2)
    assert_untouched(model)
    model.method = get("ficoco_l(control_encoding_layer=0, r=99999)")
    with pytest.raises(InputError, match=r"r=99999.*set r to"):
        model.generate(row[None], **images, max_new_tokens=2)
    model.method = get("ficoco_l(control_encoding_layer=2)")
    with pytest.raises(InputError, match=r"merges from layer 3 on, but the model has 3 layers"):
        model.generate(row[None], **images, max_new_tokens=2)

    class Failing(type(get("ficoco_l"))):  # type: ignore[misc]
        def reduce_in_llm(self, tokens: LayerTokens) -> Reduction:
            raise KeyError("in the middle")

    model.method = Failing(control_encoding_layer=0, r=3)
    with pytest.raises(KeyError, match="in the middle"):
        model.generate(row[None], **images, max_new_tokens=2)
    assert_untouched(model)
    # A forward that somebody else put on the instance comes back.
    layer = model.get_model().layers[1]
    monkeypatch.setattr(layer, "forward", layer.forward)
    mine = vars(layer)["forward"]
    model.method = get("ficoco_l(control_encoding_layer=0, r=3)")
    model.generate(row[None], **images, max_new_tokens=2)
    assert vars(layer)["forward"] is mine


def test_gathering() -> None:
    role = torch.tensor([[0, 0, 1, 2, 2, 4], [1, 2, 3, 2, 4, 4]])
    keep = torch.tensor([[1, 1, 1, 0, 1, 1], [1, 0, 1, 0, 1, 1]]).bool()
    chosen, after = gather_kept(Reduction(keep=keep, n_visual=(1, 1)), role, (2, 3))
    assert after[0].tolist()[-3:] == [1, 2, 4]
    assert (after[0][:-3] == PAD).all()
    assert after[1].tolist()[-4:] == [1, 3, 4, 4]
    assert chosen[1].tolist()[-4:] == [0, 2, 4, 5]
    # Tokens may stand elsewhere: the first image token of the second row behind its newline.
    place = torch.tensor([[0, 1, 2, 3, 4, 5], [0, 3, 2, 2, 4, 5]])
    keep[1, 1] = True
    chosen, after = gather_kept(Reduction(keep=keep, n_visual=(1, 2), place=place), role, (2, 3))
    assert after[0].tolist()[-3:] == [1, 2, 4]
    assert chosen[1].tolist() == [0, 2, 1, 4, 5]
    assert after[1].tolist() == [1, 3, 2, 4, 4]
