"""Questions about scenes in the shapes of the ten benchmarks, with their answers.

Every task asks only what has one right answer in a scene. `Balance` chooses among what could be asked so that every
answer of a template comes up equally often: whoever does not look gains nothing.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llava.eval.benchmarks._mmbench import LETTER_CN
from llava.eval.benchmarks.base import LETTER, SHORT_ANSWER
from llava.pocket.scenes import COLOURS, KINDS, SHAPES, WORDS, Scene, Thing

UNANSWERABLE = "unanswerable"
VIZWIZ = f"\nWhen the provided information is insufficient, respond with '{UNANSWERABLE.title()}'."
DESCRIBE = "Describe the picture."
LETTERS = "ABCD"
COMMON = ("sign", "note")
"""The kinds that are there most often."""
# Kinds -> what they are taken for.
DOUBLES = {"circle": "ring", "ring": "circle", "square": "diamond", "diamond": "square", "sign": "note", "note": "sign"}
RIVALS = 8
"""Wrong words that are offered for a frame."""
AHEAD = 2
"""By how much an answer may be ahead of its template's rarest."""
NUMBERS = tuple(str(number) for number in range(10, 100))
"""What signs and notes say, besides words."""
# What ScienceQA's context says about the thing a question is about.
HINTS = {
    "circle": "A circle is round.",
    "square": "A square has four equal sides.",
    "triangle": "A triangle has three corners.",
    "cross": "A cross has four arms.",
    "ring": "A ring is round and has a hole.",
    "diamond": "A diamond stands on a corner.",
    "sign": "A sign carries print.",
    "note": "A note carries handwriting.",
}
CHINESE = {
    **dict(zip(COLOURS, ("红色", "绿色", "蓝色", "黄色", "橙色", "紫色", "白色", "黑色"), strict=True)),
    **dict(zip(KINDS, ("圆形", "方形", "三角", "十字", "圆环", "菱形", "标牌", "便条"), strict=True)),
}


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A question about a scene."""

    task: str
    """Name of the benchmark in whose shape it is."""
    template: str
    """What kind of question it is: answers are balanced within."""
    text: str
    """The bare question."""
    answer: str
    """What the model is to say."""
    options: tuple[str, ...] = ()
    """Choices; the answer is a letter then."""
    hint: str = ""
    category: str = ""
    """POPE: how the absent thing was chosen."""
    subject: str = ""
    """What a question for yes or no is about: about every subject, both answers come up equally often."""
    frame: str = ""
    """What the two questions of a pair share."""

    @property
    def prompt(self) -> str:
        """What the model is asked: the question as the benchmark's script puts it."""
        if self.task == "vizwiz":
            return self.text + VIZWIZ + SHORT_ANSWER
        if not self.options:
            return self.text if self.task == "mmvet" else self.text + SHORT_ANSWER
        hint = f"{'Context: ' if self.task == 'scienceqa' else ''}{self.hint}\n" if self.hint else ""
        listed = "".join(f"\n{letter}. {option}" for letter, option in zip(LETTERS, self.options, strict=False))
        return hint + self.text + listed + (LETTER_CN if self.task == "mmbench_cn" else LETTER)


def alone(scene: Scene) -> list[Thing]:
    """Return the things that are the only ones of their kind."""
    kinds = Counter(thing.kind for thing in scene.things)
    return [thing for thing in scene.things if kinds[thing.kind] == 1]


def colour_of(scene: Scene, rng: np.random.Generator, task: str = "vqav2") -> Iterator[Asked]:
    """Ask for the colour of whatever is the only one of its kind."""
    for thing in alone(scene):
        yield Asked(task=task, template="colour", text=f"What color is the {thing.kind}?", answer=thing.colour)


def shape_of(scene: Scene, rng: np.random.Generator, task: str = "vqav2") -> Iterator[Asked]:
    """Ask for the shape of the only thing of a colour."""
    colours = Counter(thing.colour for thing in scene.things)
    for thing in scene.things:
        if colours[thing.colour] == 1 and thing.kind in SHAPES:
            text = f"What shape is the {thing.colour} thing?"
            yield Asked(task=task, template="shape", text=text, answer=thing.kind)


def count_of(scene: Scene, rng: np.random.Generator, task: str = "vqav2") -> Iterator[Asked]:
    """Ask how many signs there are: none, one or two; three are too rare to be asked for as often."""
    number = sum(thing.kind == "sign" for thing in scene.things)
    if number <= 2:
        yield Asked(task=task, template="count", text="How many signs are there?", answer=str(number))


def reading(scene: Scene, rng: np.random.Generator, task: str = "textvqa") -> Iterator[Asked]:
    """Ask what is written on a sign or a note."""
    for thing in scene.things:
        if thing.text:
            verb = "handwritten" if thing.kind == "note" else "printed"
            what = "number" if thing.text.isdecimal() else "word"
            text = f"What {what} is {verb} on the {thing.name}?"
            yield Asked(task=task, template=f"{verb} {what}", text=text, answer=thing.text)


def side_of(scene: Scene, rng: np.random.Generator, task: str = "gqa") -> Iterator[Asked]:
    """Ask on which side of another a thing is, where it is clearly on one."""
    things = alone(scene)
    for one in things:
        for other in things:
            across, down = (a - b for a, b in zip(one.centre, other.centre, strict=True))
            if abs(across) >= 4 and abs(across) > abs(down):
                text = f"Is the {one.kind} to the left or to the right of the {other.kind}?"
                yield Asked(task=task, template="side", text=text, answer="left" if across < 0 else "right")
            if abs(down) >= 4 and abs(down) > abs(across):
                text = f"Is the {one.kind} above or below the {other.kind}?"
                yield Asked(task=task, template="height", text=text, answer="above" if down < 0 else "below")


def half_of(scene: Scene, rng: np.random.Generator, task: str = "gqa") -> Iterator[Asked]:
    """Ask in which half of the picture a thing is, where it is clearly in one."""
    width, height = scene.size
    for thing in alone(scene):
        across, down = thing.centre[0] / width, thing.centre[1] / height
        if abs(across - 0.5) > 0.12:
            text = f"Is the {thing.kind} in the left or in the right half of the picture?"
            yield Asked(task=task, template="half across", text=text, answer="left" if across < 0.5 else "right")
        if abs(down - 0.5) > 0.12:
            text = f"Is the {thing.kind} in the top or in the bottom half of the picture?"
            yield Asked(task=task, template="half down", text=text, answer="top" if down < 0.5 else "bottom")


def maybe(scene: Scene, rng: np.random.Generator) -> Iterator[Asked]:
    """Ask for a colour or a text that is there or, as often, is not."""
    present = {thing.kind for thing in scene.things}
    yield from colour_of(scene, rng, "vizwiz")
    yield from reading(scene, rng, "vizwiz")
    for kind in KINDS:
        if kind not in present:
            yield Asked(task="vizwiz", template="absent", text=f"What color is the {kind}?", answer=UNANSWERABLE)
    # One more absent thing, so that asking for a text does not give away that there is one.
    names = {thing.name for thing in scene.things}
    free = [f"{colour} sign" for colour in COLOURS if f"{colour} sign" not in names]
    text = f"What {('number', 'word')[rng.integers(2)]} is printed on the {free[rng.integers(len(free))]}?"
    yield Asked(task="vizwiz", template="absent text", text=text, answer=UNANSWERABLE)


def choose_from(
    rng: np.random.Generator, right: str, wrong: Sequence[str], number: int = 4
) -> tuple[tuple[str, ...], str]:
    """Return options in random order and the letter of the right one."""
    some = [wrong[i] for i in rng.permutation(len(wrong))[: number - 1]]
    options = [right, *some]
    order = rng.permutation(number)
    return tuple(options[i] for i in order), LETTERS[int(np.argmin(order))]


def multiple_choice(scene: Scene, rng: np.random.Generator, task: str) -> Iterator[Asked]:
    """Ask for colour, shape or text with options."""
    for asked in (*colour_of(scene, rng), *shape_of(scene, rng), *reading(scene, rng)):
        rivals: Sequence[str] = list(COLOURS)
        hint = ""
        if asked.template == "shape":
            rivals = SHAPES
        elif asked.template.endswith("word"):
            rivals = WORDS
        elif asked.template != "colour":
            rivals = NUMBERS
        if task == "scienceqa":
            if asked.template not in ("colour", "shape"):
                continue
            hint = HINTS[asked.answer if asked.template == "shape" else asked.text.split()[-1].rstrip("?")]
            if asked.template == "shape":  # the context must not give the answer away
                hint = "A shape is what something looks like."
        number = 3 if task == "scienceqa" else 4
        options, letter = choose_from(rng, asked.answer, [rival for rival in rivals if rival != asked.answer], number)
        text = asked.text
        if task == "mmbench_cn":
            text = in_chinese(asked)
            options = tuple(CHINESE.get(option, option) for option in options)
        yield Asked(
            task=task, template=asked.template, text=text, answer=letter, options=options, hint=hint,
            category=asked.template.replace(" ", "_"),
        )  # fmt: skip


def in_chinese(asked: Asked) -> str:
    """Translate a question about colour, shape or text."""
    words = asked.text.rstrip("?").split()
    if asked.template == "colour":
        return f"{CHINESE[words[-1]]}是什么颜色？"
    if asked.template == "shape":
        return f"{CHINESE[words[-2]]}的东西是什么形状？"
    return f"{CHINESE[words[-2]]}{CHINESE[words[-1]]}上写着什么？"


def presence(scene: Scene, rng: np.random.Generator) -> Iterator[Asked]:
    """Ask whether something is there: what is not is anything, of the common kinds, or the double of what is there."""
    present = {thing.kind for thing in scene.things}
    kinds = {"random": KINDS, "popular": COMMON, "adversarial": tuple(DOUBLES)}
    for category, some in kinds.items():
        for kind in some:
            if category == "adversarial" and kind not in present and DOUBLES[kind] not in present:
                continue
            answer, text = "yes" if kind in present else "no", f"Is there {article(kind)} {kind} in the image?"
            yield Asked(task="pope", template=category, text=text, answer=answer, category=category, subject=kind)


def pairs(scene: Scene, rng: np.random.Generator) -> Iterator[Asked]:
    """Ask yes/no questions in MME's categories: of every frame one to affirm and some to deny."""

    def ask(category: str, frame: str, right: str, wrong: Sequence[str]) -> Iterator[Asked]:
        rivals = [word for word in wrong if word != right]
        for word in (right, *(rivals[i] for i in rng.permutation(len(rivals))[:RIVALS])):
            yield Asked(
                task="mme", template=category, category=category, frame=frame, subject=word,
                text=frame.format(word), answer="Yes" if word == right else "No",
            )  # fmt: skip

    present = {thing.kind for thing in scene.things}
    absent = [kind for kind in KINDS if kind not in present]
    shown = sorted(present)[rng.integers(len(present))]
    yield from ask("existence", "Is there a {} in this image?", shown, absent)
    number = sum(thing.kind == "sign" for thing in scene.things)
    if 1 <= number <= 3:
        yield from ask("count", "Is the number of signs {}?", str(number), "123")
    for thing in alone(scene):
        yield from ask("color", f"Is the {thing.kind} {{}}?", thing.colour, list(COLOURS))
    for asked in half_of(scene, rng):
        words = ("left", "right") if asked.template == "half across" else ("top", "bottom")
        frame = f"Is the {asked.text.split()[2]} in the {{}} half of the picture?"
        yield from ask("position", frame, asked.answer, words)
    for thing in scene.things:
        if thing.text:
            rivals = NUMBERS if thing.text.isdecimal() else WORDS
            yield from ask("OCR", f"Does the {thing.name} say {{}}?", thing.text, rivals)


def mentions(scene: Scene) -> list[list[str]]:
    """Return what a description must mention, in reading order: a thing's name, and what is written on it."""
    things = sorted(scene.things, key=lambda thing: (thing.top, thing.left))
    return [[thing.name, *([thing.text] if thing.text else [])] for thing in things]


def article(name: str) -> str:
    """Return the article before a name."""
    return "an" if name[0] == "o" else "a"


def description(scene: Scene, rng: np.random.Generator) -> Iterator[Asked]:
    """Ask for everything there is."""
    parts = [
        " ".join([article(words[0]), words[0], *(["saying", words[1]] if words[1:] else [])])
        for words in mentions(scene)
    ]
    yield Asked(task="mmvet", template="description", text=DESCRIBE, answer=", ".join(parts))


def _several(*makers: Callable[..., Iterator[Asked]], **options: Any) -> Callable[..., list[Asked]]:
    return lambda scene, rng: [asked for maker in makers for asked in maker(scene, rng, **options)]


TASKS: dict[str, Callable[[Scene, np.random.Generator], Sequence[Asked]]] = {
    "vqav2": _several(colour_of, shape_of, count_of),
    "gqa": _several(side_of, half_of),
    "vizwiz": _several(maybe),
    "scienceqa": _several(multiple_choice, task="scienceqa"),
    "textvqa": _several(reading),
    "pope": _several(presence),
    "mme": _several(pairs),
    "mmbench": _several(multiple_choice, task="mmbench"),
    "mmbench_cn": _several(multiple_choice, task="mmbench_cn"),
    "mmvet": _several(description),
}


class Balance:
    """Chooses what to ask, so that templates of a task and answers of a template come up equally often.

    Where a question's subject has met its answer more often than the other, or the answer is well ahead of the rarest,
    something else is asked if there is anything.
    """

    def __init__(self) -> None:
        """Start from nothing asked."""
        self.templates: Counter[tuple[str, str]] = Counter()
        self.answers: defaultdict[tuple[str, str], Counter[str]] = defaultdict(Counter)
        self.subjects: defaultdict[tuple[str, str, str], Counter[str]] = defaultdict(Counter)

    def _wish(self, asked: Asked) -> tuple[bool, int, int, int]:
        """Return what is smallest for the question to ask next."""
        template = asked.task, asked.template
        answers, met = self.answers[template], self.subjects[*template, asked.subject]
        ahead = answers[asked.answer] - min(answers.values(), default=0)
        leaning = 2 * met[asked.answer] - met.total() if asked.subject else 0
        return leaning > 0 or ahead > AHEAD, self.templates[template], leaning, answers[asked.answer]

    def choose(self, possible: Sequence[Asked], number: int, rng: np.random.Generator) -> list[Asked]:
        """Choose up to `number` questions, what was asked least first, by chance among equals."""
        left = [possible[i] for i in rng.permutation(len(possible))]
        chosen: list[Asked] = []
        while left and len(chosen) < number:
            best = min(left, key=self._wish)
            left = [asked for asked in left if asked.prompt != best.prompt]
            self.templates[best.task, best.template] += 1
            self.answers[best.task, best.template][best.answer] += 1
            self.subjects[best.task, best.template, best.subject][best.answer] += 1
            chosen.append(best)
        return chosen
