#!/usr/bin/env bash
# ScienceQA test: accuracy over all and over image questions (the number papers quote), scored here.
source "$(dirname "${BASH_SOURCE[0]}")/_common.sh"
benchmark scienceqa scienceqa llava_test_CQM-A.json images/test \
    --max-new-tokens 1024 --single-pred-prompt "$@"
