"""The answers file: whatever moment a run dies at, nothing is lost, doubled or mixed."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llava.constants import InputError
from llava.eval import journal
from llava.eval.journal import Journal

CONFIG = {"method": "none()", "questions": "abc"}


def opened(file: Path, overwrite: bool = False, **config: object) -> Journal:
    made = Journal(file, CONFIG | config)
    if not overwrite:
        made.check()
    made.prepare(overwrite)
    return made


def row(index: int) -> dict[str, object]:
    return {"question_id": f"q{index}", "index": 99, "text": f"line\n{index} é\u2028\ud800"}


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
    assert made.answered() == {0, 1, 2, 3}
    assert made.merge() == 4
    assert answers(file) == [row(index) for index in range(4)]
    assert sorted(path.name for path in file.parent.iterdir()) == ["a.jsonl", "a.jsonl.config.json"]


def test_every_answer_is_on_disk_at_once(file):
    made = opened(file)
    for index in range(5):
        made.write(index, row(index))
        assert Journal(file, CONFIG).answered() == set(range(index + 1))


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
        assert made.answered() == ({0} if length >= first else set())
    again = opened(file)
    again.write(1, row(1))
    again.close()
    assert again.merge() == 2
    assert answers(file) == [row(0), row(1)]


def test_an_answer_given_twice_is_there_once(file):
    for _ in range(2):
        made = opened(file)
        made.write(0, row(0))
        made.close()
    assert made.merge() == 1
    assert answers(file) == [row(0)]


def test_answers_behind_a_gap_wait_for_it_to_close(file):
    # As after a run that was killed, then continued with a limit.
    made = opened(file)
    for index in (0, 1, 7, 5):
        made.write(index, row(index))
    made.close()
    assert made.merge() == 2
    assert answers(file) == [row(0), row(1)]
    again = opened(file)
    assert again.answered() == {0, 1, 5, 7}
    for index in (2, 3, 4, 6):
        again.write(index, row(index))
    again.close()
    assert again.merge() == 8
    assert answers(file) == [row(index) for index in range(8)]
    assert not again.parts.exists()


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
            for index in {0, 1, 2} - made.answered():
                made.write(index, row(index))
            made.close()
            assert made.merge() == 3
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
            Journal(file, other).prepare(overwrite=True)
            break
        except Killed:
            if Journal(file, CONFIG).answered():
                with pytest.raises(InputError):
                    Journal(file, other).check()
    assert steps > 2
    assert json.loads(file.with_name("a.jsonl.config.json").read_text()) == other
    assert Journal(file, other).answered() == set()


def test_another_configuration_is_named_value_by_value(file):
    made = opened(file)
    made.write(0, row(0))
    made.close()
    with pytest.raises(InputError, match=r"method 'none\(\)', now 'uniform\(\)'.*--overwrite") as caught:
        opened(file, method="uniform()")
    assert "questions" not in str(caught.value)
    with pytest.raises(InputError, match="new None, now 3"):
        opened(file, new=3)
    assert made.answered() == {0}
    fresh = opened(file, overwrite=True, method="uniform()")
    assert fresh.answered() == set()


def test_a_configuration_that_answered_nothing_binds_nobody(file):
    opened(file).close()
    assert opened(file, method="uniform()").answered() == set()


def test_answers_nobody_recorded_are_left_alone(file):
    file.parent.mkdir(parents=True)
    file.write_text('{"question_id": 1}\n')
    with pytest.raises(InputError, match="not recorded"):
        opened(file)
    assert file.read_text() == '{"question_id": 1}\n'


def test_processes_write_side_by_side(file, tmp_path):
    opened(file)
    script = (
        "import sys; from pathlib import Path; from llava.eval.journal import Journal\n"
        f"j = Journal(Path({str(file)!r}), {CONFIG!r})\n"
        "for i in range(int(sys.argv[1]), 300, 3): j.write(i, {'text': 'x' * 9000, 'i': i})\n"
    )
    running = [subprocess.Popen([sys.executable, "-c", script, str(start)]) for start in range(3)]
    assert [process.wait() for process in running] == [0, 0, 0]
    made = Journal(file, CONFIG)
    assert made.merge() == 300
    assert [found["i"] for found in answers(file)] == list(range(300))


def test_a_summary_stands_beside_and_goes_with_the_answers(file):
    made = opened(file)
    made.summarise({"seconds": 1})
    beside = file.with_name(file.name + journal.SUMMARY)
    assert json.loads(beside.read_text()) == {"seconds": 1}
    opened(file, overwrite=True)
    assert not beside.exists()
