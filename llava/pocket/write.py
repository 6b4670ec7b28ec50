"""Write the pocket benchmark: `python -m llava.pocket.write DIR`, ten data sets in the official layouts.

The same command writes the same bytes. Pictures stand once in `DIR/scenes` and are linked into the data sets;
`truth.json` says of every question which scene it is about.
"""

import base64
import csv
import json
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from llava.eval.benchmarks._mmbench import ROTATION
from llava.eval.benchmarks._mmbench_table import LETTERS, rotated
from llava.eval.benchmarks.mme import YES_OR_NO
from llava.interrupts import kept
from llava.output import check_output, draft_of, write_whole
from llava.pocket.questions import TASKS, UNANSWERABLE, Asked, Balance, mentions
from llava.pocket.scenes import Scene, make_scene
from llava.utils import OneLineParser, at_least, run_command

SCENES = 200
PER_SCENE = {"mmvet": 1, "mmbench": 1, "mmbench_cn": 1}
"""Questions about a scene; 2 where nothing else is said. MMBench's are asked four times over."""


@dataclass
class Book:
    """What is being written: a data set's folder and its questions."""

    root: Path
    task: str
    asked: list[tuple[Scene, Asked]]
    truth: dict[str, Any] = field(default_factory=dict)

    def picture(self, scene: Scene, name: str) -> str:
        """Link a scene's picture under the name a data set has for it; returns the name."""
        file, source = self.root / name, scene_file(self.root.parent, scene)
        if not file.exists() or not file.samefile(source):
            with draft_of(file) as draft:
                try:
                    draft.unlink(missing_ok=True)
                    os.link(source, draft)
                except OSError:  # no links here
                    shutil.copyfile(source, draft)
        return name

    def note(self, key: object, scene: Scene, asked: Asked) -> None:
        """Keep what a question is about."""
        self.truth[str(key)] = {"scene": scene.index, "template": asked.template, "answer": asked.answer}

    def lines(self, name: str, rows: Iterable[Any]) -> None:
        """Write one JSON object a line."""
        self.text(name, "".join(json.dumps(row) + "\n" for row in rows))

    def json(self, name: str, value: Any) -> None:
        """Write a JSON file."""
        self.text(name, json.dumps(value))

    def text(self, name: str, text: str) -> None:
        """Write a text file."""
        write_whole(self.root / name, text)


def scene_file(root: Path, scene: Scene) -> Path:
    """Return where a scene's picture is."""
    return root / "scenes" / f"{scene.index:04d}.png"


def ten(answer: str) -> list[dict[str, str]]:
    """Return ten people who agree."""
    return [{"answer": answer.lower(), "answer_confidence": "yes"}] * 10


def _vqav2(book: Book) -> None:
    rows, annotations = [], []
    for number, (scene, asked) in enumerate(book.asked):
        image = book.picture(scene, f"test2015/COCO_test2015_{scene.index:012d}.png").split("/")[-1]
        rows.append({"question_id": number, "image": image, "text": asked.prompt, "category": "default"})
        annotations.append({"question_id": number, "image_id": scene.index, "answers": ten(asked.answer)})
        annotations[-1] |= {"answer_type": asked.template, "multiple_choice_answer": asked.answer}
        book.note(number, scene, asked)
    book.lines("llava_vqav2_mscoco_test-dev2015.jsonl", rows)
    book.lines("llava_vqav2_mscoco_test2015.jsonl", rows)
    book.json("v2_mscoco_val2014_annotations.json", {"annotations": annotations})


def _gqa(book: Book) -> None:
    rows, labels = [], {}
    for number, (scene, asked) in enumerate(book.asked):
        key, image = f"{number:06d}", book.picture(scene, f"data/images/n{scene.index:06d}.png").split("/")[-1]
        rows.append({"question_id": key, "image": image, "text": asked.prompt, "category": "default"})
        labels[key] = {"question": asked.text, "answer": asked.answer, "imageId": image[:-4], "isBalanced": True}
        labels[key]["types"] = {"structural": "choose", "semantic": "rel", "detailed": asked.template}
        book.note(key, scene, asked)
    book.lines("llava_gqa_testdev_balanced.jsonl", rows)
    book.json("data/testdev_balanced_questions.json", labels)


def _vizwiz(book: Book) -> None:
    """What cannot be answered stands in a label file of its own: destroyed pictures would answer it right."""
    rows: list[dict[str, Any]] = []
    labels: dict[bool, list[dict[str, Any]]] = {True: [], False: []}
    for number, (scene, asked) in enumerate(book.asked):
        image = book.picture(scene, f"test/VizWiz_test_{scene.index:08d}.png").split("/")[-1]
        rows.append({"question_id": number, "image": image, "text": asked.prompt})
        answerable = asked.answer != UNANSWERABLE
        label = {"image": image, "question": asked.text, "answers": ten(asked.answer)}
        labels[answerable].append(label | {"answer_type": asked.template, "answerable": int(answerable)})
        book.note(number, scene, asked)
    book.lines("llava_test.jsonl", rows)
    book.json("val.json", labels[True])
    book.json("unanswerable.json", labels[False])


def _scienceqa(book: Book) -> None:
    rows, problems = [], {}
    for number, (scene, asked) in enumerate(book.asked, 1):
        key = str(number)
        book.picture(scene, f"images/test/{key}/image.png")
        body = "\n".join(asked.prompt.split("\n")[:-1])  # the request for a letter is the script's
        said = {"from": "human", "value": f"<image>\n{body}"}, {"from": "gpt", "value": asked.answer}
        rows.append({"id": key, "image": f"{key}/image.png", "conversations": list(said)})
        problem = {"question": asked.text, "choices": asked.options, "answer": LETTERS.index(asked.answer)}
        more = {"hint": asked.hint, "image": "image.png", "split": "test", "lecture": "", "solution": ""}
        problems[key] = problem | more
        book.note(key, scene, asked)
    book.json("llava_test_CQM-A.json", rows)
    book.json("problems.json", problems)
    book.json("pid_splits.json", {"test": list(problems), "train": []})


def _textvqa(book: Book) -> None:
    rows, labels = [], []
    for number, (scene, asked) in enumerate(book.asked):
        name = f"{scene.index:016x}"
        book.picture(scene, f"train_images/{name}.png")
        rows.append({"question_id": name, "image": f"{name}.png", "text": asked.prompt, "category": "default"})
        answers = [answer["answer"] for answer in ten(asked.answer)]
        labels.append({"question_id": number, "image_id": name, "question": asked.text, "answers": answers})
        book.note(number, scene, asked)
    book.lines("llava_textvqa_val_v051_ocr.jsonl", rows)
    book.json("TextVQA_0.5.1_val.json", {"dataset_type": "val", "data": labels})


def _pope(book: Book) -> None:
    rows: list[dict[str, Any]] = []
    labels: dict[str, list[dict[str, Any]]] = {"adversarial": [], "popular": [], "random": []}
    for number, (scene, asked) in enumerate(book.asked):
        image = book.picture(scene, f"val2014/COCO_val2014_{scene.index:012d}.png").split("/")[-1]
        rows.append({"question_id": number, "image": image, "text": asked.prompt, "category": asked.category})
        label = {"question_id": number, "image": image, "text": asked.text, "label": asked.answer}
        labels[asked.category].append(label)
        book.note(number, scene, asked)
    book.lines("llava_pope_test.jsonl", rows)
    for category, found in labels.items():
        book.lines(f"coco/coco_pope_{category}.json", found)


def _mme(book: Book) -> None:
    rows, release = [], "MME_Benchmark_release_version"
    for (scene, yes), (_, no) in zip(book.asked[::2], book.asked[1::2], strict=True):
        image = f"{yes.category}/{scene.index:04d}.png"
        book.picture(scene, f"{release}/{image}")
        text = "".join(f"{asked.text} {YES_OR_NO}\t{asked.answer}\n" for asked in (yes, no))
        book.text(f"{release}/{image[:-4]}.txt", text)
        for asked in (yes, no):
            rows.append({"question_id": image, "image": image, "text": asked.prompt, "category": yes.category})
        book.note(image, scene, yes)
    book.lines("llava_mme.jsonl", rows)


def _mmbench(book: Book) -> None:
    columns = ["index", "question", "hint", *LETTERS, "answer", "category", "image", "source", "l2-category"]
    columns += ["comment", "split"]
    file = {"mmbench": "mmbench_dev_20230712.tsv", "mmbench_cn": "mmbench_dev_cn_20231003.tsv"}[book.task]
    with draft_of(book.root / file) as draft, draft.open("w", newline="", encoding="utf-8") as stream:
        table = csv.writer(stream, delimiter="\t", lineterminator="\n")
        table.writerow(columns)
        for number, (scene, asked) in enumerate(book.asked):
            image = base64.b64encode(scene_file(book.root.parent, scene).read_bytes()).decode()
            kind, right = asked.category, asked.options[LETTERS.index(asked.answer)]
            for turn in range(len(LETTERS)):
                options = rotated(asked.options, turn)
                row = [number + turn * ROTATION, asked.text, "", *options, LETTERS[options.index(right)], kind, image]
                table.writerow([*row, "pocket", kind, "", "dev"])
            book.note(number, scene, asked)


def _mmvet(book: Book) -> None:
    rows, wanted = [], {}
    for number, (scene, asked) in enumerate(book.asked):
        image = book.picture(scene, f"images/v1_{scene.index}.png").split("/")[-1]
        rows.append({"question_id": number, "image": image, "text": asked.prompt})
        wanted[str(number)] = mentions(scene)
        book.note(number, scene, asked)
    book.lines("llava-mm-vet.jsonl", rows)
    book.json("mentions.json", wanted)


WRITERS: dict[str, tuple[str, Callable[[Book], None]]] = {
    "vqav2": ("vqav2", _vqav2),
    "gqa": ("gqa", _gqa),
    "vizwiz": ("vizwiz", _vizwiz),
    "scienceqa": ("scienceqa", _scienceqa),
    "textvqa": ("textvqa", _textvqa),
    "pope": ("pope", _pope),
    "mme": ("MME", _mme),
    "mmbench": ("mmbench", _mmbench),
    "mmbench_cn": ("mmbench_cn", _mmbench),
    "mmvet": ("mm-vet", _mmvet),
}


def ask_about(scenes: Sequence[Scene], task: str) -> list[tuple[Scene, Asked]]:
    """Choose a task's questions about scenes, balanced over all of them; MME's come in pairs about a category."""
    rng, balance = np.random.default_rng([11, list(TASKS).index(task)]), Balance()
    asked: list[tuple[Scene, Asked]] = []
    for scene in scenes:
        possible, number = list(TASKS[task](scene, rng)), PER_SCENE.get(task, 2)
        if task != "mme":
            asked += [(scene, one) for one in balance.choose(possible, number, rng)]
            continue
        # A picture is in a category's folder once.
        for _ in range(number):
            for yes in balance.choose([a for a in possible if a.answer == "Yes"], 1, rng):
                denied = [a for a in possible if a.frame == yes.frame and a.answer == "No"]
                asked += [(scene, one) for one in (yes, *balance.choose(denied, 1, rng))]
                possible = [a for a in possible if a.category != yes.category]
    return asked


def write_benchmarks(root: Path, split: str = "test", scenes: int = SCENES, blank: bool = False) -> Path:
    """Write the ten data sets.

    Args:
        root: folder of their folders, as `playground/data/eval` is of the real ones'.
        split: see `make_scene`.
        scenes: number of scenes.
        blank: the same questions about grey pictures, which show what can be had without looking.

    Returns:
        The folder.
    """
    check_output(root / "truth.json")
    drawn = [make_scene(split, index) for index in range(scenes)]
    for scene in drawn:
        picture = Image.new("RGB", scene.image.size, (128, 128, 128)) if blank else scene.image
        with draft_of(scene_file(root, scene)) as draft:
            picture.save(draft, format="PNG")
    truth = {}
    for task, (folder, write) in WRITERS.items():
        book = Book(root / folder, task, ask_about(drawn, task))
        write(book)
        truth[task] = book.truth
    write_whole(root / "truth.json", json.dumps(truth))
    return root


def main() -> None:
    """Run the command."""
    parser = OneLineParser(prog="llava.pocket.write", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--split", default="test", help="train, val or test")
    parser.add_argument("--scenes", type=at_least(1), default=SCENES)
    parser.add_argument("--blank", action="store_true", help="grey pictures: what can be had without looking")
    args = parser.parse_args()
    with kept("the data sets are written in part; the same command writes the rest"):
        print(write_benchmarks(args.folder, args.split, args.scenes, args.blank))


if __name__ == "__main__":
    run_command(main)
