"""Processes of one run: every item is drawn once, and a run with too few or too many says so."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from llava.constants import InputError
from llava.eval.ranks import Ranks

DRAW = """
import json, random, sys, time
from pathlib import Path
from llava.eval.ranks import Ranks
with Ranks(int(sys.argv[2])) as ranks:
    todo = ranks.share([3, 1, 2] if ranks.rank == 0 else None)
    mine = []
    for item in ranks.claim(100, 7):
        mine.append(item)
        time.sleep(random.random() / 200 * (1 + 9 * ranks.rank))
    ranks.count("drawn", len(mine))
    ranks.wait()
    found = {"mine": mine, "todo": todo, "all": ranks.count("drawn", 0), "device": ranks.device}
    (Path(sys.argv[1]) / f"{ranks.rank}.json").write_text(json.dumps(found))
"""


def launch(folder: Path, processes: int, wanted: int) -> subprocess.CompletedProcess[str]:
    script = folder / "draw.py"
    script.write_text(DRAW)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [*launcher, str(script), str(folder), str(wanted)]
    return subprocess.run(command, capture_output=True, text=True, timeout=200)


def test_three_processes_draw_every_item_once_and_stay_busy(tmp_path):
    import json

    done = launch(tmp_path, 3, 3)
    assert done.returncode == 0, done.stderr
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(3)]
    assert sorted(item for one in found for item in one["mine"]) == list(range(100))
    assert all(one["mine"] == sorted(one["mine"]) for one in found)
    assert len(found[0]["mine"]) > len(found[2]["mine"]), "the slow one draws less"
    assert [one["all"] for one in found] == [100] * 3
    assert [one["todo"] for one in found] == [[3, 1, 2]] * 3


def test_another_number_than_asked_is_said(tmp_path):
    done = launch(tmp_path, 2, 3)
    assert done.returncode != 0
    assert "3 processes were asked for, but 2 started" in done.stderr
    assert not list(tmp_path.glob("*.json"))


def test_alone():
    with Ranks() as ranks:
        assert (ranks.rank, ranks.world) == (0, 1)
        assert list(ranks.claim(5, 2)) == [0, 1, 2, 3, 4]
        assert list(ranks.claim(0, 2)) == []
        assert [ranks.count("a", 2), ranks.count("b", 1), ranks.count("a", 3)] == [2, 1, 5]
        assert ranks.share("x") == ranks.first(lambda: "x") == "x"
        ranks.wait()


@pytest.mark.parametrize("wanted", [0, 2])
def test_alone_where_others_were_asked_for(wanted):
    with pytest.raises(InputError, match=f"{wanted} processes were asked for, but 1 started"):
        Ranks(wanted)
    assert Ranks(1).world == 1


LAUNCH = [sys.executable, "-m", "llava.eval.launch", "--standalone", "--nproc_per_node", "2"]


@pytest.mark.parametrize(
    ("body", "code", "said"),
    [
        ("raise SystemExit(0)", 0, ""),
        ("from llava.constants import InputError\nwith Ranks(): raise InputError('no such thing')", 2, "no such thing"),
        ("Ranks(3)", 2, "3 processes were asked for, but 2 started"),
        (
            "def work():\n    raise InputError('the first alone knows')\n"
            "from llava.constants import InputError\nwith Ranks() as ranks: ranks.first(work)",
            2,
            "the first alone knows",
        ),
        ("with Ranks() as ranks:\n    if ranks.rank: os.kill(os.getpid(), 9)\n    ranks.wait()", 137, "SIGKILL"),
        ("with Ranks() as ranks:\n    if ranks.rank: os.kill(os.getpid(), 9)\n    time.sleep(60)", 137, "SIGKILL"),
    ],
)
def test_launched_processes_complain_once_with_their_own_code(tmp_path, body, code, said):
    script = tmp_path / "script.py"
    body = "\n".join("    " + line for line in body.split("\n"))
    script.write_text(
        f"import os, time\nfrom llava.eval.ranks import Ranks\nfrom llava.utils import run_command\n"
        f"def main():\n{body}\nrun_command(main)\n"
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*LAUNCH, str(script)], env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == code, done.stderr
    assert [said in line for line in done.stderr.splitlines()] == [True] * (code != 0)


def started(tmp_path, body, wait_for):
    """A launcher whose two processes run a body; returns when all `wait_for` files are there."""
    script = tmp_path / "script.py"
    body = "\n".join("    " + line for line in body.split("\n"))
    script.write_text(
        "import os, time\nfrom pathlib import Path\nfrom llava.eval.ranks import Ranks\n"
        f"from llava.utils import run_command\ndef main():\n{body}\nrun_command(main)\n"
    )
    launcher = subprocess.Popen(
        [*LAUNCH, str(script), str(tmp_path)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: [signal.signal(number, signal.SIG_DFL) for number in (signal.SIGINT, signal.SIGTERM)],
    )
    while not all((tmp_path / name).exists() for name in wait_for):
        assert launcher.poll() is None, launcher.communicate()
    return launcher


WORKS = """import sys
with Ranks() as ranks:
    (Path(sys.argv[1]) / str(ranks.rank)).write_text(str(os.getpid()))
    try:
        time.sleep(200)
    except KeyboardInterrupt as stop:
        stop.add_note("7 of 9 answers kept; the same command continues")
        raise"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("whom", "number", "code"), [("launcher", 2, 130), ("launcher", 15, 143), ("process", 15, 143)]
)
def test_launched_processes_are_interrupted_with_one_line(tmp_path, whom, number, code):
    launcher = started(tmp_path, WORKS, ["0", "1"])
    os.kill(launcher.pid if whom == "launcher" else int((tmp_path / "1").read_text()), number)
    out, err = launcher.communicate(timeout=100)
    said = "interrupted: 7 of 9 answers kept; the same command continues\n"
    assert (launcher.returncode, out, err) == (code, "", said)


@pytest.mark.slow
def test_launched_processes_do_not_outlive_their_launcher():
    """Not even where it is killed: one process would wait for the others for days."""
    command = [*LAUNCH, "-m", "llava.eval.throughput", "--images", "400", "--device", "cpu"]
    launcher = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children")
    while len(found := children.read_text().split()) < 2 or not all(map(imports_torch, found)):
        assert launcher.poll() is None
    launcher.kill()
    out, err = launcher.communicate(timeout=100)  # returns once nobody holds the pipes any more
    assert (launcher.returncode, out, err) == (-9, "", "")


def imports_torch(process: str) -> bool:
    """Whether a process has got as far as that."""
    return "libtorch_cpu" in Path(f"/proc/{process}/maps").read_text()
