"""What every method that works inside the language model keeps to, on random sequences of no model."""

from typing import Any

import pytest
import torch
from torch import Tensor

from llava.compress import get
from llava.compress.base import Compressor
from llava.compress.stages import NEWLINE, PAD, PREFIX, TEXT, VISUAL, LayerTokens, places_of
from llava.model.language_model.inside import gather_kept

DEPTH, WIDTH = 12, 8
SPECS = [
    "fastv(retention_ratio=0.5)",
    "sparsevlm(layers=(2, 5), retention_ratio=0.5)",
    "sparsevlm(layers=(1, 3, 6), retention_ratio=0.5, recycle=False, positions='keep')",
    "sparsevlm(layers=(1, 3, 6), retention_ratio=0.3333, profile='released')",
    "ficoco_l(control_encoding_layer=1, retention_ratio=0.7)",
    "ficoco_l(control_encoding_layer=1, retention_ratio=0.7, profile='paper', positions='repack')",
    "ficoco_l(control_encoding_layer=0, layers=1, retention_ratio=0.3)",
]
every_method = pytest.mark.parametrize("spec", SPECS)
# Image tokens of three prompts, the last without an image, and the words behind them.
IMAGES, WORDS = (60, 33, 0), (5, 9, 4)


def roles() -> Tensor:
    rows = []
    for n, m in zip(IMAGES, WORDS, strict=True):
        image = [NEWLINE if place % 7 == 6 else VISUAL for place in range(n)]
        rows.append(torch.tensor([*[PREFIX] * 3, *image, *[TEXT] * m]))
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD, padding_side="left")


def run(method: Compressor, role: Tensor, hidden: Tensor, rows: slice = slice(None)) -> list[tuple[Tensor, Tensor]]:
    """Go from point to point as a model would: hidden states and roles behind each, layers doing nothing between."""
    n_visual, n_text = IMAGES[rows], WORDS[rows]
    counts = [method.visual_per_layer(n, DEPTH) for n in n_visual]
    entry, memo, found = hidden, {}, []  # type: ignore[var-annotated]
    for layer in method.points_in(DEPTH):
        before, length = hidden.clone(), role.shape[1]
        seen = torch.ones(length, length, device=role.device).tril().bool() & (role != PAD)[:, None]
        maps = (hidden.float() @ hidden.float().mT).masked_fill(~seen, -torch.inf).softmax(-1)[:, None]

        def attention(asked: Tensor, prompts: slice = slice(None), maps: Tensor = maps) -> Tensor:
            return maps[prompts].gather(2, asked[:, None, :, None].expand(-1, -1, -1, maps.shape[3]))

        tokens = LayerTokens(
            layer=layer,
            depth=DEPTH,
            hidden=hidden,
            role=role,
            n_visual=n_visual,
            attention=attention,
            queries_keys=lambda x=hidden.float(): (x, x.flip(-1)),
            n_text=n_text,
            entry=entry,
            memo=memo,
        )
        reduction = method.reduce_in_llm(tokens)
        if role.device.type != "meta":
            assert torch.equal(hidden, before), "arguments are left alone"
            text = (role == PREFIX) | (role == TEXT)
            assert bool((reduction.keep | ~text).all()), "text stays"
            assert tuple((reduction.keep & tokens.image).sum(1).tolist()) == reduction.n_visual
        left = layer + 1 if layer + 1 < DEPTH else layer
        assert method.llm_middle or reduction.n_visual == tuple(count[left] for count in counts)
        now = tuple(count[layer] for count in counts)
        chosen, role = gather_kept(reduction, role, now)
        hidden = hidden if reduction.hidden is None else reduction.hidden
        assert hidden.dtype == entry.dtype
        hidden = hidden.gather(1, chosen[..., None].expand(-1, -1, WIDTH))
        found.append((hidden, role))
    return found


def noise(dtype: torch.dtype = torch.float32) -> Tensor:
    role = roles()
    hidden = torch.randn(*role.shape, WIDTH, generator=torch.Generator().manual_seed(0)).to(dtype)
    return hidden.masked_fill((role == PAD)[..., None], 0)


@every_method
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_padded_batch_is_its_prompts(spec: str, dtype: torch.dtype) -> None:
    method, role, hidden = get(spec), roles(), noise(dtype)
    together = run(method, role, hidden)
    assert len(together) == len(method.points_in(DEPTH))
    for row in range(3):
        own = role[row] != PAD
        alone = run(method, role[row : row + 1, own], hidden[row : row + 1, own], slice(row, row + 1))
        for (x, kinds), (y, mine) in zip(together, alone, strict=True):
            there = kinds[row] != PAD
            assert kinds[row, there].tolist() == mine[0].tolist()
            torch.testing.assert_close(x[row, there], y[0])
    assert together[-1][1][2].tolist()[-7:] == [PREFIX] * 3 + [TEXT] * 4


@every_method
def test_nothing_is_read_from_the_device(spec: str) -> None:
    # A meta tensor holds no values: whatever asks for one raises.
    behind = run(get(spec), roles().to("meta"), noise().to("meta"))
    assert len(behind) == len(get(spec).points_in(DEPTH))
    for hidden, role in behind:
        assert hidden.device.type == role.device.type == "meta"


@every_method
def test_methods_read_back_and_say_what_they_are(spec: str) -> None:
    method = get(spec)
    assert get(str(method)) == method
    assert not method.query_agnostic
    assert "Differs from the released code in:" in (type(method).__doc__ or "")


def test_places() -> None:
    chosen = torch.tensor([[0, 1, 0, 1], [1, 1, 1, 0]]).bool()
    assert places_of(chosen, 2).tolist() == [[1, 3], [0, 1]]
    assert places_of(chosen[0], 0).tolist() == []


def test_tokens_without_a_layer_offer_no_queries() -> None:
    given: Any = {"layer": 0, "depth": 1, "hidden": noise(), "role": roles(), "n_visual": IMAGES}
    with pytest.raises(RuntimeError, match="no queries"):
        LayerTokens(attention=lambda rows: rows, **given).queries_keys()
