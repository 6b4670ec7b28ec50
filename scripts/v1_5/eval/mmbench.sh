#!/usr/bin/env bash
# MMBench dev: scored here from its answer column; the export is for the server.
source "$(dirname "${BASH_SOURCE[0]}")/_common.sh"
EXPORT=1
benchmark mmbench mmbench mmbench_dev_20230712.tsv "" \
    --max-new-tokens 1024 --single-pred-prompt "$@"
