"""Answer ScienceQA's question file, 1024 new tokens an answer: upstream's door to `llava.eval.answer`."""

import sys
from pathlib import Path

if __package__ in (None, ""):  # run by path: the repository takes the place of this folder
    sys.path[0] = str(Path(__file__).parents[2])

from llava.eval.answer import main
from llava.utils import run_command

if __name__ == "__main__":
    run_command(lambda: main(benchmark="scienceqa", max_new_tokens=1024))
