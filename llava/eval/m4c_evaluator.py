"""The two names of upstream's module that TextVQA and EvalAI scripts import."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

if not __package__:  # run, or imported, by path
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from llava.eval.benchmarks._common import mean
from llava.eval.benchmarks._vqa import normalise, vqa_accuracy
from llava.schema import STRING, Listed, check

ENTRY = {"pred_answer": STRING, "gt_answers": Listed(STRING)}


class EvalAIAnswerProcessor:
    """Brings answers into the form in which EvalAI compares them; call it on a string."""

    def __call__(self, item: str) -> str:
        """Return the normalised answer."""
        return normalise(item)


class TextVQAAccuracyEvaluator:
    """The accuracy over ten human answers per question."""

    def __init__(self) -> None:
        """Take no parameters, as upstream's."""
        self.answer_processor = EvalAIAnswerProcessor()

    def eval_pred_list(self, pred_list: Sequence[Mapping[str, Any]]) -> float:
        """Return the mean accuracy, in [0, 1], of entries `{"pred_answer": str, "gt_answers": ten strings}`.

        Raises:
            InputError: an entry is something else.
        """
        for number, entry in enumerate(pred_list, 1):
            check(entry, ENTRY, f"entry {number}")
        return mean(vqa_accuracy(entry["pred_answer"], entry["gt_answers"]) for entry in pred_list)
