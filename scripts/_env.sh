# Sourced by the scripts beside it: `ensure_env EXTRA` makes a virtual environment in .venv and installs this
# repository into it with the extra and the versions of constraints.txt. Does nothing the second time.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/v1_5/eval/_attend.sh"
cd "$(dirname "${BASH_SOURCE[0]}")/.."

say() { printf '\n==> %s\n' "$*"; }
die() { printf 'error: %s\n' "$*" >&2; exit 2; }

ensure_env() {
    local extra=$1 base=${PYTHON:-python3} pins=.venv/constraints.txt stamp site=()
    "$base" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null ||
        die "Python 3.11 or newer is needed; set PYTHON=/path/to/python3.11"
    stamp=.venv/installed-$extra
    if [[ -f $stamp && $stamp -nt pyproject.toml && $stamp -nt constraints.txt ]]; then
        say "Using .venv as it is (remove it to start over)"
        return
    fi
    if [[ ! -x .venv/bin/python ]]; then
        # A torch that is already there is used: it is large, and it fits the machine's accelerator.
        if "$base" -c 'import torch; assert tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 6)' 2>/dev/null; then
            site=(--system-site-packages)
        fi
        say "Making .venv with $("$base" --version) ${site[*]}"
        attend "$base" -m venv ${site[@]+"${site[@]}"} .venv || die "python's venv module is missing (Debian: apt install python3-venv)"
    fi
    if .venv/bin/python -c 'import torch' 2>/dev/null; then
        say "Using the installed torch $(.venv/bin/python -c 'import torch; print(torch.__version__)')"
        grep -v '^torch==' constraints.txt > "$pins"
    else
        cp constraints.txt "$pins"
        say "Installing $(grep '^torch==' "$pins")"
        attend .venv/bin/python -m pip install --quiet --disable-pip-version-check "$(grep '^torch==' "$pins")"
    fi
    say "Installing globalcom2[$extra] with the versions of constraints.txt"
    attend .venv/bin/python -m pip install --quiet --disable-pip-version-check -c "$pins" -e ".[$extra]"
    touch "$stamp"
}
