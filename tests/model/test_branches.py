"""Rows that share a beginning see it and themselves, nothing else, and hold it once."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from llava.model.language_model.branches import Branches, branching, fold
from llava.model.language_model.prefix import SharedPrefix
from tests.model.test_prefix import SIZES, SLOT, encoded, ids, padded, until_eos, whole


def beginnings(units, length, heads=2, width=3):
    cache = DynamicCache()
    cache.update(torch.randn(units, heads, length, width), torch.randn(units, heads, length, width), 0)
    return cache


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_visible_keys_against_a_loop(data):
    units, rows, shared = (data.draw(st.integers(1, high)) for high in (3, 4, 5))
    steps = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    cache = Branches(beginnings(units, shared), rows)
    own: list[tuple[int, int]] = []  # row and step of every key past the beginning
    for number, length in enumerate(steps):
        before, total = sum(steps[:number]), shared + sum(steps[: number + 1])
        bits = data.draw(st.lists(st.booleans(), min_size=units * rows * total, max_size=units * rows * total))
        mask = torch.tensor(bits, dtype=torch.long).view(units * rows, total)
        new = [(row, before + step) for step in range(length) for row in range(rows)]
        own += new
        tokens = torch.zeros(units * rows, length)
        seen = cache.visible(mask, tokens)
        assert torch.equal(cache.visible(None, tokens), cache.visible(torch.ones_like(mask), tokens))
        assert seen.shape == (units, 1, len(new), shared + len(own))
        for unit in range(units):
            for place, (row, step) in enumerate(new):
                sees = mask[unit * rows + row].bool()
                wanted = sees[:shared].tolist()
                wanted += [r == row and (s == step or (s < step and bool(sees[shared + s]))) for r, s in own]
                assert seen[unit, 0, place].tolist() == wanted
        states = torch.randn(units * rows, 2, length, 3)
        keys, _ = cache.update(states, states, 0)
        assert cache.get_seq_length() == total
        for place, (row, step) in enumerate(new):  # keys lie where the mask says
            kept = keys[:, :, shared + len(own) - len(new) + place]
            assert torch.equal(kept, states.unflatten(0, (units, rows))[:, row, :, step - before])


def test_fold_puts_rows_side_by_side():
    states = torch.arange(2 * 3 * 4).view(6, 1, 4, 1)  # two beginnings, three rows, four steps
    assert fold(states, 3)[:, 0, :, 0].tolist() == [
        [0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11],
        [12, 16, 20, 13, 17, 21, 14, 18, 22, 15, 19, 23],
    ]


def test_several_rows_from_several_images(model):
    system = ids(7, 0)
    shared = SharedPrefix.empty(model, 1).extend(model, system[None])
    images = shared.rows([0] * 3).extend(model, SLOT.expand(3, 1), [encoded(model, size) for size in SIZES])
    before = [layer.keys.clone() for layer in images.cache.layers]
    questions = [ids(3 + 5 * (turn % 3) + image, 10 * image + turn) for image in range(3) for turn in range(4)]
    wanted = [whole(model, torch.cat((system, SLOT[0], q)), SIZES[i // 4]) for i, q in enumerate(questions)]
    for side in ("left", "right"):
        output = model.generate_after(images, *padded(questions, side), max_new_tokens=8).tolist()
        assert [until_eos(row) for row in output] == [until_eos(row) for row in wanted]
    assert len({tuple(row) for row in wanted}) > 8, "the miniature tells the questions apart"
    for layer, keys in zip(images.cache.layers, before, strict=True):
        assert torch.equal(layer.keys, keys), "the beginnings stay as they are"


def test_the_beginning_is_held_once(model, monkeypatch):
    prefix = SharedPrefix.empty(model, 1).extend(model, torch.cat((ids(5, 1), ids(40, 2)))[None])
    sizes = []
    update = DynamicLayer.update

    def updating(layer, *states, **kwargs):
        keys, values = update(layer, *states, **kwargs)
        sizes.append(keys.shape)
        return keys, values

    monkeypatch.setattr(DynamicLayer, "update", updating)
    questions = torch.stack([ids(6, seed) for seed in range(8)])
    output = model.generate_after(prefix, questions, max_new_tokens=3, min_new_tokens=3)
    layers = len(prefix.cache.layers)
    assert output.shape == (8, 3)
    assert [shape[0] for shape in sizes] == [1] * len(sizes)
    assert [shape[2] for shape in sizes[::layers]] == [45 + 8 * 6, 45 + 8 * 7, 45 + 8 * 8]


def test_padding_from_nothing_is_a_number(model):
    rows = [ids(2, 3), ids(9, 4), ids(5, 5)]
    output = model.generate_after(SharedPrefix.empty(model, 1), *padded(rows), max_new_tokens=5).tolist()
    wanted = [whole(model, row, None, 5) for row in rows]
    assert [until_eos(row) for row in output] == [until_eos(row) for row in wanted]


def test_attention_is_as_before_afterwards(model):
    before = model.config._attn_implementation
    prefix = SharedPrefix.empty(model, 1).extend(model, ids(5, 1)[None])
    model.generate_after(prefix, ids(3, 2)[None], max_new_tokens=1)
    assert model.config._attn_implementation == before
    with pytest.raises(KeyError), branching(model.get_model()):
        raise KeyError
    assert model.config._attn_implementation == before
