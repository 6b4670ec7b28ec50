"""Answer a file of one JSON object a line, 128 new tokens an answer: upstream's door to `llava.eval.answer`."""

import sys
from pathlib import Path

if __package__ in (None, ""):  # run by path: the repository takes the place of this folder
    sys.path[0] = str(Path(__file__).parents[2])

from llava.eval.answer import main
from llava.utils import run_command

if __name__ == "__main__":
    # A file whose name is no benchmark's is asked as it stands, by any benchmark of that format.
    run_command(lambda: main(benchmark="vqav2", max_new_tokens=128))
