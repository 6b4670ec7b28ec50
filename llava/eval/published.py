"""What the paper prints (arXiv 2501.05179, Tables I and II), to stand beside what is measured.

Columns: VQAv2, GQA, VizWiz, ScienceQA (image questions), TextVQA, POPE, MME perception, MMBench, MMBench-CN, MM-Vet.
"""

import re

from llava.efficiency import paper as efficiency
from llava.eval import benchmarks

COLUMNS = ("vqav2", "gqa", "vizwiz", "scienceqa", "textvqa", "pope", "mme", "mmbench", "mmbench_cn", "mmvet")
TITLES = ("VQAv2", "GQA", "VizWiz", "SQA", "VQA^T", "POPE", "MME", "MMB", "MMB-CN", "MM-Vet")

Row = tuple[float, ...]
UPPER = ("none", 1.0)

# (method, retention ratio) -> scores in the order of COLUMNS; the last number is the printed average in percent.
TABLE_I: dict[tuple[str, float], Row] = {
    UPPER: (81.8, 64.2, 57.6, 70.1, 61.3, 86.5, 1519.0, 67.4, 60.6, 43.9, 100.0),
    ("fastv", 0.75): (81.1, 62.5, 55.1, 69.3, 59.7, 86.3, 1506.3, 67.6, 59.0, 41.7, 98.0),
    ("sparsevlm", 0.75): (81.1, 62.6, 55.2, 68.5, 60.3, 73.2, 1507.8, 66.1, 58.6, 41.9, 96.3),
    ("fastervlm", 0.75): (81.1, 63.7, 56.5, 68.4, 59.1, 87.5, 1533.4, 67.5, 60.2, 38.5, 98.0),
    ("globalcom2", 0.75): (81.3, 63.8, 56.5, 68.7, 59.4, 87.8, 1548.4, 68.0, 60.6, 40.6, 98.9),
    ("fastv", 0.5): (80.7, 61.8, 54.9, 69.1, 59.6, 85.5, 1490.3, 67.4, 58.5, 41.2, 97.3),
    ("sparsevlm", 0.5): (80.9, 62.0, 55.7, 68.1, 60.0, 73.4, 1484.9, 65.7, 58.9, 39.9, 95.5),
    ("fastervlm", 0.5): (80.6, 63.4, 56.4, 69.1, 58.9, 87.7, 1533.3, 67.4, 60.4, 39.6, 98.2),
    ("globalcom2", 0.5): (80.6, 63.9, 56.5, 68.5, 59.5, 88.1, 1552.9, 67.6, 60.5, 40.4, 98.7),
    ("fastv", 0.25): (78.9, 60.4, 54.2, 69.8, 58.4, 83.1, 1477.3, 65.6, 57.0, 41.1, 95.8),
    ("sparsevlm", 0.25): (78.9, 60.9, 55.6, 67.5, 58.1, 71.0, 1446.1, 63.8, 57.0, 38.0, 93.1),
    ("fastervlm", 0.25): (78.3, 61.3, 55.4, 67.1, 58.8, 87.2, 1454.6, 66.0, 58.4, 37.8, 95.6),
    ("globalcom2", 0.25): (79.4, 61.4, 55.7, 68.1, 59.2, 87.6, 1493.5, 65.9, 58.0, 40.7, 96.9),
    ("fastv", 0.1): (71.9, 55.9, 53.1, 69.3, 55.7, 71.7, 1282.9, 61.6, 51.9, 33.7, 87.8),
    ("sparsevlm", 0.1): (71.6, 56.1, 53.2, 68.6, 52.0, 63.2, 1332.2, 54.5, 50.7, 24.7, 83.2),
    ("fastervlm", 0.1): (74.0, 56.9, 52.6, 66.5, 56.5, 83.6, 1359.2, 61.6, 53.5, 35.0, 90.3),
    ("globalcom2", 0.1): (76.7, 57.1, 54.6, 68.7, 57.2, 83.8, 1365.5, 61.8, 53.4, 36.4, 91.8),
}
TABLE_II: dict[tuple[str, float], Row] = {
    UPPER: (82.8, 65.4, 60.5, 73.5, 64.3, 86.2, 1575.9, 70.0, 64.2, 48.4, 100.0),
    ("fastervlm", 0.75): (81.9, 64.6, 58.7, 72.6, 62.8, 87.6, 1560.3, 69.8, 64.8, 47.5, 99.1),
    ("globalcom2", 0.75): (81.9, 65.0, 58.6, 72.8, 62.9, 87.8, 1567.9, 69.2, 64.7, 49.6, 99.5),
    ("fastervlm", 0.5): (81.3, 64.2, 57.0, 72.5, 62.4, 87.6, 1534.1, 69.5, 64.1, 44.7, 97.7),
    ("globalcom2", 0.5): (81.0, 64.7, 57.1, 73.2, 62.5, 87.7, 1553.5, 69.3, 63.5, 48.0, 98.5),
    ("fastervlm", 0.25): (78.9, 62.3, 55.0, 72.1, 61.2, 86.1, 1516.1, 67.6, 62.1, 44.6, 95.6),
    ("globalcom2", 0.25): (79.9, 62.7, 55.1, 72.3, 61.5, 86.5, 1531.2, 67.9, 62.2, 43.5, 95.9),
    ("fastervlm", 0.1): (74.5, 58.1, 52.8, 70.5, 58.0, 81.6, 1386.2, 61.7, 53.5, 38.3, 88.5),
    ("globalcom2", 0.1): (77.0, 58.3, 52.5, 71.8, 59.1, 82.4, 1399.5, 65.0, 58.5, 36.2, 90.2),
}
TABLES = {"7b": TABLE_I, "13b": TABLE_II}

# Tables V and VI, "Total Time": seconds for MME on one A100-80GB, by (method, ratio) and model size.
TIMES = {
    (UPPER if row.ratio == 1 else ("globalcom2", row.ratio), table.model.rsplit("-", 1)[1]): row.total_time
    for table in efficiency.TABLES
    for row in table.rows
}


def columns() -> list[str]:
    """Return the benchmarks as columns of a table: the paper's ten in its order, then all others that there are."""
    return [*COLUMNS, *(name for name in benchmarks.available() if name not in COLUMNS)]


def title(benchmark: str) -> str:
    """Return the head of a benchmark's column: the paper's, else its name."""
    return dict(zip(COLUMNS, TITLES, strict=True)).get(benchmark, benchmark)


def size_of(model_path: str) -> str | None:
    """Return the size of a model of the paper, known by its path; None: another model."""
    found = re.search(r"(?:next|v1\.6).*?(7b|13b)", model_path.lower())
    return found[1] if found else None


def figures(model_path: str, key: tuple[str, float]) -> dict[str, float]:
    """Return what the paper prints for a model, method and ratio.

    Returns:
        benchmark -> score, `average` in percent, and `seconds` for MME where it is printed; empty: no such row.
    """
    size = size_of(model_path)
    row = TABLES[size].get(key) if size else None
    if row is None:
        return {}
    time = TIMES.get((key, str(size)))
    return dict(zip((*COLUMNS, "average"), row, strict=True)) | ({} if time is None else {"seconds": float(time)})
