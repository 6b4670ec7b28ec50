"""The answers file: whatever moment a run dies at, nothing is lost, doubled or mixed."""

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from llava.constants import InputError
from llava.eval import journal
from llava.eval.benchmarks.base import Question
from llava.eval.journal import Journal, prompt_of

CONFIG = {"method": "none()", "questions": "abc"}
QUESTIONS = [Question(id=f"q{index}", text="what?", prompt=f"what,\n{index} é\u2028\ud800?") for index in range(8)]


def journal_of(file: Path, questions: list[Question] = QUESTIONS, **config: object) -> Journal:
    return Journal(file, CONFIG | config, questions)


def opened(file: Path, overwrite: bool = False, questions: list[Question] = QUESTIONS, **config: object) -> Journal:
    made = journal_of(file, questions, **config)
    if not overwrite:
        made.check()
    made.prepare(overwrite)
    return made


def row(index: int, questions: list[Question] = QUESTIONS, **more: object) -> dict[str, Any]:
    question = questions[index]
    text, answer_id = f"line\n{index} é\u2028\ud800", f"a{index}"
    shown = {"question_id": question.id, "prompt": prompt_of(question), "text": text, "answer_id": answer_id}
    return {**shown, "metadata": {"image": question.image} if question.image else {}, **more}


def error(index: int, said: str = "no such picture") -> dict[str, Any]:
    return row(index, text="", metadata={"error": said}, answer_id=f"e{index}{said}")


def answered(made: Journal) -> set[int]:
    return set(made.read().rows)


def names(file: Path) -> list[str]:
    return sorted(path.name for path in file.parent.iterdir())


def answers(file: Path) -> list[object]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture
def file(tmp_path):
    return tmp_path / "deep" / "answers" / "a.jsonl"


def test_answers_come_out_in_question_order_and_alone(file):
    made = opened(file)
    for index in (3, 0, 2, 1):
        made.write(index, row(index))
    made.close()
    assert answered(made) == {0, 1, 2, 3}
    assert list(made.merge(range(4)).values()) == [row(index) for index in range(4)]
    assert answers(file) == [row(index) for index in range(4)]
    assert names(file) == ["a.jsonl", "a.jsonl.config.json"]


def test_every_answer_is_on_disk_at_once(file):
    made = opened(file)
    for index in range(5):
        made.write(index, row(index))
        assert answered(journal_of(file)) == set(range(index + 1))


def test_a_line_cut_anywhere_is_lost_alone(file):
    made = opened(file)
    made.write(0, row(0))
    made.write(1, row(1))
    made.close()
    (part,) = made.parts.iterdir()
    data = part.read_bytes()
    first = data.index(b"\n") + 1
    for length in range(len(data)):
        part.write_bytes(data[:length])
        # All of an answer but its line end is an answer.
        assert answered(made) == {index for index, end in enumerate((first, len(data))) if length >= end - 1}
    part.write_bytes(data[:-2])
    again = opened(file)
    again.write(1, row(1))
    again.close()
    again.merge(range(2))
    assert answers(file) == [row(0), row(1)]
    assert again.notes == []


def test_an_answer_given_twice_is_there_once(file):
    for _ in range(2):
        made = opened(file)
        made.write(0, row(0))
        made.close()
    made.merge(range(8))
    assert answers(file) == [row(0)]


def test_answers_that_were_not_asked_for_wait_until_they_are(file):
    # As after a run that was killed, then continued with a limit.
    made = opened(file)
    for index in (0, 1, 7, 5):
        made.write(index, row(index))
    made.close()
    made.merge(range(2))
    assert answers(file) == [row(0), row(1)]
    again = opened(file)
    assert answered(again) == {0, 1, 5, 7}
    for index in (2, 3, 4, 6):
        again.write(index, row(index))
    again.close()
    again.merge(range(8))
    assert answers(file) == [row(index) for index in range(8)]
    assert not again.parts.exists()
    again.merge(range(1))
    assert len(answers(file)) == 8, "a smaller limit takes nothing away"


class Killed(BaseException):
    pass


def test_killed_at_every_step_of_starting_and_merging(file, monkeypatch):  # noqa: C901 - one stop per step
    """Stops before each change of the file system in turn; the next start finds all answers there were."""
    budget = iter(())

    def limited(real):
        def step(*args, **kwargs):
            if next(budget, None) is None:
                raise Killed
            return real(*args, **kwargs)

        return step

    for name in ("replace", "unlink", "rmdir", "mkdir"):
        monkeypatch.setattr(Path, name, limited(getattr(Path, name)))
    monkeypatch.setattr(os, "fsync", limited(os.fsync))

    def attempt(steps: int) -> bool:
        """One start with so many steps to live; answers what is left; True if it came to the end."""
        nonlocal budget
        budget = iter(range(steps))
        try:
            made = opened(file)
            for index in {0, 1, 2} - answered(made):
                made.write(index, row(index))
            made.close()
            made.merge(range(3))
        except Killed:
            return False
        return True

    lived = [attempt(steps) for steps in range(12)]
    assert lived[0] is False
    assert lived[-1] is True
    assert answers(file) == [row(index) for index in range(3)]
    assert not file.with_name("a.jsonl.parts").exists()
    # Discarding may be cut short too: what is left are old answers, still refused to others, or none.
    other = {"method": "other"}
    for steps in itertools.count():
        budget = iter(range(steps))
        try:
            Journal(file, other, QUESTIONS).prepare(overwrite=True)
            break
        except Killed:
            if answered(journal_of(file)):
                with pytest.raises(InputError):
                    Journal(file, other, QUESTIONS).check()
    assert steps > 2
    assert json.loads(file.with_name("a.jsonl.config.json").read_text()) == other
    assert answered(Journal(file, other, QUESTIONS)) == set()


def test_another_configuration_is_named_value_by_value(file):
    made = opened(file)
    made.write(0, row(0))
    made.close()
    with pytest.raises(InputError, match=r"method 'none\(\)', now 'uniform\(\)'.*--overwrite") as caught:
        opened(file, method="uniform()")
    assert "questions" not in str(caught.value)
    with pytest.raises(InputError, match="new None, now 3"):
        opened(file, new=3)
    assert answered(made) == {0}
    fresh = opened(file, overwrite=True, method="uniform()")
    assert answered(fresh) == set()


def test_a_configuration_that_answered_nothing_binds_nobody(file):
    opened(file).close()
    assert answered(opened(file, method="uniform()")) == set()


def test_answers_nobody_recorded_are_left_alone(file):
    file.parent.mkdir(parents=True)
    file.write_text('{"question_id": 1}\n')
    with pytest.raises(InputError, match="not recorded"):
        opened(file)
    assert file.read_text() == '{"question_id": 1}\n'


def test_processes_write_side_by_side(file, tmp_path):
    opened(file)
    questions = [Question(id=index, text="what?") for index in range(300)]
    script = (
        "import sys; from pathlib import Path; from llava.eval.journal import Journal\n"
        f"j = Journal(Path({str(file)!r}), {CONFIG!r}, [])\n"
        "row = lambda i: {'question_id': i, 'prompt': 'what?', 'text': 'x' * 9000, 'metadata': {}}\n"
        "for i in range(int(sys.argv[1]), 300, 3): j.write(i, row(i))\n"
    )
    running = [subprocess.Popen([sys.executable, "-c", script, str(start)]) for start in range(3)]
    assert [process.wait() for process in running] == [0, 0, 0]
    assert len(journal_of(file, questions).merge(range(300))) == 300
    assert [found["question_id"] for found in answers(file)] == list(range(300))


def test_a_summary_stands_beside_and_goes_with_the_answers(file):
    made = opened(file)
    made.summarise({"seconds": 1})
    beside = file.with_name(file.name + journal.SUMMARY)
    assert json.loads(beside.read_text()) == {"seconds": 1}
    opened(file, overwrite=True)
    assert not beside.exists()


# --- rows are known by what they are ---------------------------------------------------------------------------------


def left(file: Path, lines: Iterable[object], config: dict[str, object] = CONFIG) -> Path:
    """An answers file with its record, as somebody edited it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.with_name(file.name + ".config.json").write_text(json.dumps(config))
    file.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return file


@pytest.mark.parametrize(
    ("lines", "there"),
    [
        ([0, 1, 2, 3], {0, 1, 2, 3}),
        ([0, 2, 3], {0, 2, 3}),
        ([3, 1, 0], {0, 1, 3}),
        ([7], {7}),
        ([], set()),
    ],
)
def test_a_line_belongs_to_its_question_wherever_it_stands(file, lines, there):
    made = journal_of(left(file, map(row, lines)))
    made.check()
    assert made.read().rows == {index: row(index) for index in there}
    made.prepare()
    made.merge(range(8))
    assert answers(file) == [row(index) for index in sorted(there)]
    assert (len(made.notes) > 0) == (lines != sorted(lines))


def test_a_line_that_comes_twice_counts_once(file):
    made = opened(left(file, [row(0), row(1), row(0), row(1, text="another", answer_id="b")]))
    assert made.read().rows == {0: row(0), 1: row(1)}
    assert len(made.notes) == 1
    assert "lines that repeat a question (2)" in made.notes[0]
    made.merge(range(8))
    assert answers(file) == [row(0), row(1)]
    assert len(answers(file.with_name("a.jsonl.damaged"))) == 4, "what was there is kept"


ALIKE = [
    Question(id=1, text="is it?", image="a.png"),
    Question(id=1, text="is it?", image="b.png"),
    Question(id=1, text="is it?", image="a.png"),
    Question(id="1", text="is it?", image="a.png"),
    Question(id=1, text="or not?", image="a.png"),
]


def test_id_prompt_and_picture_tell_questions_apart_and_equal_ones_come_in_order(file):
    rows = [row(index, ALIKE) for index in range(5)]
    assert journal_of(left(file, rows[::-1]), ALIKE).read().rows.keys() == {0, 1, 2, 3, 4}
    assert journal_of(left(file, rows[:1]), ALIKE).read().rows.keys() == {0}
    assert journal_of(left(file, rows[3:]), ALIKE).read().rows == {3: rows[3], 4: rows[4]}
    made = opened(left(file, []), questions=ALIKE)
    made.write(2, rows[2])
    made.close()
    assert made.read().rows == {2: rows[2]}
    made.merge([])
    made.merge([2])
    without = {**rows[1], "metadata": {}}
    assert journal_of(left(file, [without]), ALIKE).read().rows == {0: without}


STRANGE = [
    row(0, question_id="nobody"),
    row(0, prompt="what else?"),
    row(0, question_id=None),
    {**row(0), "metadata": {"image": "other.png"}},
]


@pytest.mark.parametrize("strange", STRANGE[:3])
def test_lines_of_no_question_go_aside_or_are_refused_where_there_are_no_others(file, strange):
    made = opened(left(file, [row(0), strange]))
    assert made.read().rows == {0: row(0)}
    assert "lines of no question (1); 1 answers are kept" in made.notes[0]
    made.merge(range(8))
    assert names(file) == ["a.jsonl", "a.jsonl.config.json", "a.jsonl.damaged"]
    before = left(file, [strange]).read_bytes()
    with pytest.raises(InputError, match=r"no answer in .*a\.jsonl' belongs to these questions.*--overwrite"):
        opened(file)
    assert file.read_bytes() == before


def test_an_answer_goes_before_an_error_and_a_later_error_before_an_earlier(file):
    made = opened(left(file, [row(0), error(1), error(2), error(3)]))
    assert made.read().errors.keys() == {1, 2, 3}
    for place, found in ((0, error(0)), (1, row(1)), (2, error(2, "another"))):
        made.write(place, found)
    made.close()
    assert made.read().rows == {0: row(0), 1: row(1), 2: error(2, "another"), 3: error(3)}
    made.merge([])
    assert answers(file) == [row(0), row(1), error(2, "another"), error(3)]
    assert made.notes == []


# --- damage ----------------------------------------------------------------------------------------------------------

DAMAGE = {
    "garbage": b"\x80\xff{{{\n", "blank": b"\n", "spaces": b"   \n", "nul": b"\0" * 4096 + b"\n", "no object": b"[1]\n",
    "evil": b'[0, "evil"]\n', "number": b"7\n", "null": b"null\n", "no text": b'{"question_id": 1, "prompt": "x"}\n',
    "wrong types": b'{"question_id": "q0", "prompt": 1, "text": [], "metadata": 3}\n', "deep": b"[" * 99999 + b"\n",
    "huge": b"1" * 5000 + b"\n", "place": json.dumps(["0", 1]).encode() + b"\n",
}  # fmt: skip


@pytest.mark.parametrize("where", ["file", "part"])
@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damaged_lines_go_aside_by_name_and_the_others_stay(file, damage, where):
    made = opened(file)
    for index in range(2):
        made.write(index, row(index))
    made.close()
    if where == "file":
        made.merge(range(8))
    target = file if where == "file" else next(made.parts.iterdir())
    data = target.read_bytes()
    target.write_bytes(damage + data)
    again = opened(file)
    assert len(again.notes) == 1
    assert repr(str(target)) in again.notes[0]
    assert "lines that are no answers (1); 2 answers are kept" in again.notes[0]
    again.merge(range(8))
    assert answers(file) == [row(0), row(1)]
    (aside,) = [name for name in names(file) if ".damaged" in name]
    assert target.name in aside
    assert (file.parent / aside).read_bytes() == damage + data
    quiet = opened(file)
    assert quiet.notes == []


def test_a_cut_off_answers_file_is_damaged_and_an_uneven_end_is_not(file):
    data = left(file, [row(0), row(1)]).read_bytes()
    file.write_bytes(data[:-1])
    assert opened(file).notes == []
    file.write_bytes(data[:-9])
    assert "no answers (1); 1 answers are kept" in opened(file).notes[0]


def test_what_is_no_file_among_the_parts_goes_aside(file):
    made = opened(file)
    made.write(0, row(0))
    made.close()
    (made.parts / "folder.jsonl").mkdir()
    (made.parts / "folder.jsonl" / "inside").write_text("kept")
    os.mkfifo(made.parts / "pipe")
    (made.parts / "nowhere.jsonl").symlink_to("gone")
    again = opened(file)
    assert len(again.notes) == 3
    again.merge(range(8))
    assert answers(file) == [row(0)]
    assert (file.parent / "a.jsonl.folder.jsonl.damaged" / "inside").read_text() == "kept"
    assert not again.parts.exists()
    (file.parent / "a.jsonl.parts").write_text("no folder")
    assert "no folder" in opened(file).notes[0]


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\0\0", "\udcff"])
def test_a_damaged_record_is_refused_by_name_or_put_aside_where_it_binds_nobody(file, text):
    made = opened(file)
    made.record.write_bytes(text.encode("utf-8", "surrogateescape"))
    made.summary.write_bytes(text.encode("utf-8", "surrogateescape"))
    assert made.summarised() == {}
    again = opened(file)
    assert len(again.notes) == 2
    assert [name for name in names(file) if "damaged" in name] == [
        "a.jsonl.config.json.damaged",
        "a.jsonl.summary.json.damaged",
    ]
    again.write(0, row(0))
    again.close()
    made.record.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(InputError, match=r"the record of how it was made, .*config\.json', is damaged"):
        opened(file)
    assert answered(made) == {0}


def test_damage_of_every_day_is_numbered(file):
    for number in range(3):
        left(file, [row(0), f"garbage {number}"])
        opened(file).merge(range(8))
    assert [name for name in names(file) if "damaged" in name] == [f"a.jsonl.damaged{n}" for n in ("", 1, 2)]


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo])
def test_an_answers_file_that_is_none_is_refused(file, make):
    file.parent.mkdir(parents=True)
    make(file)
    with pytest.raises(InputError, match="no regular file"):
        journal_of(file).check_kind()
    assert names(file) == ["a.jsonl"]


def test_killed_at_every_step_of_a_repair(file, monkeypatch):
    """Nothing of what could be read is lost or doubled, however often a repair is cut short."""
    steps = iter(())

    def limited(real):
        def step(*args, **kwargs):
            if next(steps, None) is None:
                raise Killed
            return real(*args, **kwargs)

        return step

    for name in ("replace", "rename", "unlink", "rmdir", "mkdir"):
        monkeypatch.setattr(Path, name, limited(getattr(Path, name)))
    monkeypatch.setattr(os, "fsync", limited(os.fsync))
    steps = itertools.repeat(0)
    for living in range(14):
        left(file, [row(0), "garbage", row(2), row(2)])
        for allowed in (living, 99):
            steps = iter(range(allowed))
            try:
                opened(file).merge(range(8))
            except Killed:
                assert allowed == living
            steps = itertools.repeat(0)
            assert answered(journal_of(file)) == {0, 2}
        assert answers(file) == [row(0), row(2)]
