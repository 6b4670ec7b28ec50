"""Answers to the pocket's questions, found from their wording and the scene's things alone."""

import re
from collections.abc import Sequence

from llava.pocket.scenes import CELL, TILE, Scene, Thing

HAN = {
    "红色": "red", "绿色": "green", "蓝色": "blue", "黄色": "yellow", "橙色": "orange", "紫色": "purple",
    "白色": "white", "黑色": "black", "圆形": "circle", "方形": "square", "三角": "triangle", "十字": "cross",
    "圆环": "ring", "菱形": "diamond", "标牌": "sign", "便条": "note",
}  # fmt: skip


def truth(scene: Scene, question: str) -> str:
    """Answer an English question; one of unknown wording, or with two answers, is an error."""
    answers = [
        getattr(Looking(scene), name)(*found.groups())
        for name, form in FORMS
        if (found := re.fullmatch(form, question))
    ]
    (answer,) = answers
    return str(answer)


def in_english(question: str) -> str:
    """Translate a question of MMBench-CN."""
    forms = {
        r"(..)是什么颜色？": "What color is the {}?",
        r"(..)的东西是什么形状？": "What shape is the {} thing?",
        r"(..)(..)上写着什么？": "written on {} {}",
    }
    (found,) = [
        english.format(*map(HAN.__getitem__, match.groups()))
        for form, english in forms.items()
        if (match := re.fullmatch(form, question))
    ]
    return found


def only(things: Sequence[Thing]) -> Thing:
    """The one there is; with more the question would have several answers."""
    (found,) = things
    return found


def middle(thing: Thing) -> tuple[float, float]:
    """Its centre in pixels."""
    return CELL * (2 * thing.left + thing.width) / 2, CELL * (2 * thing.top + thing.height) / 2


def said(right: bool) -> str:
    return "yes" if right else "no"


FORMS = (
    ("colour", r"What color is the (\w+)\?"),
    ("shape", r"What shape is the (\w+) thing\?"),
    ("count", r"How many signs are there\?"),
    ("read", r"What (number|word) is (printed|handwritten) on the (\w+) (sign|note)\?"),
    ("beside", r"Is the (\w+) to the left or to the right of the (\w+)\?"),
    ("stacked", r"Is the (\w+) above or below the (\w+)\?"),
    ("half", r"Is the (\w+) in the (left) or in the right half of the picture\?"),
    ("half", r"Is the (\w+) in the (top) or in the bottom half of the picture\?"),
    ("named", r"Is there (an?) (\w+) in the image\?"),
    ("present", r"Is there a (\w+) in this image\?"),
    ("counted", r"Is the number of signs (\d)\?"),
    ("coloured", r"Is the (\w+) (\w+)\?"),
    ("placed", r"Is the (\w+) in the (left|right|top|bottom) half of the picture\?"),
    ("reads", r"Does the (\w+) (sign|note) say (\w+)\?"),
)


class Looking:
    """Somebody who looks at a scene; one method a wording."""

    def __init__(self, scene: Scene) -> None:
        self.things, self.grid = scene.things, scene.grid

    def find(self, kind: str, colour: str = "") -> list[Thing]:
        return [thing for thing in self.things if thing.kind == kind and colour in ("", thing.colour)]

    def colour(self, kind: str) -> str:
        return only(self.find(kind)).colour if self.find(kind) else "unanswerable"

    def shape(self, colour: str) -> str:
        return only([thing for thing in self.things if thing.colour == colour]).kind

    def count(self) -> str:
        return str(len(self.find("sign")))

    def read(self, what: str, verb: str, colour: str, kind: str) -> str:
        assert verb == {"sign": "printed", "note": "handwritten"}[kind]
        if not self.find(kind, colour):
            return "unanswerable"
        text = only(self.find(kind, colour)).text
        assert re.fullmatch({"number": "[1-9][0-9]", "word": "[A-Z]{3}"}[what], text)
        return text

    def apart(self, one: str, other: str, axis: int) -> float:
        """How far one is behind the other along an axis, if it is clearly so."""
        found, rival = middle(only(self.find(one))), middle(only(self.find(other)))
        way = [a - b for a, b in zip(found, rival, strict=True)]
        assert abs(way[axis]) >= 4 * CELL
        assert abs(way[axis]) > abs(way[1 - axis])
        return way[axis]

    def beside(self, one: str, other: str) -> str:
        return "left" if self.apart(one, other, 0) < 0 else "right"

    def stacked(self, one: str, other: str) -> str:
        return "above" if self.apart(one, other, 1) < 0 else "below"

    def half(self, kind: str, low: str) -> str:
        axis = ("left", "top").index(low)
        place = middle(only(self.find(kind)))[axis] / (TILE * self.grid[axis])
        assert abs(place - 0.5) > 0.1
        return low if place < 0.5 else ("right", "bottom")[axis]

    def placed(self, kind: str, which: str) -> str:
        return said(self.half(kind, {"right": "left", "bottom": "top"}.get(which, which)) == which)

    def named(self, article: str, kind: str) -> str:
        assert article == ("an" if kind[0] in "aeiou" else "a")
        return said(bool(self.find(kind)))

    def present(self, kind: str) -> str:
        return said(bool(self.find(kind)))

    def counted(self, number: str) -> str:
        return said(number == self.count())

    def coloured(self, kind: str, colour: str) -> str:
        return said(only(self.find(kind)).colour == colour)

    def reads(self, colour: str, kind: str, text: str) -> str:
        return said(only(self.find(kind, colour)).text == text)
