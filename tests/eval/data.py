"""Tiny generated data sets in the official layouts of the ten benchmarks, for tests that run from end to end."""

import base64
import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from llava.eval.benchmarks import get

SHORT = "\nAnswer the question using a single word or phrase."
UNANSWERABLE = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."
SIZES = ((64, 48), (48, 64), (96, 32), (50, 50), (33, 80))
MME_NESTED = ("artwork", "celebrity", "landmark", "posters", "scene")
MME_FLAT = (
    "OCR", "code_reasoning", "color", "commonsense_reasoning", "count", "existence", "numerical_calculation",
    "position", "text_translation",
)  # fmt: skip
WORDS = ("red", "blue", "green", "dog", "cat", "2", "table", "north")


class Item(NamedTuple):
    """One question of a generated set."""

    image: int
    """Number of the picture."""
    turn: int
    """Number of the question among those of its picture."""
    id: int
    """Running number from 1."""
    answer: str
    """The word that is right."""


def _items(n_images: int, per_image: int) -> Iterator[Item]:
    for image in range(n_images):
        for turn in range(per_image):
            number = image * per_image + turn
            yield Item(image, turn, number + 1, WORDS[(number * 5 + image) % len(WORDS)])


def random_picture(number: int) -> Image.Image:
    """Return noise of one of five sizes, always the same for a number."""
    width, height = SIZES[number % len(SIZES)]
    pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def _save(path: Path, number: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    random_picture(number).save(path)


def _json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def _jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _question(item: Item, noun: str = "thing") -> str:
    return f"What is {noun} number {item.turn} of picture {item.image}?"


def _ten(answer: str) -> list[str]:
    """Ten annotators: seven say the answer, two another word, one leaves."""
    return [answer] * 7 + ["something"] * 2 + ["unanswerable"]


def _vqav2(data: Path, items: list[Item]) -> None:
    rows, annotations = [], []
    for item in items:
        image = f"COCO_test2015_{item.image:012d}.jpg"
        _save(data / "test2015" / image, item.image)
        number = item.image * 1000 + item.turn
        rows.append({"question_id": number, "image": image, "text": _question(item) + SHORT, "category": "default"})
        answers = [
            {"answer": a, "answer_confidence": "yes", "answer_id": i + 1} for i, a in enumerate(_ten(item.answer))
        ]
        annotation = {"question_id": number, "image_id": item.image, "question_type": "what is", "answers": answers}
        annotations.append(annotation | {"answer_type": "other", "multiple_choice_answer": item.answer})
    _jsonl(data / "llava_vqav2_mscoco_test-dev2015.jsonl", rows)
    unasked = {"question_id": 999_999_000, "image": "COCO_test2015_000000999999.jpg", "text": "Is it?" + SHORT}
    _jsonl(data / "llava_vqav2_mscoco_test2015.jsonl", [*rows, unasked])
    _json(data / "v2_mscoco_val2014_annotations.json", {"annotations": annotations})


def _gqa(data: Path, items: list[Item]) -> None:
    rows, labels = [], {}
    for item in items:
        name, number = f"n{161000 + item.image}", f"2013072{item.id:05d}"
        _save(data / "data" / "images" / f"{name}.jpg", item.image)
        text = _question(item)
        rows.append({"question_id": number, "image": f"{name}.jpg", "text": text + SHORT, "category": "default"})
        types = {"structural": ("query", "verify")[item.turn % 2], "semantic": "attr", "detailed": "x"}
        labels[number] = {"question": text, "answer": item.answer, "imageId": name, "isBalanced": True, "types": types}
    _jsonl(data / "llava_gqa_testdev_balanced.jsonl", rows)
    _json(data / "data" / "testdev_balanced_questions.json", labels)


def _vizwiz(data: Path, items: list[Item]) -> None:
    rows, labels = [], []
    for item in items:
        image, text = f"VizWiz_test_{item.image:08d}.jpg", _question(item)
        _save(data / "test" / image, item.image)
        rows.append({"question_id": item.id - 1, "image": image, "text": text + UNANSWERABLE + SHORT})
        answers = [{"answer": answer, "answer_confidence": "yes"} for answer in _ten(item.answer)]
        labels.append({"image": image, "question": text, "answers": answers, "answer_type": "other", "answerable": 1})
    _jsonl(data / "llava_test.jsonl", rows)
    _json(data / "val.json", labels)


def _scienceqa(data: Path, items: list[Item]) -> None:
    """As official, with one question without a picture for every picture."""
    rows, problems = [], {}
    bare = [Item(item.image, -1, 1000 + item.id, item.answer) for item in items if item.turn == 0]
    shown = {item.image: item.id for item in items if item.turn == 0}
    for item in (*items, *bare):
        choices = [item.answer, *(word for word in WORDS[:3] if word != item.answer)][:3]
        body = "\n".join([_question(item), *(f"{chr(65 + i)}. {choice}" for i, choice in enumerate(choices))])
        row = {"id": str(item.id), "conversations": [{"from": "human", "value": body}, {"from": "gpt", "value": "A"}]}
        problem = {"question": _question(item), "choices": choices, "answer": 0, "hint": "", "image": None}
        if item.turn >= 0:
            picture = f"{shown[item.image]}/image.png"
            _save(data / "images" / "test" / picture, item.image)
            row["conversations"][0]["value"] = "<image>\nContext: It is shown.\n" + body  # type: ignore[index]
            row["image"] = picture
            problem |= {"image": "image.png", "hint": "It is shown."}
        rows.append(row)
        problems[str(item.id)] = problem | {"split": "test", "lecture": "", "solution": ""}
    _json(data / "llava_test_CQM-A.json", rows)
    _json(data / "problems.json", problems)
    _json(data / "pid_splits.json", {"test": list(problems), "train": []})


def _textvqa(data: Path, items: list[Item]) -> None:
    """As official, question ids are picture ids: the questions of a picture share one."""
    rows, labels = [], []
    for item in items:
        name, text = f"{item.image:016x}", _question(item, "word")
        _save(data / "train_images" / f"{name}.jpg", item.image)
        asked = f"{text}\nReference OCR token: {item.answer.upper()}, EXIT{SHORT}"
        rows.append({"question_id": name, "image": f"{name}.jpg", "text": asked, "category": "default"})
        labels.append({"question_id": item.id, "image_id": name, "question": text, "answers": _ten(item.answer)})
    _jsonl(data / "llava_textvqa_val_v051_ocr.jsonl", rows)
    _json(data / "TextVQA_0.5.1_val.json", {"dataset_type": "val", "data": labels})


def _pope(data: Path, items: list[Item]) -> None:
    categories = ("adversarial", "popular", "random")
    rows: list[dict[str, Any]] = []
    labels: dict[str, list[dict[str, Any]]] = {category: [] for category in categories}
    for item in items:
        image = f"COCO_val2014_{item.image:012d}.jpg"
        _save(data / "val2014" / image, item.image)
        category, text = categories[(item.id - 1) % 3], f"Is there a {item.answer} or {item.turn} in the image?"
        rows.append({"question_id": item.id, "image": image, "text": text + SHORT, "category": category})
        label = {"question_id": item.id, "image": image, "text": text, "label": ("yes", "no")[item.id // 3 % 2]}
        labels[category].append(label)
    _jsonl(data / "llava_pope_test.jsonl", rows)
    for category, found in labels.items():
        _jsonl(data / "coco" / f"coco_pope_{category}.json", found)


def _mme(data: Path, items: list[Item]) -> None:
    """As official, question ids are picture names: the questions of a picture share one."""
    rows = []
    categories = [category for pair in zip(MME_NESTED, MME_FLAT, strict=False) for category in pair] + [*MME_FLAT[5:]]
    release = data / "MME_Benchmark_release_version"
    for item in items:
        category = categories[item.image % len(categories)]
        nested = category in MME_NESTED
        image = f"{category}/images/{item.image:04d}.jpg" if nested else f"{category}/{item.image:04d}.png"
        _save(release / image, item.image)
        text = f"Is it {item.answer}, {item.turn}?"
        rows.append({"question_id": image, "image": image, "text": text + SHORT, "category": category})
        folder = release / category / "questions_answers_YN" if nested else release / category
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / f"{item.image:04d}.txt").open("a" if item.turn else "w") as stream:
            stream.write(f"{text} Please answer yes or no.\t{('Yes', 'No')[item.turn % 2]}\n")
    _jsonl(data / "llava_mme.jsonl", rows)


def _mmbench(data: Path, items: list[Item], file: str) -> None:
    columns = ["index", "question", "hint", *"ABCD", "answer", "category", "image", "source", "l2-category", "comment"]
    data.mkdir(parents=True, exist_ok=True)
    with (data / file).open("w", newline="", encoding="utf-8") as stream:
        table = csv.writer(stream, delimiter="\t", lineterminator="\n")
        table.writerow([*columns, "split"])
        for item in items:
            picture = io.BytesIO()
            random_picture(item.image).save(picture, "JPEG")
            options = [item.answer, *(word for word in WORDS[:3] if word != item.answer)][:3]
            hint = "Look closely." if item.turn else ""
            kind = ("color", "object")[item.turn % 2]
            image = base64.b64encode(picture.getvalue()).decode()
            table.writerow([item.id, _question(item), hint, *options, "", "A", kind, image, "x", kind, "", "dev"])


def _mmvet(data: Path, items: list[Item]) -> None:
    rows = []
    for item in items:
        _save(data / "images" / f"v1_{item.image}.png", item.image)
        rows.append({"question_id": item.id - 1, "image": f"v1_{item.image}.png", "text": _question(item)})
    _jsonl(data / "llava-mm-vet.jsonl", rows)


_MAKERS: dict[str, tuple[str, Callable[[Path, list[Item]], None]]] = {
    "vqav2": ("vqav2", _vqav2),
    "gqa": ("gqa", _gqa),
    "vizwiz": ("vizwiz", _vizwiz),
    "scienceqa": ("scienceqa", _scienceqa),
    "textvqa": ("textvqa", _textvqa),
    "pope": ("pope", _pope),
    "mme": ("MME", _mme),
    "mmbench": ("mmbench", lambda data, items: _mmbench(data, items, "mmbench_dev_20230712.tsv")),
    "mmbench_cn": ("mmbench_cn", lambda data, items: _mmbench(data, items, "mmbench_dev_cn_20231003.tsv")),
    "mmvet": ("mm-vet", _mmvet),
}


def right_answers(name: str, data: Path) -> list[dict[str, Any]]:
    """Return a row with the right answer to every question of a generated benchmark."""
    benchmark = get(name)
    questions = list(benchmark.questions(data / benchmark.question_file))
    texts = _RIGHT[name](data) if name in _RIGHT else ["A"] * len(questions)
    return [
        {"question_id": q.id, **q.extra, "prompt": q.prompt or q.text, "text": text, "metadata": {"image": q.image}}
        for q, text in zip(questions, texts, strict=True)
    ]


def _loaded(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _right_pope(data: Path) -> list[str]:
    labels = {e["question_id"]: e["label"] for file in (data / "coco").iterdir() for e in _lines(file)}
    return [labels[number].capitalize() for number in sorted(labels)]


def _right_mme(data: Path) -> list[str]:
    names = [entry["question_id"] for entry in _lines(data / "llava_mme.jsonl")]
    return [("Yes", "No")[names[:place].count(name) % 2] for place, name in enumerate(names)]


_RIGHT: dict[str, Callable[[Path], list[str]]] = {
    "vqav2": lambda data: [
        e["multiple_choice_answer"] for e in _loaded(data / "v2_mscoco_val2014_annotations.json")["annotations"]
    ],
    "gqa": lambda data: [e["answer"] for e in _loaded(data / "data" / "testdev_balanced_questions.json").values()],
    "vizwiz": lambda data: [e["answers"][0]["answer"] for e in _loaded(data / "val.json")],
    "textvqa": lambda data: [e["answers"][0] for e in _loaded(data / "TextVQA_0.5.1_val.json")["data"]],
    "pope": _right_pope,
    "mme": _right_mme,
}


def write_benchmark(name: str, root: Path, n_images: int = 4, per_image: int = 3) -> Path:
    """Write question file, pictures and labels of a miniature benchmark.

    Args:
        name: as in `llava.eval.benchmarks`.
        root: what `playground/data/eval` is to the real one.
        n_images: number of pictures, of five sizes.
        per_image: questions a picture. ScienceQA gets one more a picture that does without it; in MME and TextVQA the
            questions of a picture share their `question_id`, as they do officially.

    Returns:
        The benchmark's folder under `root`.
    """
    folder, make = _MAKERS[name]
    make(root / folder, list(_items(n_images, per_image)))
    return root / folder
