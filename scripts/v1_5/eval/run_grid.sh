#!/usr/bin/env bash
# Benchmarks × methods × ratios, then the paper's Table I (7B) or II (13B) from what was measured:
#   BENCHES="textvqa pope" METHODS="globalcom2 random" RATIOS="0.75 0.5 0.25 0.1" bash scripts/v1_5/eval/run_grid.sh
# The other variables are those of _common.sh. What is finished already is not run again.
source "$(dirname "${BASH_SOURCE[0]}")/_common.sh"
here=scripts/v1_5/eval
read -ra benches <<< "${BENCHES:-vqav2 gqa vizwiz sqa textvqa pope mme mmbench mmbench_cn mmvet}"
read -ra methods <<< "${METHODS:-globalcom2}"
read -ra ratios <<< "${RATIOS:-0.75 0.5 0.25 0.1}"
export CKPT DATA OUT PYTHON NUM_PROCESSES
status=0
cell() {
    local code=0
    METHOD=$1 RATIO=$2 attend bash "$here/$3.sh" || code=$?
    ((code == 0 || code == 3)) || exit "$code"
    ((code == 0)) || status=3
}
for bench in "${benches[@]}"; do
    # The upper bound first: every difference is against the same configuration, uncompressed.
    PROFILE='' cell none 1.0 "$bench"
    for method in "${methods[@]}"; do
        for share in "${ratios[@]}"; do cell "$method" "$share" "$bench"; done
    done
done
run "$PYTHON" -m llava.eval.table --root "$OUT" --data "$DATA" --model-path "$CKPT"
exit "$status"
