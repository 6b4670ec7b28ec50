#!/usr/bin/env bash
# VizWiz test: EvalAI scores the exported file; with val questions and annotations it is scored here.
source "$(dirname "${BASH_SOURCE[0]}")/_common.sh"
EXPORT=1
benchmark vizwiz vizwiz llava_test.jsonl test \
    --max-new-tokens 128 "$@"
