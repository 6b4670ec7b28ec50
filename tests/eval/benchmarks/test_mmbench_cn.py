"""MMBench-CN: its own folder, file and language; all else is tested with MMBench."""

from pathlib import Path

from llava.eval.benchmarks import get
from tests.eval.benchmarks.rows import row
from tests.eval.benchmarks.test_mmbench import THREE, table


def test_prompt_and_score(tmp_path: Path) -> None:
    file = table(tmp_path, THREE | {"hint": "看图。", "question": "哪个?"}, name="mmbench_dev_cn_20231003.tsv")
    (question,) = get("mmbench_cn").questions(file, single_pred_prompt=True)
    assert question.text == "看图。\n哪个?\nA. ant\nB. bee\nC. cow\n请直接回答选项字母。"
    assert question.prompt == "看图。\n哪个?\nA. ant\nB. bee\nC. cow"
    assert get("mmbench_cn").score([row(241, "答案是B。")], tmp_path).metrics["circular"] == 100
