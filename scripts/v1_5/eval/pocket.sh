#!/usr/bin/env bash
# The pocket benchmark: ten tasks × methods × ratios; table, ranking, curve and kept tokens go to OUT:
#   METHODS="globalcom2 random uniform" RATIOS="0.75 0.5 0.25 0.1" LIMIT=100 bash scripts/v1_5/eval/pocket.sh
# SAMPLE=100 takes questions from all categories instead of the first. What fails is noted and the rest goes on.
# SWEEP=1 adds GlobalCom² over τ and α at 0.25. Scenes are drawn when they are missing; nothing is downloaded.
CKPT=${CKPT:-playground/pocket} DATA=${DATA:-playground/data/pocket}
OUT=${OUT:-playground/data/pocket/out${LIMIT:+-first$LIMIT}${SAMPLE:+-sample$SAMPLE}}
source "$(dirname "${BASH_SOURCE[0]}")/_common.sh"
read -ra ratios <<< "${RATIOS:-0.75 0.5 0.25 0.1}" && read -ra methods <<< "${METHODS:-globalcom2}"
CELLS=$(cells_file "${methods[@]}" "${ratios[@]}" "${SWEEP:-}")
runs=(--root "$OUT" --data "$DATA" --model-path "$CKPT" --cells "$CELLS")

# step WHAT COMMAND…: one part of all this.
step() {
    local code=0
    run "${@:2}" || code=$?
    noted "$code" "$1 failed"
}
grid() {
    local code=0
    run "$PYTHON" -m llava.eval.grid --model-path "$CKPT" --data "$DATA" --out "$OUT" --cells "$CELLS" \
        ${LIMIT:+--limit "$LIMIT"} ${SAMPLE:+--sample "$SAMPLE"} "$@" || code=$?
    [[ -n ${DRY_RUN:-} || -s $CELLS ]] || exit "$code" # nothing could begin
    noted "$code" "the grid failed"
}

[[ -f $DATA/truth.json ]] || run "$PYTHON" -m llava.pocket.write "$DATA"
[[ -n ${DRY_RUN:-} ]] || rm -f "$CELLS"
grid --methods "${methods[@]}" --ratios "${ratios[@]}"
if [[ -n ${SWEEP:-} ]]; then
    grid --ratios 0.25 --methods "globalcom2(temperature="{0.1,1.0,3.0,30.0,100.0}")" "globalcom2(alpha="{0.0,0.25,0.75,1.0}")"
    step "a curve" "$PYTHON" -m llava.eval.plots "${runs[@]}" --field temperature --log --output "$OUT/temperature.png"
    step "a curve" "$PYTHON" -m llava.eval.plots "${runs[@]}" --field alpha --output "$OUT/alpha.png"
fi
step "the table" "$PYTHON" -m llava.eval.table "${runs[@]}"
step "the ranking" "$PYTHON" -m llava.pocket.rank "${runs[@]}" --against "${methods[0]}"
step "a curve" "$PYTHON" -m llava.eval.plots "${runs[@]}" --output "$OUT/retention.png"
for scene in 0000 0001 0002 0003; do
    step "a picture" "$PYTHON" -m llava.visualize --model-path "$CKPT" --image-file "$DATA/scenes/$scene.png" \
        --retention-ratio 0.25 --output "$OUT/kept-$scene.png"
done
exit "$status"
