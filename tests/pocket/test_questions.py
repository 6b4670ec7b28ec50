"""Questions: whatever is asked has one right answer, which an oracle of its own finds; not looking gains nothing."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llava.eval.benchmarks.mmvet import mentioned
from llava.pocket.questions import TASKS, Asked, Balance, mentions
from llava.pocket.scenes import Scene
from llava.pocket.write import PER_SCENE, ask_about
from tests.pocket.oracle import HAN, in_english, only, truth
from tests.pocket.tiny import arrange, put, undrawn

ROUND = ("circle", "square", "triangle", "cross", "ring", "diamond")
OPEN = ("vqav2", "gqa", "vizwiz", "textvqa", "pope", "mme")
CHOICE = ("scienceqa", "mmbench", "mmbench_cn")
SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."


def every(task: str, splits: Sequence[str] = ("train", "test"), number: int = 300) -> Iterator[tuple[Scene, Asked]]:
    """All that can be asked about the first scenes."""
    for shown in (shown for split in splits for shown in undrawn(split, number)):
        for asked in TASKS[task](shown, np.random.default_rng([5, shown.index])):
            assert asked.task == task
            yield shown, asked


@pytest.mark.parametrize("task", OPEN)
def test_answers_are_the_oracles(task: str) -> None:
    """Colour, shape, count, reading, side, height, half, presence, pairs."""
    seen: Counter[str] = Counter()
    for shown, asked in every(task):
        assert asked.answer.lower() == truth(shown, asked.text).lower(), (shown.index, asked)
        assert asked.options == ()
        seen[asked.template] += 1
    wanted = {
        "vqav2": {"colour", "shape", "count"},
        "gqa": {"side", "height", "half across", "half down"},
        "vizwiz": {"colour", "printed number", "printed word", "handwritten number", "absent", "absent text"},
        "textvqa": {"printed number", "printed word", "handwritten number"},
        "pope": {"random", "popular", "adversarial"},
        "mme": {"existence", "count", "color", "position", "OCR"},
    }[task]
    assert seen.keys() == wanted
    assert min(seen.values()) > 50


@pytest.mark.parametrize("task", CHOICE)
def test_the_letter_is_that_of_the_only_right_option(task: str) -> None:
    templates = set()
    for shown, asked in every(task):
        templates.add(asked.template)
        options = [HAN.get(option, option) for option in asked.options]
        assert len(set(options)) == len(options) == (3 if task == "scienceqa" else 4)
        question = in_english(asked.text) if task == "mmbench_cn" else asked.text
        if question.startswith("written on"):
            colour, kind = question.split()[2:]
            right = only([t for t in shown.things if (t.colour, t.kind) == (colour, kind)]).text
        else:
            right = truth(shown, question)
        assert options["ABCD".index(asked.answer)] == right, (shown.index, asked)
        assert {type_of(option) for option in options} == {type_of(right)}
        if task == "mmbench_cn":
            assert all(option in HAN or option.isascii() for option in asked.options)
            assert not (set(asked.options) & set(HAN.values()))
    texts = {"printed number", "printed word", "handwritten number"}
    assert templates == {"colour", "shape", *(texts if task != "scienceqa" else ())}


def type_of(option: str) -> str:
    """What kind of answer an option is, so that only one kind is offered."""
    if option in ROUND:
        return "shape"
    return "number" if option.isdecimal() else "word" if option.isupper() else "colour"


def test_a_context_tells_what_is_asked_about_and_not_the_answer() -> None:
    for _, asked in every("scienceqa"):
        assert asked.hint
        right = asked.options["ABC".index(asked.answer)]
        assert right not in asked.hint
        if asked.template == "colour":
            assert asked.text.split()[-1].rstrip("?") in asked.hint


def test_what_is_absent_is_anything_the_common_or_the_double_of_what_is_there() -> None:
    doubles = [{"circle", "ring"}, {"square", "diamond"}, {"sign", "note"}]
    for shown in undrawn("test", 200):
        asked = TASKS["pope"](shown, np.random.default_rng(0))
        kinds = {thing.kind for thing in shown.things}
        found = defaultdict(set)
        for one in asked:
            assert one.category == one.template
            assert one.text.split()[-4] == one.subject
            found[one.category].add(one.subject)
        assert found["random"] == {*ROUND, "sign", "note"}
        assert found["popular"] == {"sign", "note"}
        assert found["adversarial"] == set().union(*(pair for pair in doubles if pair & kinds))


def test_the_popular_kinds_are_the_commonest() -> None:
    kinds = Counter(thing.kind for shown in undrawn("train", 300) for thing in shown.things)
    assert {kind for kind, _ in kinds.most_common(2)} == {"sign", "note"}


def test_mme_affirms_and_denies_the_same() -> None:
    """Of every frame there is one question to affirm, and some to deny that differ from it in one word."""
    for shown in undrawn("test", 200):
        frames = defaultdict(list)
        for one in TASKS["mme"](shown, np.random.default_rng(0)):
            assert one.text == one.frame.format(one.subject)
            frames[one.category, one.frame].append(one)
        for (category, _), asked in frames.items():
            answers = Counter(one.answer for one in asked)
            # A thing may be clearly on one side both across and down.
            assert answers["Yes"] == (len(asked) // 2 if category == "position" else 1)
            assert len({one.subject for one in asked}) == len(asked) > 1
            assert answers["No"] == len(asked) - answers["Yes"]


def test_mme_asks_in_pairs_and_of_a_category_once_a_picture() -> None:
    asked = ask_about(undrawn("test", 200), "mme")
    for (shown, yes), (again, no) in zip(asked[::2], asked[1::2], strict=True):
        assert shown is again
        assert (yes.answer, no.answer, yes.frame) == ("Yes", "No", no.frame)
    pictures = Counter((shown.index, one.category) for shown, one in asked)
    assert set(pictures.values()) == {2}


def test_a_description_mentions_everything_in_reading_order() -> None:
    by_hand = arrange(
        put("note", "red", 14, 1, 4, 2, text="47", big=True),
        put("ring", "orange", 3, 3),
        put("sign", "black", 0, 0, 3, text="OAK"),
    )
    (asked,) = TASKS["mmvet"](by_hand, np.random.default_rng(0))
    assert asked.answer == "a black sign saying OAK, a red note saying 47, an orange ring"
    assert mentions(by_hand) == [["black sign", "OAK"], ["red note", "47"], ["orange ring"]]
    for shown, asked in every("mmvet"):
        wanted = {f"{t.colour} {t.kind}" + (f" saying {t.text}" if t.text else "") for t in shown.things}
        parts = asked.answer.split(", ")
        assert {part.split(" ", 1)[1] for part in parts} == wanted
        assert len(parts) == len(shown.things)
        assert all(part.split()[0] == ("an" if part.split()[1][0] in "aeiou" else "a") for part in parts)
        assert mentioned(asked.answer, mentions(shown)) == [True] * len(shown.things)
        others = [words for words in mentions(undrawn("val", 300)[shown.index]) if words not in mentions(shown)]
        assert not any(mentioned(asked.answer, [words])[0] for words in others if words[1:])


def test_prompts_are_the_benchmarks() -> None:
    """As LLaVA's question files and scripts put them, letter by letter."""

    def prompt(task: str, **given: Any) -> str:
        return Asked(task=task, **{"template": "x", "text": "What?", "answer": "y"} | given).prompt

    for task in ("vqav2", "gqa", "textvqa", "pope", "mme"):
        assert prompt(task) == "What?" + SHORT
    unsure = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."
    assert prompt("vizwiz") == "What?" + unsure + SHORT
    assert prompt("mmvet") == "What?"
    options = {"options": ("red", "blue"), "answer": "A"}
    assert prompt("scienceqa", hint="It is.", **options) == "Context: It is.\nWhat?\nA. red\nB. blue" + LETTER
    assert prompt("mmbench", **options) == "What?\nA. red\nB. blue" + LETTER
    assert prompt("mmbench_cn", **options) == "What?\nA. red\nB. blue\n请直接回答选项字母。"


@pytest.mark.parametrize("task", TASKS)
def test_the_same_seed_asks_the_same(task: str) -> None:
    for shown in undrawn("val", 20):
        one, other = (list(TASKS[task](shown, np.random.default_rng(9))) for _ in range(2))
        assert one == other


def asked_of(answers: Sequence[str], template: str = "t") -> list[Asked]:
    return [
        Asked(task="vqav2", template=template, text=f"{template} {number}?", answer=answer)
        for number, answer in enumerate(answers)
    ]


@given(st.lists(st.sampled_from("abcd"), max_size=8), st.integers(1, 5), st.integers(0, 99))
def test_balance_chooses_some_of_what_is_possible(answers: list[str], number: int, seed: int) -> None:
    possible = [*asked_of(answers), *asked_of(answers)]
    chosen = Balance().choose(possible, number, np.random.default_rng(seed))
    assert len(chosen) == min(number, len(answers)), "nothing twice"
    assert len({asked.prompt for asked in chosen}) == len(chosen)
    assert all(asked in possible for asked in chosen)
    wanted = min(number, len(set(answers)))
    assert len({asked.answer for asked in chosen}) == wanted, "each answer once before one comes twice"


@given(st.lists(st.integers(2, 4), min_size=1, max_size=30), st.integers(0, 99))
def test_balance_evens_answers_and_templates_out(offers: list[int], seed: int) -> None:
    """Answers always on offer never differ by more than one, and neither do templates."""
    balance, rng = Balance(), np.random.default_rng(seed)
    seen: Counter[Any] = Counter()
    for repeats in offers:
        possible = [*asked_of("a" * repeats + "bc", "one"), *asked_of("d" * repeats + "e", "two")]
        (asked,) = balance.choose(possible, 1, rng)
        seen[asked.template] += 1
        seen[asked.answer] += 1
    assert abs(seen["one"] - seen["two"]) <= 1
    assert max(seen[answer] for answer in "abc") - min(seen[answer] for answer in "abc") <= 1
    assert abs(seen["d"] - seen["e"]) <= 1


def test_balance_asks_something_else_before_a_rare_answer_falls_behind() -> None:
    """A scene in ten has the rare answer: once it was met, the common one waits for it, and the rest is elsewhere."""
    balance, rng = Balance(), np.random.default_rng(0)
    seen: Counter[str] = Counter()
    for number in range(200):
        (asked,) = balance.choose([*asked_of("b" if number % 10 == 9 else "a", "one"), *asked_of("x", "two")], 1, rng)
        seen[asked.answer] += 1
    assert 15 <= seen["b"] <= 20
    assert seen["a"] <= 30, "80 without"
    assert seen["x"] == 200 - seen["a"] - seen["b"]


def test_balance_leaves_the_choice_among_equals_to_chance() -> None:
    first = {Balance().choose(asked_of("abcdefgh"), 1, np.random.default_rng(seed))[0].answer for seed in range(60)}
    assert len(first) == 8


@pytest.mark.parametrize("task", TASKS)
def test_there_are_enough_questions_and_the_same_every_time(task: str) -> None:
    """At the default size, which is that of the shipped benchmark."""
    asked = ask_about(undrawn("test", 200), task)
    assert len(asked) >= 200
    assert asked == ask_about(undrawn("test", 200), task)
    per_scene = Counter(shown.index for shown, _ in asked)
    assert max(per_scene.values()) <= PER_SCENE.get(task, 2) * (2 if task == "mme" else 1)
    assert len({(shown.index, one.prompt) for shown, one in asked}) == len(asked), "nothing is asked twice"


def tally(asked: Sequence[tuple[Scene, Asked]]) -> dict[str, Counter[str]]:
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for _, one in asked:
        counts[one.template][one.answer] += 1
    return counts


@pytest.mark.parametrize("task", [task for task in TASKS if task != "mmvet"])
def test_templates_and_answers_come_up_equally_often_where_scenes_allow(task: str) -> None:
    scenes = undrawn("test", 200)
    counts = tally(ask_about(scenes, task))
    shares = [sum(found.values()) for found in counts.values()]
    assert min(shares) > 0.8 * max(shares)
    possible: dict[tuple[str, str], set[int]] = defaultdict(set)
    for shown in scenes:
        for one in TASKS[task](shown, np.random.default_rng(shown.index)):
            possible[one.template, one.answer].add(shown.index)
    for template, found in counts.items():
        answers = [answer for name, answer in possible if name == template]
        fair = sum(found.values()) / len(answers)
        if len(answers) > 8:  # words and numbers
            assert max(found.values()) <= max(2.5 * fair, 6)
            continue
        for answer in answers:
            assert found[answer] >= 0.5 * min(fair, len(possible[template, answer])), (template, answer, found)
            assert found[answer] <= 1.6 * fair, (template, answer, found)


@pytest.mark.parametrize("task", ["pope", "mme"])
def test_half_of_the_yes_no_questions_are_to_be_affirmed(task: str) -> None:
    for template, found in tally(ask_about(undrawn("test", 200), task)).items():
        yes, no = (found[answer] for answer in (("yes", "no") if task == "pope" else ("Yes", "No")))
        assert abs(yes - no) <= (1 if task == "pope" else 0), (template, found)


@pytest.mark.parametrize("task", ["pope", "mme"])
def test_about_every_subject_both_answers_come_up_equally_often(task: str) -> None:
    """Who knows that there mostly is a sign, or that there mostly is one sign only, gains nothing."""
    found: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for _, one in ask_about(undrawn("test", 200), task):
        found[one.template, one.subject][one.answer.lower()] += 1
    guessed = {about: max(met.values()) / met.total() for about, met in found.items() if met.total() >= 12}
    assert len(guessed) >= 13
    assert max(guessed.values()) < 0.6, guessed


# Best guess without looking: one of so many answers.
CHANCE = {
    ("vqav2", "colour"): 8, ("vqav2", "shape"): 6, ("vqav2", "count"): 3, ("vizwiz", "colour"): 8,
    **{("gqa", template): 2 for template in ("side", "height", "half across", "half down")},
    **{("pope", template): 2 for template in ("random", "popular", "adversarial")},
    **{("mme", template): 2 for template in ("existence", "count", "color", "position", "OCR")},
    **{("scienceqa", template): 3 for template in ("colour", "shape")},
}  # fmt: skip
READ = ("printed number", "printed word", "handwritten number")


@pytest.mark.parametrize("task", [task for task in TASKS if task != "mmvet"])
def test_who_knows_a_templates_commonest_answer_is_right_by_chance_only(task: str) -> None:
    learnt, met = tally(ask_about(undrawn("train", 2000), task)), tally(ask_about(undrawn("test", 1000), task))
    for template, found in met.items():
        if template.startswith("absent"):
            continue
        share = found[learnt[template].most_common(1)[0][0]] / sum(found.values())
        if task in ("vizwiz", "textvqa") and template in READ:
            assert share < 0.06
            continue
        chance = 1 / CHANCE.get((task, template), 4)
        assert share < chance + 0.05, (template, share)


@pytest.mark.parametrize("task", ["gqa", "pope", "mme", *CHOICE])
def test_who_reads_the_question_without_looking_gains_little(task: str) -> None:
    """Of every wording, the answer that training gave most often."""
    learnt: dict[str, Counter[str]] = defaultdict(Counter)
    for _, one in ask_about(undrawn("train", 3000), task):
        learnt[one.text][one.answer] += 1
    met = ask_about(undrawn("test", 1000), task)
    right = [learnt[one.text].most_common(1)[0][0] == one.answer for _, one in met if learnt[one.text]]
    assert len(right) > 0.7 * len(met)
    chance = {"scienceqa": 1 / 3, "mmbench": 1 / 4, "mmbench_cn": 1 / 4}.get(task, 1 / 2)
    assert sum(right) / len(right) < chance + 0.1
