"""EvalAI's normaliser with its quirks, and the accuracy over ten people."""

import json
from pathlib import Path
from typing import Any

import pytest

from llava.constants import InputError
from llava.eval.benchmarks._vqa import answer_scores, contractions
from llava.eval.m4c_evaluator import EvalAIAnswerProcessor, TextVQAAccuracyEvaluator


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("Yes", "yes"),
        ("The two, dogs.", "2 dogs"),
        ("1,000", "1000"),
        ("what?", "what"),
        ("John's dog", "john 's dog"),
        ("'s", "'s"),
        (" \nhello\tworld\n", "hello world"),
        # a sign that touches no space becomes one; if it touches one anywhere, every one of it is deleted
        ("half-way", "half way"),
        ("half - way", "half way"),
        ("on-off - two", "onoff 2"),
        ("(x)", "x"),
        ("x;-y-z", "x y z"),  # the space that ";" leaves does not count for "-"
        ("50%", "50%"),
        ("$5", "$5"),
        ("a:b", "a:b"),
        # full stops go unless a digit follows, 32 of them
        ("3.14", "3.14"),
        ("3.", "3"),
        ("U.S.", "us"),
        ("x.5", "x.5"),
        ("." * 40, "." * 8),
        # words: numbers, articles, contractions, in this order
        ("none", "0"),
        ("zero ten eleven", "0 10 eleven"),
        ("an apple a day the end", "apple day end"),
        ("dont", "don't"),
        ("couldnt've", "couldn't've"),
        ("Im", "im"),  # upper-case keys cannot be reached
        ("a", ""),
        ("", ""),
    ],
)
def test_normaliser(text: str, normal: str) -> None:
    assert EvalAIAnswerProcessor()(text) == normal


def test_the_contraction_table_is_whole() -> None:
    assert len(contractions()) == 120
    for short, full in contractions().items():
        if short == short.lower() and not set(short) & set('?!"()'):
            assert EvalAIAnswerProcessor()(short) in (full, short.replace("'s", " 's"))


@pytest.mark.parametrize(
    ("agreeing", "worth"),
    # m sets leave an agreeing person out, 10 - m another: m · min(1, (m-1)/3) + (10-m) · min(1, m/3), over 10
    [(1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)],
)
def test_worth_of_an_answer(agreeing: int, worth: float) -> None:
    people = ["Red."] * agreeing + [f"other {n}" for n in range(10 - agreeing)]
    assert answer_scores(people)["red"] == pytest.approx(worth)


def test_accuracy_is_the_mean_and_the_unmatched_are_worth_nothing() -> None:
    entries = [
        {"pred_answer": "The RED", "gt_answers": ["red"] * 2 + ["blue"] * 8},
        {"pred_answer": "reddish", "gt_answers": ["red"] * 10},
        {"pred_answer": "Blue.", "gt_answers": ["red"] * 2 + ["blue"] * 8},
        {"pred_answer": "", "gt_answers": ["red"] * 10},
    ]
    evaluator = TextVQAAccuracyEvaluator()
    assert evaluator.eval_pred_list(entries) == pytest.approx((0.6 + 0 + 1 + 0) / 4)
    assert evaluator.eval_pred_list([]) == 0
    assert evaluator.answer_processor("The RED") == "red"


@pytest.mark.parametrize(
    ("entry", "complaint"),
    [
        ({"pred_answer": None, "gt_answers": ["x"] * 10}, "entry 1.pred_answer is null, not a string"),
        ({"pred_answer": "x", "gt_answers": "x" * 10}, "entry 1.gt_answers is 'xxxxxxxxxx', not a list"),
        ({"pred_answer": "x", "gt_answers": ["x"] * 9 + [5]}, r"entry 1.gt_answers\[9\] is 5, not a string"),
        ({"pred_answer": "x"}, "entry 1.gt_answers is missing"),
        (["x"], r"entry 1 is \['x'\], not an object"),
    ],
)
def test_entries_of_another_layout(entry: Any, complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        TextVQAAccuracyEvaluator().eval_pred_list([entry])


def test_ten_people_are_needed() -> None:
    with pytest.raises(InputError, match="11 human answers instead of 10"):
        TextVQAAccuracyEvaluator().eval_pred_list([{"pred_answer": "x", "gt_answers": ["x"] * 11}])


def test_the_table_is_shipped_beside_the_module() -> None:
    file = Path(__file__).parents[2] / "llava" / "eval" / "vqa_contractions.json"
    assert json.loads(file.read_text()) == contractions()
