"""MMBench dev in Chinese."""

from llava.eval.benchmarks._mmbench import MMBenchBase


class MMBenchCN(MMBenchBase):
    """The same choices in Chinese."""

    name = "mmbench_cn"
    folder = "mmbench_cn"
    question_file = "mmbench_dev_cn_20231003.tsv"
    labels = (question_file,)
    contents = {question_file: "the dev questions in Chinese with pictures and answers"}
    lang = "cn"
    source = "download.openmmlab.com/mmclassification/datasets/mmbench/mmbench_dev_cn_20231003.tsv"
