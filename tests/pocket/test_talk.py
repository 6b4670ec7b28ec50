"""Stage 2: questions that share an image learn exactly what each would learn alone, in LLaVA's own forward."""

from collections import Counter
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.eval.run_llava import build_prompt
from llava.mm_utils import tokenizer_image_token
from llava.pocket.questions import TASKS, Asked
from llava.pocket.scenes import Scene, make_scene
from llava.pocket.talk import LONG, SHORT, Conversation, Talking, choose_questions, converse, tell
from tests.pocket.oracle import truth
from tests.pocket.tiny import ASKED, conversation, undrawn, untrained, views_of

GRIDS = [(2, 1), (2, 2), (1, 3)]


class Alone(NamedTuple):
    """A question run by itself."""

    asked: Asked
    loss: Tensor
    logits: Tensor
    """`[A, vocabulary]`, from which the answer's tokens are said."""
    answer: Tensor


def shown(grid: tuple[int, int], number: int = 2) -> list[Scene]:
    return [make_scene("train", 100 + index, grid) for index in range(number)]


def one_by_one(model: Any, words: Any, scenes: list[Scene]) -> list[Alone]:
    """Run every question with its whole prompt through LLaVA's forward, as upstream trains."""
    asked = choose_questions(scenes, np.random.default_rng(1), ASKED)
    found = []
    for scene, views, own in zip(scenes, views_of(scenes), asked, strict=True):
        for one in own:
            prompt = tokenizer_image_token(build_prompt(one.prompt, 1, model.config), words)
            answer = [*words(one.answer, add_special_tokens=False).input_ids, words.eos_token_id]
            ids = torch.tensor([[*prompt, *answer]])
            labels = torch.tensor([[IGNORE_INDEX] * len(prompt) + answer])
            output = model(input_ids=ids, images=[views], image_sizes=[scene.image.size], labels=labels)
            logits = output.logits[0, -len(answer) - 1 : -1]
            found.append(Alone(one, output.loss, logits, torch.tensor(answer)))
    return found


@pytest.mark.parametrize("grid", GRIDS)
def test_loss_and_logits_are_those_of_every_question_alone(grid: tuple[int, int], model: Any, words: Any) -> None:
    scenes = shown(grid)
    talking, heard = Talking(model), []
    hook = model.register_forward_hook(lambda module, inputs, output: heard.append(output.logits))
    with torch.no_grad():
        found = talking(conversation(scenes, words, model.config))
    hook.remove()
    (logits,) = heard
    with torch.no_grad():
        alone = one_by_one(model, words, scenes)
    assert len(logits) == len(alone) == 2 * len(ASKED)
    for row, one in zip(logits, alone, strict=True):
        torch.testing.assert_close(row[-len(one.answer) - 1 : -1], one.logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found["loss"], torch.stack([one.loss for one in alone]).mean(), atol=1e-4, rtol=1e-4)
    losses = [float(F.cross_entropy(one.logits, one.answer)) for one in alone]
    assert float(found["loss"]) == pytest.approx(np.mean(losses), abs=1e-4)
    assert np.std(losses) > 0.1, "questions can be told apart"


def test_right_is_right_to_the_last_token_by_task(model: Any, words: Any) -> None:
    """Labels that the model says by itself are right; one wrong token makes an answer wrong."""
    scenes = shown((2, 1))
    batch, talking, heard = conversation(scenes, words, model.config), Talking(model), []
    hook = model.register_forward_hook(lambda module, inputs, output: heard.append(output.logits))
    with torch.no_grad():
        assert talking(batch)["right"] == 0
        said = F.pad(heard[0].argmax(-1)[:, :-1], (1, 0))
        labels = torch.where(batch.labels == IGNORE_INDEX, IGNORE_INDEX, said)
        for row in (0, 7):
            labels[row, -1] = (labels[row, -1] + 1) % len(words)
        found = talking(replaced(batch, labels))
    hook.remove()
    wrong = Counter(batch.tasks[row] for row in (0, 7))
    asked = Counter(batch.tasks)
    assert float(found["right"]) == pytest.approx(1 - 2 / len(batch.tasks))
    assert found.keys() == {"loss", "right", *asked}
    for task, number in asked.items():
        assert float(found[task]) == pytest.approx(1 - wrong[task] / number)


def replaced(batch: Conversation, labels: Tensor) -> Conversation:
    return Conversation(batch.views, batch.sizes, batch.prefix, batch.ids, batch.mask, labels, batch.tasks)


def test_rows_are_template_question_answer_and_end(model: Any, words: Any) -> None:
    """What is fed is LLaVA's prompt, what is learnt the answer and the end, and nothing of one is in the other."""
    scenes = shown((2, 1))
    asked = [one for own in choose_questions(scenes, np.random.default_rng(1), ASKED) for one in own]
    batch = conversation(scenes, words, model.config)
    assert batch.prefix[-1] == IMAGE_TOKEN_INDEX
    assert (batch.prefix == IMAGE_TOKEN_INDEX).sum() == 1
    assert not (batch.ids == IMAGE_TOKEN_INDEX).any()
    for one, ids, mask, labels in zip(asked, batch.ids, batch.mask, batch.labels, strict=True):
        assert mask.tolist() == sorted(mask.tolist()), "padding is on the left"
        assert (labels[~mask.bool()] == IGNORE_INDEX).all()
        ids, labels = ids[mask.bool()], labels[mask.bool()]
        learnt = labels != IGNORE_INDEX
        assert learnt.tolist() == sorted(learnt.tolist())
        assert torch.equal(ids[learnt], labels[learnt])
        assert words.decode(labels[learnt]).strip() == f"{one.answer}</s>"
        whole = torch.cat((batch.prefix, ids[~learnt]))
        assert whole.tolist() == tokenizer_image_token(build_prompt(one.prompt, 1, model.config), words)
        text = words.decode(torch.cat((batch.prefix[:-1], ids)))
        assert text.endswith(f"{one.prompt} ASSISTANT: {one.answer}</s>")


def test_projector_newline_and_language_model_learn_and_the_tower_does_not(words: Any) -> None:
    model = untrained(len(words))
    Talking(model)(conversation(shown((2, 1)), words, model.config))["loss"].backward()
    learning = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert {name for name in learning if "vision_tower" in name} == set()
    assert {"model.image_newline", "model.mm_projector.0.weight", "model.mm_projector.2.bias"} < learning
    for name, weight in model.named_parameters():
        if name in learning:
            assert weight.grad is not None, name
            assert weight.grad.abs().max() > 0, name
        else:
            assert "vision_tower" in name
            assert weight.grad is None


def test_gradients_are_those_of_every_question_alone(words: Any) -> None:
    """What the shared image learns is the sum of what its questions would teach it."""
    model, scenes = untrained(len(words)), shown((2, 1))
    weights = dict(Talking(model).named_parameters())
    names = ["mm_projector.0.weight", "image_newline", "layers.0.self_attn.k_proj.weight", "embed_tokens.weight"]
    chosen = [weights[f"model.model.{name}"] for name in names]
    together = torch.autograd.grad(Talking(model)(conversation(scenes, words, model.config))["loss"], chosen)
    alone = torch.stack([one.loss for one in one_by_one(model, words, scenes)]).mean()
    for found, wanted in zip(together, torch.autograd.grad(alone, chosen), strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("tasks", [SHORT, LONG])
def test_every_scene_is_asked_as_much_as_wanted(tasks: dict[str, int]) -> None:
    seen: Counter[str] = Counter()
    for step in range(20):
        scenes = undrawn("train", 60)[2 * step : 2 * step + 2]
        chosen = choose_questions(scenes, np.random.default_rng(step), tasks)
        assert [len(own) for own in chosen] == [sum(tasks.values())] * 2
        for scene, own in zip(scenes, chosen, strict=True):
            for one in (one for one in own if not one.options and one.task != "mmvet"):
                assert truth(scene, one.text).lower() == one.answer.lower()
        seen.update(one.task for own in chosen for one in own)
    assert seen.keys() == set(tasks)
    for task, number in tasks.items():
        assert seen[task] > 20 * number, "of 40, or as many as scenes allow"


def test_all_tasks_are_asked_and_with_their_likes() -> None:
    assert {*SHORT, *LONG} == set(TASKS)
    assert not set(SHORT) & set(LONG)


def test_a_scene_with_little_to_ask_is_asked_again(words: Any, model: Any) -> None:
    """One thing only: fewer different questions than rows is no reason to stop."""
    scene = next(s for s in (make_scene("train", index) for index in range(60)) if len(s.things) == 1)
    (own,) = choose_questions([scene], np.random.default_rng(0), SHORT)
    assert len(own) == sum(SHORT.values())
    batch = converse([own], views_of([scene]), [scene.image.size], words, model.config)
    assert batch.ids.shape == batch.mask.shape == batch.labels.shape
    assert batch.tasks == [one.task for one in own]


@pytest.mark.parametrize(("told", "some"), [(0.0, 0), (0.5, 0.5), (1.0, 1)])
def test_as_many_choices_as_wanted_are_told(told: float, some: float) -> None:
    """The context says the right option and none of the others; everything else stays."""
    scenes, seen = undrawn("train", 60), Counter[bool]()
    plain, with_hints = (choose_questions(scenes, np.random.default_rng(0), LONG, share) for share in (0, told))
    assert [(a.task, a.template) for a in plain[0]] == [(a.task, a.template) for a in with_hints[0]]
    for asked in (asked for own in with_hints for asked in own):
        if not asked.options:
            assert not asked.hint
            continue
        right = asked.options["ABCD".index(asked.answer)]
        seen[right in asked.hint.rstrip(".。").replace("是", " ").split()] += 1
        assert asked.hint in asked.prompt
    assert seen[True] / seen.total() == pytest.approx(some, abs=0.1)


def test_what_is_told_is_true() -> None:
    for scene in undrawn("train", 40):
        for task in ("scienceqa", "mmbench"):
            for asked in TASKS[task](scene, np.random.default_rng(0)):
                told = tell(asked).hint
                right = asked.options["ABCD".index(asked.answer)]
                assert told.split()[-1] == f"{right}."
                others = [option for option in asked.options if option != right]
                assert not any(option in told.split() for option in others if option not in asked.text)
                assert tell(asked).text == asked.text
