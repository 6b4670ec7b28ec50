#!/usr/bin/env bash
# MME: perception and cognition from pairs of yes/no questions, scored here.
source "$(dirname "${BASH_SOURCE[0]}")/_common.sh"
EXPORT=1
benchmark mme MME llava_mme.jsonl MME_Benchmark_release_version \
    --max-new-tokens 128 "$@"
