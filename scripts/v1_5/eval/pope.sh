#!/usr/bin/env bash
# POPE: is it in the picture? F1 averaged over random, popular and adversarial questions, scored here.
source "$(dirname "${BASH_SOURCE[0]}")/_common.sh"
benchmark pope pope llava_pope_test.jsonl val2014 \
    --max-new-tokens 128 "$@"
