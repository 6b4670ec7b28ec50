#!/usr/bin/env bash
# Which benchmarks' data are there, which are missing, where they officially come from and what they must contain.
# Exit code 2 if any is missing.
source "$(dirname "${BASH_SOURCE[0]}")/_common.sh"
exec "$PYTHON" -m llava.eval.check_data --data "$DATA"
