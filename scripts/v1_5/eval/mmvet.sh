#!/usr/bin/env bash
# MM-Vet: the exported file is scored by its GPT-4 grader.
source "$(dirname "${BASH_SOURCE[0]}")/_common.sh"
EXPORT=1
benchmark mmvet mm-vet llava-mm-vet.jsonl images \
    --max-new-tokens 1024 "$@"
