#!/usr/bin/env bash
# VQAv2 test-dev: EvalAI scores the exported file; with val questions and annotations it is scored here.
source "$(dirname "${BASH_SOURCE[0]}")/_common.sh"
EXPORT=1
benchmark vqav2 vqav2 llava_vqav2_mscoco_test-dev2015.jsonl test2015 \
    --max-new-tokens 128 "$@"
