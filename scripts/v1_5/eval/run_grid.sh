#!/usr/bin/env bash
# Benchmarks × methods × ratios, then the paper's Table I (7B) or II (13B) from what was measured:
#   BENCHES="textvqa pope" METHODS="globalcom2 random" RATIOS="0.75 0.5 0.25 0.1" bash scripts/v1_5/eval/run_grid.sh
# The other variables are those of _common.sh; arguments (--markdown, --csv, --json) are the table's. What is finished
# already is not run again. What fails is noted and missing in the table, and the rest goes on: exit code 2 in the end,
# or 3 if some questions could not be asked.
source "$(dirname "${BASH_SOURCE[0]}")/_common.sh"
here=scripts/v1_5/eval
read -ra benches <<< "${BENCHES:-vqav2 gqa vizwiz sqa textvqa pope mme mmbench mmbench_cn mmvet}"
read -ra methods <<< "${METHODS:-globalcom2}"
read -ra ratios <<< "${RATIOS:-0.75 0.5 0.25 0.1}"
for bench in "${benches[@]}"; do
    grep -qs '^benchmark ' "$here/$bench.sh" || { printf 'error: no benchmark %s in %s\n' "$bench" "$here" >&2; exit 2; }
done
# The upper bound comes first: every difference is against the same configuration, uncompressed.
listed=$("$PYTHON" -m llava.eval.cells --methods "${methods[@]}" --ratios "${ratios[@]}" ${PROFILE:+--profile "$PROFILE"})
mapfile -t cells <<< "$listed"
CELLS=$(cells_file "${benches[@]}" "${methods[@]}" "${ratios[@]}")
export CKPT DATA OUT PYTHON NUM_PROCESSES CELLS

# cell LINE BENCH: runs a benchmark's script for one method and ratio.
cell() {
    local method=${1%%$'\t'*} profile=${PROFILE:-}
    [[ $method != none ]] || profile=
    METHOD=$method RATIO=${1#*$'\t'} PROFILE=$profile attend bash "$here/$2.sh"
}
# list BENCH [WHY]: names all cells of a benchmark to the table.
list() {
    local line
    [[ -n ${DRY_RUN:-} ]] || for line in "${cells[@]}"; do STEP=list WHY=${2:-} cell "$line" "$1"; done
}

need_checkpoint
[[ -n ${DRY_RUN:-} ]] || { mkdir -p "$OUT" && : > "$CELLS"; } || exit 2
for bench in "${benches[@]}"; do list "$bench"; done
for bench in "${benches[@]}"; do
    code=0
    STEP=need attend bash "$here/$bench.sh" || code=$?
    noted "$code" "$bench is left out"
    ((code == 0)) || { list "$bench" "no data"; continue; }
    for line in "${cells[@]}"; do
        code=0
        cell "$line" "$bench" || code=$?
        share=${line#*$'\t'}
        noted "$code" "$bench with ${line%%$'\t'*}${share:+ at $share} failed"
        ((code == 0 || code == 3)) || STEP=list WHY="exit code $code" cell "$line" "$bench"
    done
done
code=0
run "$PYTHON" -m llava.eval.table --root "$OUT" --data "$DATA" --model-path "$CKPT" --cells "$CELLS" "$@" || code=$?
noted "$code" "there is no table"
exit "$status"
