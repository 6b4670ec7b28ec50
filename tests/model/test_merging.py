"""Merging inside the language model, beside a reference that runs lists of tokens: no hooks, no cache."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import exp, floor
from typing import Any

import pytest
import torch
from torch import Tensor

from llava.compress import get
from llava.compress.base import Compressor
from llava.compress.stages import NEWLINE, TEXT, VISUAL
from tests.model.test_inside import TOKENS, given, prompt
from tests.model.test_prefix import SIZES

ANSWER = 99
IMAGE = (VISUAL, NEWLINE)


@dataclass
class Token:
    """One token of the sequence somewhere in the model."""

    hidden: Tensor
    role: int
    position: int


Step = Callable[[int, list[Token], Tensor, Tensor], list[Token]]
"""Layer, tokens, head-mean logits and head-mean attention -> the tokens that go on."""


def attend(inner: Any, layer: Any, tokens: list[Token]) -> tuple[Tensor, Tensor, Tensor]:
    """Output, head-mean logits and head-mean attention of a layer, head by head."""
    attention, width = layer.self_attn, layer.self_attn.head_dim
    x = layer.input_layernorm(torch.stack([token.hidden for token in tokens]))
    positions = torch.tensor([[token.position for token in tokens]])
    cos, sin = (t[0] for t in inner.rotary_emb(x[None], position_ids=positions))

    def rotated(states: Tensor) -> Tensor:
        left, right = states.chunk(2, -1)
        return states * cos + torch.cat((-right, left), -1) * sin

    outputs, logits, maps = [], [], []
    n_heads = attention.q_proj.weight.shape[0] // width
    for head in range(n_heads):
        group = head // attention.num_key_value_groups
        mine, shared = slice(head * width, (head + 1) * width), slice(group * width, (group + 1) * width)
        q, k = rotated(x @ attention.q_proj.weight[mine].T), rotated(x @ attention.k_proj.weight[shared].T)
        logits.append((q @ k.T) / width**0.5)
        maps.append(logits[-1].masked_fill(torch.ones_like(logits[-1]).triu(1).bool(), -torch.inf).softmax(-1))
        outputs.append(maps[-1] @ (x @ attention.v_proj.weight[shared].T))
    output = torch.cat(outputs, -1) @ attention.o_proj.weight.T
    return output, torch.stack(logits).mean(0), torch.stack(maps).mean(0)


@torch.no_grad()
def by_lists(
    model: Any, row: Tensor, images: dict[str, Any], middle: Step, end: Step, repack: bool
) -> tuple[list[int], Tensor]:
    """Answer a prompt, every token of the answer by running everything again: tokens and their logits."""
    inner = model.get_model()
    s = model.splice_images(row[None], padding_side="left", **images)
    answer, heads = [], []
    for _ in range(TOKENS):
        embeds = torch.cat((s.inputs_embeds[0], inner.embed_tokens(torch.tensor(answer, dtype=torch.long))))
        roles = [*s.role[0].tolist(), *[ANSWER] * len(answer)]
        tokens = [Token(h, role, place) for place, (h, role) in enumerate(zip(embeds, roles, strict=True))]
        for index, layer in enumerate(inner.layers):
            if repack:
                tokens = [replace(token, position=place) for place, token in enumerate(tokens)]
            output, logits, maps = attend(inner, layer, tokens)
            tokens = [replace(t, hidden=t.hidden + out) for t, out in zip(tokens, output, strict=True)]
            tokens = middle(index, tokens, logits, maps)
            hidden = torch.stack([token.hidden for token in tokens])
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
            tokens = [replace(t, hidden=h) for t, h in zip(tokens, hidden, strict=True)]
            tokens = end(index, tokens, logits, maps)
        heads.append(model.lm_head(inner.norm(tokens[-1].hidden[None]))[0])
        answer.append(int(heads[-1].argmax()))
    return answer, torch.stack(heads)


def answered(model: Any, row: Tensor, images: dict[str, Any]) -> tuple[list[int], Tensor]:
    """The same from the model, with its cache."""
    more = {"output_logits": True, "return_dict_in_generate": True}
    output = model.generate(row[None], **images, max_new_tokens=TOKENS, eos_token_id=None, **more)
    return output.sequences[0].tolist(), torch.cat(output.logits)


def nothing(index: int, tokens: list[Token], logits: Tensor, maps: Tensor) -> list[Token]:
    return tokens


def of(tokens: list[Token], *roles: int) -> list[int]:
    return [place for place, token in enumerate(tokens) if token.role in roles]


# --- FiCoCo-L --------------------------------------------------------------------------------------------------------


def ficoco(first: int, r: int, epsilon: float, softmax: bool) -> Step:
    """Filter, correlate and compress, one number at a time."""

    def step(index: int, tokens: list[Token], logits: Tensor, maps: Tensor) -> list[Token]:
        if index < first:
            return tokens
        a = (maps if softmax else logits).tolist()
        image, text = of(tokens, *IMAGE), of(tokens, TEXT)
        scores = {}
        for i in image:
            vision = sum(a[i][j] for j in image) / len(image)
            task = sum(a[k][i] if softmax else a[i][k] for k in text) / len(text)
            scores[i] = 0.6 * vision - 0.4 * task
        sources = sorted(image, key=lambda i: -scores[i])[:r]
        targets = [j for j in image if j not in sources]
        gained: dict[int, list[tuple[float, Tensor]]] = {j: [] for j in targets}
        for i in sources:
            match = {}
            for j in targets:
                through = sum((a[k][i] if softmax else a[i][k]) * a[k][j] for k in text) / len(text)
                match[j] = 0.6 * a[i][j] + 0.4 * through
            values = sorted(match.values())
            place = round(epsilon * (len(values) - 1), 9)
            low = floor(place)
            bound = values[low] + (place - low) * (values[min(low + 1, len(values) - 1)] - values[low])
            best = [j for j in targets if match[j] >= bound]
            worth = [match[j] if softmax else exp(match[j] - max(match.values())) for j in best]
            for j, value in zip(best, worth, strict=True):
                gained[j].append((value / sum(worth), tokens[i].hidden))
        left = []
        for place, token in enumerate(tokens):
            if place in sources:
                continue
            hidden = token.hidden
            for weight, other in gained.get(place, []):
                hidden = hidden + weight * other
            total = 1 + sum(weight for weight, _ in gained.get(place, []))
            left.append(replace(token, hidden=hidden / total))
        return left

    return step


FICOCO = [(0, 7, 0.998, "corrected"), (-1, 5, 0.93, "corrected"), (-1, 5, 0.93, "paper")]


@pytest.mark.parametrize("positions", ["keep", "repack"])
@pytest.mark.parametrize(("control", "r", "epsilon", "profile"), FICOCO)
def test_ficoco_l_is_its_definition(
    model: Any, control: int, r: int, epsilon: float, profile: str, positions: str
) -> None:
    method = get(
        f"ficoco_l(control_encoding_layer={control}, r={r}, epsilon={epsilon}, "
        f"profile={profile!r}, positions={positions!r})"
    )
    middle = ficoco(control + 1, r, epsilon, softmax=profile == "paper")
    compare(model, method, middle, nothing)


# --- SparseVLM -------------------------------------------------------------------------------------------------------


def peaks(x: list[Tensor], c: int) -> tuple[list[int], list[int]]:
    """Centres, best first, and the centre of every token."""
    width = len(x[0])
    apart = [[float((a - b).norm()) / width**0.5 for b in x] for a in x]
    density = [exp(-sum(d * d for d in sorted(row)[:c]) / c) for row in apart]
    widest = max(map(max, apart))
    score = []
    for i in range(len(x)):
        denser = [j for j in range(len(x)) if (-density[j], j) < (-density[i], i)]
        score.append(density[i] * min([apart[i][j] for j in denser], default=widest))
    centres = sorted(range(len(x)), key=lambda i: -score[i])[:c]
    nearest = [i if i in centres else min(centres, key=lambda j: apart[i][j]) for i in range(len(x))]
    return centres, nearest


def sparse(method: Any, row: Tensor, model: Any, images: dict[str, Any], repack: bool) -> Step:
    """Rate, drop and cluster, one number at a time; how many are kept is the method's own choice."""
    s = model.splice_images(row[None], padding_side="left", **images)
    roles = s.role[0].tolist()
    image = [h for h, role in zip(s.inputs_embeds[0], roles, strict=True) if role in IMAGE]
    text = [h for h, role in zip(s.inputs_embeds[0], roles, strict=True) if role == TEXT]
    relevance = torch.stack([torch.stack([v @ t for t in text]).softmax(0) for v in image]).mean(0).tolist()
    rating = [k for k, value in enumerate(relevance) if value > sum(relevance) / len(relevance)]
    assert 0 < len(rating) < len(text)
    kept = dict(zip(method.layers, method._kept(len(image), 3), strict=True))

    def step(index: int, tokens: list[Token], logits: Tensor, maps: Tensor) -> list[Token]:
        if index not in kept:
            return tokens
        words, image = of(tokens, TEXT), of(tokens, *IMAGE)
        score = {i: sum(float(maps[words[k], i]) for k in rating) for i in image}
        ranked = sorted(image, key=lambda i: -score[i])
        stay, gone = ranked[: kept[index]], ranked[kept[index] :]
        if not gone:
            return tokens
        m = int(0.3 * len(gone)) + 1
        again = sorted(gone[:m])
        centres, nearest = peaks([tokens[i].hidden for i in again], int(m / 10) + 1)
        merged = {}
        for centre in centres:
            members = [tokens[i].hidden for i, own in zip(again, nearest, strict=True) if own == centre]
            place = again[centre]
            merged[place] = replace(tokens[place], hidden=sum(members) / len(members))
        left = []
        for place, token in enumerate(tokens):
            if place in merged and not repack:
                left.append(merged[place])
            elif token.role not in IMAGE or place in stay:
                left.append(token)
            if repack and place == image[-1]:
                left += merged.values()
        return left

    return step


@pytest.mark.parametrize(
    "method",
    [
        "sparsevlm(layers=(0, 1), retention_ratio=0.6)",
        "sparsevlm(layers=(0, 1), retention_ratio=0.5, positions='keep')",
        "sparsevlm(layers=(1,), retention_ratio=0.7)",
    ],
)
def test_sparsevlm_is_its_definition(model: Any, method: str) -> None:
    built = get(method)
    compare(model, built, nothing, lambda *prompt: sparse(built, *prompt, built.positions == "repack"))


def compare(model: Any, method: Compressor, middle: Any, end: Any) -> None:
    """Answer a picture alone and two in one prompt."""
    for seed, sizes in enumerate([SIZES[1:2], [SIZES[0], (84, 84)]]):
        row, images = prompt(seed, images=len(sizes)), given(model, sizes)
        model.method = get("none")
        own = end if end is nothing else end(row, model, images)
        wanted, logits = by_lists(model, row, images, middle, own, method.positions == "repack")  # type: ignore[attr-defined]
        _, whole = answered(model, row, images)
        model.method = method
        found, same = answered(model, row, images)
        assert found == wanted
        torch.testing.assert_close(same, logits, rtol=0, atol=2e-5)
        assert (whole[0] - same[0]).abs().max() > 2e-4, "merging makes a difference"


def test_the_reference_is_the_model(model: Any) -> None:
    row, images = prompt(1), given(model, SIZES[:1])
    model.method = get("none")
    wanted, logits = by_lists(model, row, images, nothing, nothing, repack=True)
    found, same = answered(model, row, images)
    assert found == wanted
    torch.testing.assert_close(same, logits, rtol=0, atol=2e-5)
