"""What came of a run: how far its processes are, all together, and the summary at its end."""

import time
from collections.abc import Mapping
from typing import Any

from llava.eval.benchmarks.base import Row
from llava.eval.journal import Journal, failed
from llava.eval.ranks import Ranks

# Questions that are named where several could not be asked for one reason.
NAMED = 3


class Tally:
    """What the processes of a run did so far, all together, for the bar and the summary."""

    def __init__(self, ranks: Ranks) -> None:
        """Start the clock."""
        self.ranks, self.start = ranks, time.monotonic()
        self.update()

    def update(self, answers: int = 0, images: int = 0, kept: int = 0, total: int = 0) -> None:
        """Add what this process did, and learn what the others did."""
        self.answers = self.ranks.count("answers", answers)
        self.images = self.ranks.count("images", images)
        self.kept = self.ranks.count("kept", kept)
        self.total = self.ranks.count("total", total)

    @property
    def seconds(self) -> float:
        """Time since the model was there."""
        return time.monotonic() - self.start

    @property
    def retention(self) -> float | None:
        """Share of the visual tokens that the language model saw so far."""
        return round(self.kept / self.total, 4) if self.total else None

    @property
    def images_per_second(self) -> float:
        """Pictures taken in per second."""
        return self.images / max(self.seconds, 1e-9)


def summary(journal: Journal, rows: Mapping[int, Row], tally: Tally | None = None) -> Row:
    """Sum a run up.

    Args:
        journal: of its answers.
        rows: of the answers file, by place.
        tally: what the run did; None: nothing, as everything was done: then images and seconds are the recorded ones.
    """
    done = {"images": tally.images, "seconds": round(tally.seconds, 2)} if tally else _recorded(journal)
    kept, total = (
        sum(_tokens(row, name) for row in rows.values()) for name in ("visual_tokens", "total_visual_tokens")
    )
    return {
        "answers_file": str(journal.file),
        "questions": len(rows),
        "answered_now": tally.answers if tally else 0,
        **done,
        "method": journal.config["method"],
        "retention": round(kept / total, 4) if total else None,
        "failed": sum(map(failed, rows.values())),
        "errors": grouped_errors(rows),
    }


def _recorded(journal: Journal) -> dict[str, int | float]:
    """Return what the run that made the answers recorded of itself."""
    before = journal.summarised()
    return {name: value if isinstance(value := before.get(name), int | float) else 0 for name in ("images", "seconds")}


def _tokens(row: Row, name: str) -> int:
    return value if isinstance(value := row["metadata"].get(name), int) else 0


def grouped_errors(rows: Mapping[int, Row]) -> list[str]:
    """Return what is recorded as wrong with questions, those about one picture together."""
    groups: dict[str, list[Any]] = {}
    for row in rows.values():
        if failed(row):
            groups.setdefault(str(row["metadata"]["error"]), []).append(row["question_id"])
    return [f"{error} ({_named(ids)})" for error, ids in groups.items()]


def _named(ids: list[Any]) -> str:
    if len(ids) == 1:
        return f"question {ids[0]!r}"
    more = ", …" if len(ids) > NAMED else ""
    return f"{len(ids)} questions: {', '.join(map(repr, ids[:NAMED]))}{more}"
