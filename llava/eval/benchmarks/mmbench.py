"""MMBench dev in English."""

from llava.eval.benchmarks._mmbench import MMBenchBase


class MMBench(MMBenchBase):
    """Choices about twenty abilities, asked in English."""

    name = "mmbench"
    folder = "mmbench"
    question_file = "mmbench_dev_20230712.tsv"
    labels = (question_file,)
    contents = {question_file: "4377 questions with pictures and answers"}
    source = "download.openmmlab.com/mmclassification/datasets/mmbench/mmbench_dev_20230712.tsv"
