#!/usr/bin/env bash
# MMBench-CN dev: scored here from its answer column; the export is for the server.
source "$(dirname "${BASH_SOURCE[0]}")/_common.sh"
EXPORT=1
benchmark mmbench_cn mmbench_cn mmbench_dev_cn_20231003.tsv "" \
    --max-new-tokens 1024 --single-pred-prompt --lang cn "$@"
