"""What methods need in memory: the meter against tensors counted by hand, and every method at a miniature's scale."""

import json
from typing import Any

import pytest
import torch

from llava.compress import available, get
from llava.compress.base import Compressor, Selection, Taps, Views
from llava.compress.stages import LayerTokens, Reduction
from llava.efficiency import peak
from llava.efficiency.peak import MOVED, Geometry, Idle, answer, build, compare, measure
from tests.conftest import Command

SMALL = Geometry(
    width=32,
    inner=48,
    heads=4,
    layers=8,
    tower_width=32,
    tower_heads=4,
    side=8,
    text=20,
    image_size=(224, 224),
    dtype="float32",
)
TOKENS = 20 + 5 * 64 + 16  # prompt, five views and the newlines of 16 rows


def test_idle_products_have_the_size_of_real_ones() -> None:
    draw = [torch.randn(2, 4, 5, 8, dtype=torch.bfloat16) for _ in range(3)]
    linear = torch.nn.Linear(8, 6, dtype=torch.bfloat16)

    def products() -> list[torch.Tensor]:
        return [
            draw[0][0, 0] @ draw[1][0, 0].T,
            draw[0] @ draw[1].mT,
            linear(draw[0]),
            torch.baddbmm(torch.zeros(4, 5, 5, dtype=torch.bfloat16), draw[0][0], draw[1][0].mT),
            torch.nn.functional.scaled_dot_product_attention(*draw, is_causal=True),
        ]

    with torch.no_grad():
        real = products()
        with Idle():
            idle = products()
    assert [(t.shape, t.dtype) for t in idle] == [(t.shape, t.dtype) for t in real]
    assert not any(t.any() for t in idle)
    assert all(t.any() for t in real)


def test_leaving_the_arithmetic_out_changes_no_number() -> None:
    specs = ["globalcom2", "tome", MOVED["sparsevlm"], MOVED["ficoco_vl"]]
    assert measure(specs, SMALL, 0.25) == measure(specs, SMALL, 0.25, compute=True)


@pytest.fixture
def run(command: Command):
    def run(*arguments: str) -> tuple[int, str, str]:
        sizes = {name: value for name, value in vars(SMALL).items() if name != "image_size"}
        given = [f"--{name.replace('_', '-')}={value}" for name, value in sizes.items()]
        return command(peak.main, *given, "--image-size=224x224", *arguments)

    return run


def test_no_method_needs_an_attention_map(run) -> None:
    code, out, _ = run("--json")
    rows = {row["method"].split("(")[0]: row for row in json.loads(out)}
    assert code == 0
    assert sorted(rows) == [name for name in available() if name != "none"]
    for name, row in rows.items():
        # Five views of 65 tokens; the whole uncompressed sequence; four heads; four bytes a number.
        assert row["tower"]["map"] == 5 * 4 * 65**2 * 4, name
        assert row["llm"]["map"] == 4 * TOKENS**2 * 4, name
        for stage in ("tower", "llm"):
            assert row[stage]["share"] == row[stage]["bytes"] / row[stage]["map"] < 1, name
    # A row of attention takes the layer's keys in float32, and no less; the [CLS] row those of all views.
    assert rows["fastv"]["llm"]["bytes"] >= TOKENS * 32 * 4
    assert rows["fastervlm"]["tower"]["bytes"] >= 5 * 65 * 32 * 4
    # Who does nothing inside the language model lays nothing by for it.
    assert all(rows[name]["llm"]["bytes"] == 0 for name in ("globalcom2", "uniform", "pool", "tome", "thumbnail_only"))


class Wasteful(Compressor):
    """Makes whole maps, in both places."""

    name = "wasteful"
    taps = Taps(keys=(-2,))
    query_agnostic = False

    @property
    def llm_points(self) -> tuple[int, ...]:
        return (1,)

    def select(self, views: Views) -> Selection:
        keys = views.keys[-2].float().unflatten(-1, (4, -1)).transpose(1, 2)  # [V, H, N, C/H]
        torch.cat((keys @ keys.mT, keys @ keys.mT))
        return super().select(views)

    def reduce_in_llm(self, tokens: LayerTokens) -> Reduction:
        everything = torch.arange(tokens.role.shape[1])[None]
        tokens.attention(everything)
        return Reduction(keep=torch.ones_like(tokens.image), n_visual=tokens.n_visual)


def test_a_method_that_makes_a_map_is_found_out(run, monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.no_grad(), Idle():
        model = build(SMALL)
        plain = answer(model, get("none"), SMALL, {})
        found = compare(plain, answer(model, Wasteful(), SMALL, plain.points), SMALL)
    assert found["tower"]["share"] > 1
    assert found["llm"]["share"] > 1
    assert plain.own["llm"] == 0
    monkeypatch.setattr(peak, "measure", lambda *_: [found])
    assert run("--method", "none")[0] == 1


def test_the_model_is_left_as_it_was() -> None:
    with torch.no_grad(), Idle():
        model = build(SMALL)
        method = model.method
        for _ in range(2):
            answer(model, get("visionzip"), SMALL, {})
    assert model.method is method
    hooks = [m._forward_hooks or m._forward_pre_hooks for m in model.modules()]
    assert not any(hooks)
    assert peak.attach.cls_logits.__module__ == "llava.compress.attention"


def test_the_text_is_aligned_and_says_the_same(run) -> None:
    _, out, _ = run("--method=fastv(budget='after')", "--method=hired")
    head, *lines = out.splitlines()
    assert " ".join(head.split()) == "method tower: MiB tower: of a map llm: MiB llm: of a map"
    assert [line.split("(")[0] for line in lines] == ["fastv", "hired"]
    assert len({len(line) for line in (head, *lines)}) == 1
    data: list[dict[str, Any]] = json.loads(run("--method=fastv(budget='after')", "--method=hired", "--json")[1])
    for line, row in zip(lines, data, strict=True):
        shares = [f"{row[stage]['share']:.1%}" for stage in ("tower", "llm")]
        assert [word for word in line.split() if word.endswith("%")] == shares


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--method", "nosuch"], "nosuch"),
        (["--method", "ficoco_l"], "ficoco_l"),  # cannot go as low in eight layers
        (["--width", "30"], "30 and 4"),
        (["--layers", "0"], "at least 1"),
        (["--dtype", "float8"], "float8"),
        (["--retention-ratio", "2"], "(0, 1], got 2"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments: list[str], word: str, run) -> None:
    code, out, err = run(*arguments)
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert word in err
