"""The scripts and the README: well-formed, consistent with each other, and true where a laptop can check."""

import re
import subprocess
import tomllib
from pathlib import Path

import pytest

from llava.compress import available
from llava.compress.base import PROFILES

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("script", sorted(p.relative_to(ROOT).as_posix() for p in ROOT.glob("scripts/**/*.sh")))
def test_script_parses(script):
    subprocess.run(["bash", "-n", ROOT / script], check=True)


def test_ci_runs_the_test_script():
    assert "bash scripts/test.sh --all" in (ROOT / ".ci" / "run").read_text()


def test_readme_names_both_commands():
    assert "bash scripts/quickstart.sh" in README
    assert "bash scripts/test.sh" in README


def test_readme_names_every_method_and_profile():
    for name in (*available(), *PROFILES):
        assert f"`{name}`" in README


def test_readme_quotes_line_101():
    source = (ROOT / "llava" / "model" / "llava_arch.py").read_text().splitlines()
    assert source[100] == "retention_ratio = 0.25"
    assert f"`{source[100]}`" in README


def test_relative_links_lead_somewhere():
    for page in ("README.md", "CONTRIBUTING.md"):
        for target in re.findall(r"\]\((?!http)([^)#]+)", (ROOT / page).read_text()):
            assert (ROOT / target).exists(), target


def test_constraints_pin_what_pyproject_asks_for():
    """Every dependency the suite needs is pinned, so that two machines test the same thing."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["pocket"], *extras["lora"], *extras["dev"]]
    names = {re.split(r"[\[<>=!; ]", entry)[0] for entry in wanted} - {"globalcom2", "shortuuid", "tqdm"}
    pinned = {line.split("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    assert names <= pinned
    assert "torchvision" not in names
