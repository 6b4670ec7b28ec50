"""Ten test questions, one of each task, answered at several ratios, beside the truth: `python -m llava.pocket.demo`."""

import json
from itertools import count
from pathlib import Path

import numpy as np

from llava.compress import get
from llava.eval.run_llava import ask
from llava.model.builder import load_pretrained_model
from llava.output import draft_of, make_folder
from llava.pocket.questions import TASKS, Balance
from llava.pocket.scenes import make_scene
from llava.utils import OneLineParser, at_least, run_command

FIRST = 10_000
"""Number of the first scene shown: none of the benchmark's."""


def main() -> None:
    """Run the command."""
    parser = OneLineParser(prog="llava.pocket.demo", description=(__doc__ or "").split(":")[0])
    parser.add_argument("--model-path", default="playground/pocket")
    parser.add_argument("--method", default="globalcom2")
    parser.add_argument("--ratios", nargs="+", type=float, default=[1.0, 0.25])
    parser.add_argument("--first", type=at_least(0), default=FIRST, help="number of the first test scene")
    parser.add_argument("--pictures", type=Path, help="write the scenes into this folder")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--json", action="store_true", help="print one JSON object a question")
    args = parser.parse_args()
    if args.pictures:
        make_folder(args.pictures)
    methods = [get(args.method, retention_ratio=ratio) for ratio in args.ratios]
    tokenizer, model, processor, _ = load_pretrained_model(args.model_path, device=args.device)
    rng, balance = np.random.default_rng(args.first), Balance()
    for number, (task, make) in enumerate(TASKS.items()):
        drawn = (make_scene("test", index, (2, 2)) for index in count(args.first + number, len(TASKS)))
        scene, possible = next((scene, found) for scene in drawn if (found := list(make(scene, rng))))
        (asked,) = balance.choose(possible, 1, rng)
        answers = []
        for method in methods:
            model.method = method
            answers.append(ask(tokenizer, model, processor, asked.prompt, [scene.image], max_new_tokens=64))
        if args.pictures:
            with draft_of(args.pictures / f"{task}.png") as draft:
                scene.image.save(draft, format="PNG")
        if args.json:
            said = dict(zip(map(str, args.ratios), answers, strict=True))
            print(json.dumps({"task": task, "question": asked.prompt, "truth": asked.answer, "answers": said}))
            continue
        print(f"\n{task}: {asked.text}" + "".join(f"  {o}" for o in asked.options))
        print(f"  truth    {asked.answer}")
        for ratio, answer in zip(args.ratios, answers, strict=True):
            print(f"  R = {ratio:<4g} {answer}")


if __name__ == "__main__":
    run_command(main)
