#!/usr/bin/env bash
# GQA testdev_balanced: exact match, scored here; the export is for GQA's own eval.py.
source "$(dirname "${BASH_SOURCE[0]}")/_common.sh"
EXPORT=1
benchmark gqa gqa llava_gqa_testdev_balanced.jsonl data/images \
    --max-new-tokens 128 "$@"
