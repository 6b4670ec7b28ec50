#!/usr/bin/env bash
# Everything CI checks: ruff, mypy, pytest, in .venv. `--all` adds the slow tier; further arguments go to pytest.
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"
ensure_env dev

tier=()
if [[ ${1:-} == --all ]]; then
    tier=(-m "slow or not slow")
    shift
fi
say "ruff"
.venv/bin/ruff check .
.venv/bin/ruff format --check .
say "mypy"
.venv/bin/mypy
say "pytest"
.venv/bin/python -m pytest -n 2 ${tier[@]+"${tier[@]}"} "$@"
