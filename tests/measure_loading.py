"""Measure the peak memory of loading against the size of the weights; by hand, not by pytest.

`PYTHONPATH=. python tests/measure_loading.py [--megabytes 600] [--dtypes float16,bfloat16] [--folder DIR]` writes
synthetic float16 checkpoints in the published formats, loads each in a fresh process and prints one line per case. The
acceptance is a peak of at most 1.3 times the weights as loaded.

Peak is what the process holds at most, less what it held before (imports done, a miniature loaded once so that lazy
imports are done too), until every page of the loaded weights has been touched: on the CPU, weights of the wanted dtype
stay mapped to their file, and would else cost nothing. `anonymous`, sampled every millisecond, is memory the kernel
cannot take back. `total` adds the mapped pages of the weight files, which it can once they have been converted.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any
from unittest import mock

CASES = [
    ("v1.6-vicuna", "safetensors", 3),
    ("v1.6-vicuna", "safetensors", 1),
    ("v1.6-vicuna", "bin", 3),
    ("v1.6-vicuna", "bin", 1),
    ("v1.5", "safetensors", 3),
    ("v1.5", "bin", 3),
]
# The tower's share of the 7B checkpoint is 4 %; here it is that, or a little more.
TOWER = {
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 16,
    "num_attention_heads": 4,
    "image_size": 84,
    "patch_size": 14,
    "projection_dim": 16,
}
HIDDEN, INNER, ROWS = 1024, 2816, 32000


def write_checkpoint(folder: Path, version: str, file_format: str, shards: int, megabytes: int) -> None:
    """Write a checkpoint of about the given size in float16: the miniature's names with larger dimensions."""
    import torch

    from llava.model import miniature

    per_layer = 2 * (4 * HIDDEN * HIDDEN + 3 * HIDDEN * INNER)
    layers = max(1, round((megabytes * 1e6 - 4 * ROWS * HIDDEN) / per_layer))
    sizes = {
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": layers,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "vocab_size": ROWS,
        "mm_hidden_size": TOWER["hidden_size"],
    }
    published = miniature.published_config

    def half_state(config: dict[str, Any], seed: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(seed)
        shapes = miniature.state_shapes(config, TOWER)
        return {name: torch.randn(shape, generator=generator).mul_(0.02).half() for name, shape in shapes.items()}

    with (
        mock.patch.object(miniature, "VISION", TOWER),
        mock.patch.object(miniature, "published_config", lambda version: published(version) | sizes),
        mock.patch.object(miniature, "random_state", half_state),
    ):
        miniature.write_miniature(folder, version, file_format=file_format, shards=shards)


def memory(field: str) -> float:
    """One field of this process's status in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith(f"{field}:"))


class AnonymousPeak(threading.Thread):
    """The largest RssAnon seen, which the kernel itself does not record."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak, self.going = 0.0, True

    def run(self) -> None:
        while self.going:
            self.peak = max(self.peak, memory("RssAnon"))
            time.sleep(0.001)


def measure(folder: str, warm: str, dtype: str) -> None:
    """Load a checkpoint in this process and print what it took as JSON."""
    import torch

    from llava.model.builder import load_pretrained_model

    torch.set_num_threads(1)
    wanted = getattr(torch, dtype)
    load_pretrained_model(warm, None, "llava", device_map="cpu", dtype=wanted)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    before = {field: memory(field) for field in ("VmRSS", "RssAnon")}
    sampler = AnonymousPeak()
    sampler.start()
    start = time.perf_counter()
    _, model, _, _ = load_pretrained_model(folder, None, "llava", device_map="cpu", dtype=wanted)
    seconds = time.perf_counter() - start
    for parameter in model.parameters():
        parameter.detach().flatten()[::1024].sum()  # one element a page
    sampler.going = False
    sampler.join()
    weights = sum(p.nbytes for p in model.parameters()) / 1e6
    found = {
        "weights": weights,
        "baseline": before["VmRSS"],
        "total": (memory("VmHWM") - before["VmRSS"]) / weights,
        "anonymous": (sampler.peak - before["RssAnon"]) / weights,
        "seconds": seconds,
    }
    print(json.dumps(found))


def main() -> None:
    """Write, load and report every case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=600)
    parser.add_argument("--dtypes", default="float16", help="comma-separated")
    parser.add_argument("--folder", help="where to write (default: a temporary folder)")
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        measure(*args.measure)
        return
    from llava.model.miniature import write_miniature

    with tempfile.TemporaryDirectory(dir=args.folder) as root:
        print(f"{'case':32} {'dtype':>9} {'weights':>8} {'total':>6} {'anonymous':>10} {'seconds':>8}")
        for version, file_format, shards in CASES:
            folder, warm = Path(root) / "large", Path(root) / f"warm-{version}-{file_format}"
            write_checkpoint(folder, version, file_format, shards, args.megabytes)
            write_miniature(warm, version, file_format=file_format)
            for dtype in args.dtypes.split(","):
                case = f"{version} {file_format} x{shards}"
                command = [sys.executable, __file__, "--measure", str(folder), str(warm), dtype]
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                if done.returncode:
                    sys.exit(f"{case} failed:\n{done.stderr}")
                found = json.loads(done.stdout.splitlines()[-1])
                print(
                    f"{case:32} {dtype:>9} {found['weights']:5.0f} MB {found['total']:6.2f} {found['anonymous']:10.2f}"
                    f" {found['seconds']:8.2f}"
                )


if __name__ == "__main__":
    main()
