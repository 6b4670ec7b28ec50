"""Stage 1: patches are labelled and captions written as scenes are, and both losses are what they are by hand."""

from math import log

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llava.pocket.model import build_tower
from llava.pocket.scenes import CELL, CHARACTERS, COLOURS, KINDS, SIDE, TILE, Scene
from llava.pocket.see import ASPECTS, PHRASES, Seeing, Seen, caption, label_cells, label_views
from tests.pocket.tiny import VISION, arrange, drawn, put, undrawn, views_of


@pytest.fixture
def seeing() -> Seeing:
    return Seeing(build_tower(*VISION))


def shown_at(scene: Scene, x: int, y: int) -> tuple[int, int, int]:
    """What a pixel of the canvas belongs to: number of its kind, colour and character, 0 for the ground."""
    for thing in scene.things:
        left, top = thing.left * CELL, thing.top * CELL
        right, bottom = left + thing.width * CELL, top + thing.height * CELL
        if left <= x < right and top <= y < bottom:
            letter = 0
            if thing.text:
                letter = 1 + CHARACTERS.index(thing.text[(x - left) * len(thing.text) // (right - left)])
            return 1 + KINDS.index(thing.kind), 1 + list(COLOURS).index(thing.colour), letter
    return 0, 0, 0


def test_every_patch_shows_what_its_middle_pixel_shows() -> None:
    """Crops pixel by pixel; a thumbnail's patch covers a block of the canvas, whose middle counts."""
    for scene in undrawn("test", 25):
        cols, rows = scene.grid
        labels = label_views(scene)
        assert labels.shape == (1 + cols * rows, 3, SIDE, SIDE)
        for down in range(SIDE):
            for across in range(SIDE):
                x, y = (CELL * n * (2 * place + 1) // 2 for n, place in ((cols, across), (rows, down)))
                assert tuple(labels[0, :, down, across].tolist()) == shown_at(scene, x, y)
                for view in range(cols * rows):
                    x = view % cols * TILE + across * CELL + CELL // 2
                    y = view // cols * TILE + down * CELL + CELL // 2
                    assert tuple(labels[1 + view, :, down, across].tolist()) == shown_at(scene, x, y)


def test_labels_by_hand() -> None:
    note = put("note", "red", 4, 2, 4, 2, text="17", big=True)
    cells = label_cells(arrange(note, put("ring", "white", 20, 23), grid=(2, 2)))
    assert cells.shape == (3, 24, 24)
    assert cells[:, 2, 4:8].tolist() == [[8] * 4, [1] * 4, [2, 2, 8, 8]]
    assert cells[:, 2:4].sum() == 2 * cells[:, 2].sum() == cells.sum() - cells[:, 23:].sum()
    assert cells[:, 23, 20].tolist() == [5, 7, 0]


def test_captions_say_what_is_in_each_view() -> None:
    for scene in undrawn("train", 60):
        cols, rows = scene.grid
        wanted: list[list[str]] = [[] for _ in range(1 + cols * rows)]
        for thing in scene.things:
            col, row = thing.left * CELL // TILE, thing.top * CELL // TILE
            for view in (0, 1 + row * cols + col):
                wanted[view] += [f"{thing.colour} {thing.kind}", *thing.text]
        assert [sorted(map(phrase, ids.tolist())) for ids in caption(scene)] == list(map(sorted, wanted))
        assert all(ids.dtype == torch.long and ids.tolist() == sorted(ids.tolist()) for ids in caption(scene))


def phrase(number: int) -> str:
    """What a phrase's number stands for: kinds outside, colours inside, then characters."""
    names = [f"{colour} {kind}" for kind in KINDS for colour in COLOURS] + list(CHARACTERS)
    assert len(names) == PHRASES
    return names[number]


def spoken(seeing: Seeing, ids: Tensor) -> Tensor:
    """A caption's feature, one caption at a time."""
    return F.normalize(seeing.caption(seeing.phrases.weight[ids].sum(0)), dim=-1)


def test_equal_captions_are_all_right_and_views_of_nothing_do_not_count(seeing: Seeing) -> None:
    """By hand: views 0 and 2 show the same, view 1 nothing, view 3 something else."""
    captions = [torch.tensor(ids, dtype=torch.long) for ids in ([3, 70], [], [3, 70], [5])]
    images = torch.randn(4, VISION[0], requires_grad=True)
    found = seeing._contrast(images, captions)
    shown = [0, 2, 3]
    scale = seeing.scale.exp()
    scores = [[scale * F.normalize(images[i], dim=0) @ spoken(seeing, captions[j]) for j in shown] for i in shown]
    shares = [[0.5, 0.5, 0], [0.5, 0.5, 0], [0, 0, 1]]
    loss = torch.zeros(())
    for one in range(3):
        for other in range(3):
            from_image = scores[one][other] - torch.stack(scores[one]).logsumexp(0)
            from_text = scores[other][one] - torch.stack([row[one] for row in scores]).logsumexp(0)
            loss = loss - shares[one][other] * (from_image + from_text) / 6
    torch.testing.assert_close(found["caption_loss"], loss)
    best = [max(range(3), key=lambda other, row=row: row[other].item()) for row in scores]
    assert float(found["caption"]) == pytest.approx(sum(shares[n][b] > 0 for n, b in enumerate(best)) / 3)
    found["caption_loss"].backward()
    assert images.grad is not None
    assert images.grad[1].abs().max() == 0
    assert images.grad[[0, 2, 3]].abs().sum(1).min() > 0


def test_views_that_match_their_captions_are_right(seeing: Seeing) -> None:
    """Whichever of equal captions is nearest; a view that matches another's caption is wrong."""
    captions = [torch.tensor(ids) for ids in ([1], [2, 80], [1], [2, 80], [9])]
    with torch.no_grad():
        seeing.scale.fill_(log(50))
        images = torch.stack([spoken(seeing, ids) for ids in captions])
        found = seeing._contrast(images, captions)
        assert found["caption"] == 1
        assert float(found["caption_loss"]) >= 0.8 * log(2) - 1e-4, "two right answers share the certainty"
        swapped = seeing._contrast(images[[1, 0, 3, 2, 4]], captions)
    assert float(swapped["caption"]) == pytest.approx(0.2)
    assert swapped["caption_loss"] > found["caption_loss"]


def test_patch_losses_by_hand(seeing: Seeing) -> None:
    """Two patches, one of a blue note with a 7 and one of nothing: probabilities 1/2 and 3/4 of what is there."""
    sizes = list(ASPECTS.values())
    assert sizes == [9, 9, 37]
    truth = torch.tensor([[[0, 8], [0, 3], [0, 8]]])  # [1, 3, 2]
    logits = torch.zeros(1, 2, sum(sizes))
    for start, size, label in zip((0, 9, 18), sizes, (8, 3, 8), strict=True):
        logits[0, 0, start] = log(3 * (size - 1))
        logits[0, 1, start + label] = log(size - 1)
    found = seeing._dense(logits, truth)
    for name in ASPECTS:
        assert float(found[f"{name}_loss"]) == pytest.approx(log(2) + log(4 / 3))
        assert found[name] == 1
    truth[0, 0, 1] = 2
    found = seeing._dense(logits, truth)
    assert float(found["kind_loss"]) == pytest.approx(log(2 * 8) + log(4 / 3))
    assert (found["kind"], found["colour"]) == (0, 1)


def test_rare_objects_weigh_as_much_as_the_ground(seeing: Seeing) -> None:
    """Nineteen patches of nothing and one of something: each side's mean counts once."""
    logits, truth = torch.randn(2, 10, sum(ASPECTS.values())), torch.zeros(2, 3, 10, dtype=torch.long)
    truth[1, :, 4] = torch.tensor([2, 5, 0])
    found = seeing._dense(logits, truth)
    each = -logits[..., :9].log_softmax(-1)
    ground = torch.cat((each[0, :, 0], each[1, :4, 0], each[1, 5:, 0]))
    torch.testing.assert_close(found["kind_loss"], each[1, 4, 2] + ground.mean())
    nothing = -logits[..., 18:].log_softmax(-1)[..., 0].mean()
    torch.testing.assert_close(found["character_loss"], nothing)
    assert found["character"] == 0


def test_patches_are_read_where_llava_reads_them() -> None:
    """The dense loss trains nothing behind LLaVA's layer; the caption loss goes through the [CLS] token to the end."""
    seeing, shown = Seeing(build_tower(*VISION)), drawn("train", 2)
    views = views_of(shown)
    batch = Seen(torch.cat(views), torch.cat([label_views(s) for s in shown]), [i for s in shown for i in caption(s)])
    found = seeing(batch)
    assert found.keys() == {*ASPECTS, *(f"{name}_loss" for name in ASPECTS), "caption_loss", "caption"}
    last = seeing.tower.encoder.layers[-1].mlp.fc1.weight
    before = seeing.tower.encoder.layers[-2].mlp.fc1.weight
    dense = sum(found[f"{name}_loss"] for name in ASPECTS)
    grads = torch.autograd.grad(dense, (last, before), retain_graph=True, allow_unused=True)
    assert grads[0] is None
    assert grads[1].abs().max() > 0
    grads = torch.autograd.grad(found["caption_loss"], (last, before))
    assert all(grad.abs().max() > 0 for grad in grads)
