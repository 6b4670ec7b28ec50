"""A run that goes on where another stopped: what is left to do, and what is kept where this one stops too."""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from llava.constants import InputError
from llava.eval.journal import Found, Journal
from llava.eval.pictures import about, check_folder, readable
from llava.output import REFUSALS, check_output, refusal


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is left to do."""

    done: frozenset[int] = frozenset()
    """Places of the questions whose rows stand."""
    finished: bool = False
    """Nothing is left, and the answers file is in order."""
    dtype: str
    """In which the model runs: the answers' there are, unless another is asked for."""
    notes: tuple[str, ...] = ()
    """What people want to know of it."""


def make_plan(args: argparse.Namespace, journal: Journal, wanted: list[int]) -> Plan:
    """See what is there, as the first process of a run; unless everything is done, nobody else may write from now on.

    Raises:
        InputError: the answers file is another run's, or cannot be written, or the image folder is a wrong one.
    """
    journal.check_kind()
    plan = Plan(dtype=journal.config["dtype"]) if args.overwrite else _look(args, journal, wanted)
    if plan.finished:
        return plan
    if len(plan.done) < len(wanted):
        check_folder((journal.questions[place] for place in wanted), Path(args.image_folder))
    check_output(journal.file)
    try:
        journal.lock.take()
    except OSError as error:
        raise InputError(refusal(error, journal.file)) from error
    return plan if args.overwrite else _look(args, journal, wanted)  # again, as nobody else writes now


def _look(args: argparse.Namespace, journal: Journal, wanted: list[int]) -> Plan:
    """See what is there and fits."""
    journal.check(follow=() if args.dtype else ("dtype",))
    found = journal.read()
    again = {place for place in wanted if place in found.errors and _worth_another_try(args, journal, found, place)}
    done = frozenset((found.rows.keys() & set(wanted)) - again)
    notes = []
    if done or again:
        notes.append(f"{len(done)} of {len(wanted)} questions have their answer; {len(wanted) - len(done)} are asked")
    if again:
        notes.append(f"{len(again)} questions that could not be asked are tried again")
    finished = len(done) == len(wanted) and found.in_order and not found.flaws and not journal.parts.exists()
    return Plan(done=done, finished=finished, dtype=journal.config["dtype"], notes=tuple(notes))


def _worth_another_try(args: argparse.Namespace, journal: Journal, found: Found, place: int) -> bool:
    """Whether a question that could not be asked may be now: unless the user says so, if it was for a picture."""
    if args.retry_errors is not None:
        return bool(args.retry_errors)
    file, error = journal.questions[place].file, str(found.rows[place]["metadata"]["error"])
    return file is not None and error.startswith(about(file)) and readable(Path(args.image_folder) / file)


@contextmanager
def kept_said(args: argparse.Namespace, journal: Journal, wanted: list[int]) -> Iterator[None]:
    """Say with whatever stops a run what is kept of it, and let go of the journal."""
    try:
        yield
    except SystemExit:
        raise
    except BaseException as error:
        kept = _count(journal, wanted)
        how = "the same command continues" if not args.overwrite else "without --overwrite the same command continues"
        note = f"{kept} of {len(wanted)} answers kept; {how}"
        if isinstance(error, InputError):
            if kept and isinstance(error.__cause__, OSError):  # the machine refused the answers file
                raise InputError(f"{error}; {note}") from error
            raise
        if isinstance(error, OSError) and error.errno in REFUSALS:
            raise InputError(f"{refusal(error, error.filename or journal.file)}; {note}") from error
        if _is_out_of_memory(error):
            said = " ".join(str(error).split(". ")[0].split()) or "MemoryError"
            raise InputError(f"memory ran out ({said}); {note}, such as with a smaller --batch-size") from error
        error.add_note(note)
        raise
    finally:
        journal.close()
        journal.lock.release()


def _count(journal: Journal, wanted: list[int]) -> int:
    try:
        return len(journal.read().rows.keys() & set(wanted))
    except (InputError, OSError):
        return 0


def _is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)
