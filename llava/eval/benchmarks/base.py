"""What a benchmark is: where its questions come from, how they are asked, and what an answer is worth."""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from llava.constants import InputError
from llava.reading import parse_json, read_text
from llava.schema import ANYTHING, check

SHORT_ANSWER = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."

Row = dict[str, Any]
"""One line of an answers file: `question_id, prompt, text, answer_id, model_id, metadata` and what a benchmark adds."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """One question as the model gets it and as the answers file records it."""

    id: int | str
    text: str
    """What the model is asked, without `<image>`; the template is put around it."""
    image: str | None = None
    """Picture file, relative to the image folder; None: no picture."""
    data: str | None = None
    """The picture itself in base64, for benchmarks that carry it (then `image` is its name)."""
    prompt: str | None = None
    """What the answers file records as `prompt`; None: `text`."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Further fields of the answers file's row."""
    category: str = ""
    """Which part of the benchmark it belongs to, for samples that are spread over all parts."""
    error: str | None = None
    """Why it cannot be asked: its row in the answers file says so instead of an answer, and nothing else stops."""

    @property
    def file(self) -> str | None:
        """The picture file that it needs in the image folder; None: it needs no picture, or carries it."""
        return self.image if self.data is None else None


@dataclass(frozen=True, kw_only=True)
class Result:
    """A scored answers file."""

    benchmark: str
    metrics: Mapping[str, float]
    """Every number the benchmark reports, the headline among them."""
    headline: str
    """Key in `metrics` of the number papers quote."""
    n: int
    """Questions that count towards the headline."""
    scored: str = "local"
    """`local`: from labels at hand; `server`: only an export could be made."""
    notes: tuple[str, ...] = ()
    """What a reader must know: missing answers, a label revision that does not match, a prompt variant."""
    per_question: Mapping[Any, float] = field(default_factory=dict)
    """Question id -> its contribution, on the headline's scale, so that their mean is the headline: what intervals are
    resampled from."""


class Benchmark:
    """Base of the ten; one file each in this folder, found by scanning."""

    name: ClassVar[str]
    """Name of the benchmark and of its file."""
    folder: ClassVar[str]
    """Folder under `playground/data/eval`."""
    question_file: ClassVar[str]
    """Question file, relative to the folder."""
    image_folder: ClassVar[str]
    """Folder of the pictures, relative to the folder."""
    labels: ClassVar[tuple[str, ...]] = ()
    """Files a local score needs, relative to the folder."""
    source: ClassVar[str]
    """Where the data officially come from, for people."""
    contents: ClassVar[Mapping[str, str]]
    """What a run and its score need, relative to the folder -> what it must contain, for people."""
    optional: ClassVar[Mapping[str, str]] = {}
    """Likewise, what only another split's score or a submission needs."""
    max_new_tokens: ClassVar[int] = 128

    def questions(self, file: Path, **options: Any) -> Iterator[Question]:
        """Read a question file in the official format.

        Args:
            file: the file.
            **options: `lang`, `single_pred_prompt`, `all_rounds`, `ocr` where a benchmark knows them.

        Raises:
            InputError: a line cannot be read; the message names file and line.
        """
        raise NotImplementedError

    def unit(self, question: Question) -> Hashable:
        """Return a key that questions which are scored as one share; None: this one is scored alone."""
        return None

    def score(self, rows: Sequence[Row], data: Path) -> Result:
        """Score answers against the labels under `data` (the benchmark's folder).

        Raises:
            InputError: labels are missing or do not belong to the questions.
        """
        raise NotImplementedError

    def export(self, rows: Sequence[Row], data: Path, output: Path) -> list[Path]:
        """Write what the official scorer or server takes; returns the files written. Default: nothing.

        Args:
            rows: of the answers file.
            data: the benchmark's folder.
            output: file, or folder for a file of the official name; where a server takes several files, folder.
        """
        return []

    def missing(self, data: Path) -> list[Path]:
        """Return the files and folders under `data` that a run needs and does not find."""
        wanted = [data / self.question_file, data / self.image_folder]
        return [path for path in wanted if not path.exists()]

    def lacking(self, data: Path) -> list[str]:
        """Return the names in `contents` of what is not under `data`, or is an empty folder there."""
        return [name for name in self.contents if not filled(data / name)]


def filled(path: Path) -> bool:
    """Whether there is a file, or a folder with something inside."""
    return path.is_file() or (path.is_dir() and next(path.iterdir(), None) is not None)


def read_jsonl(file: Path, layout: Any = ANYTHING) -> list[Row]:
    """Read a file of one JSON object a line; blank lines are skipped.

    Args:
        file: the file.
        layout: what every line must be, see `llava.schema`.

    Raises:
        InputError: the file cannot be read, or a line is no object of this layout; the message names file and line.
    """
    rows = []
    for number, line in enumerate(read_text(file).split("\n"), 1):
        if not line.strip():
            continue
        place = f"{str(file)!r}, line {number}"
        try:
            row = parse_json(line)
        except ValueError as error:
            raise InputError(f"{place} is no JSON ({error})") from error
        if not isinstance(row, dict):
            raise InputError(f"{place} is no JSON object")
        check(row, layout, place)
        rows.append(row)
    return rows
