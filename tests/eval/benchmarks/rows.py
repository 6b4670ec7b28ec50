"""Rows of answers files and label files, as short as tests want them."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def row(question_id: Any, text: str, prompt: str = "", **extra: Any) -> dict[str, Any]:
    """A row with all fields of upstream's."""
    ours = {
        "question_id": question_id,
        "prompt": prompt,
        "text": text,
        "answer_id": "x",
        "model_id": "m",
        "metadata": {},
    }
    return ours | extra


def failed(question_id: Any, prompt: str = "") -> dict[str, Any]:
    """A row that reports an error."""
    return row(question_id, "", prompt, metadata={"error": "x.jpg: unreadable"})


def write(path: Path, value: Any) -> Path:
    """Write a JSON file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    """Write one JSON object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(entry) + "\n" for entry in rows), encoding="utf-8")
    return path
