# Sourced by the benchmarks' scripts. Variables, all optional:
#   CKPT (./liuhaotian/llava-next-7b)  METHOD (globalcom2)  RATIO (LLAVA_RETENTION_RATIO, else line 101)  PROFILE
#   LIMIT first N questions  SAMPLE N questions from all categories, the same for every method
#   OUT, DATA (playground/data/eval)  BATCH (8)  NUM_PROCESSES (one per CUDA_VISIBLE_DEVICES)
#   PYTHON (.venv/bin/python, else python3)  DRY_RUN=1 prints the commands
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_attend.sh"
cd "$(dirname "${BASH_SOURCE[0]}")/../../.."

CKPT=${CKPT:-./liuhaotian/llava-next-7b}
METHOD=${METHOD:-globalcom2}
DATA=${DATA:-playground/data/eval}
OUT=${OUT:-playground/data/eval}
[[ -n ${PYTHON:-} ]] || { [[ -x .venv/bin/python ]] && PYTHON=.venv/bin/python || PYTHON=python3; }
devices=${CUDA_VISIBLE_DEVICES:-}
commas=${devices//[^,]/}
NUM_PROCESSES=${NUM_PROCESSES:-$((${#commas} + 1))}

if [[ ! ${LIMIT:-1} =~ ^[1-9][0-9]*$ || ! ${SAMPLE:-1} =~ ^[1-9][0-9]*$ || -n ${LIMIT:+${SAMPLE:-}} ]]; then
    printf "error: LIMIT and SAMPLE are numbers of questions, one of them at a time; got '%s' and '%s'\n" \
        "${LIMIT:-}" "${SAMPLE:-}" >&2
    exit 2
fi

# The ratio in force names the answers file, so that runs at different ratios never meet, line 101 edited or not, and
# found by name, as an edit above it moves it.
line_101=$(sed -n '/^retention_ratio *=/{s/[^=]*= *\([^ #]*\).*/\1/p;q;}' llava/model/llava_arch.py)
ratio=${RATIO:-${LLAVA_RETENTION_RATIO:-$line_101}}
[[ $METHOD != none ]] || ratio=1.0
label=$METHOD-$ratio${PROFILE:+-$PROFILE}${OCR:+-ocr$OCR}${LIMIT:+-first$LIMIT}${SAMPLE:+-sample$SAMPLE}
label=$(printf '%s' "$label" | tr -c 'A-Za-z0-9.=-' '_')

[[ -n ${DRY_RUN:-} || ${STEP:-} == list ]] || attend "$PYTHON" -c 'import importlib.util as u, sys
sys.exit(not all(map(u.find_spec, ("torch", "transformers", "shortuuid"))))' || {
    printf 'error: %s lacks the packages; run bash scripts/quickstart.sh, or pip install -e . there\n' "$PYTHON" >&2
    exit 2
}

run() {
    if [[ -n ${DRY_RUN:-} ]]; then printf '%q ' "$@"; printf '\n'; else attend "$@"; fi
}

# noted CODE WHAT: keeps what became of one part of many in `status`; only an interrupt ends the others too.
status=0
noted() {
    case $1 in
        0) ;;
        3) ((status)) || status=3 ;;
        129 | 130 | 143) exit "$1" ;;
        *) status=2 && printf 'note: %s (exit code %s); the others go on\n' "$2" "$1" >&2 ;;
    esac
}

# cells_file WORD…: the name of the list of a grid's cells that the table reads; grids that differ have lists that differ.
cells_file() {
    printf '%s/cells-%s.tsv' "$OUT" "$(printf '%s\n' "$CKPT" "$label" "$@" | cksum | cut -d' ' -f1)"
}

# need_checkpoint, need NAME: say in one line, before anything is loaded, what of the checkpoint and the data is missing.
need_checkpoint() {
    [[ -z ${DRY_RUN:-} ]] || return 0
    if [[ ! -f $CKPT/config.json && ( -d $CKPT || ! $CKPT =~ ^[A-Za-z0-9_-][A-Za-z0-9_.-]*/[A-Za-z0-9_.-]+$ ) ]]; then
        printf 'error: no checkpoint at %s; put %s there, or set CKPT to a folder or hub id\n' \
            "$CKPT" huggingface.co/liuhaotian/llava-v1.6-vicuna-7b >&2
        exit 2
    fi
}
need() {
    need_checkpoint
    [[ -n ${DRY_RUN:-} ]] || attend "$PYTHON" -m llava.eval.check_data --benchmark "$1" --data "$DATA"
}

# benchmark NAME FOLDER QUESTIONS IMAGES [answerer's options]: answers, scores, and exports what a server takes.
# STEP=list only adds the run to the list CELLS (WHY: it failed), STEP=need only looks for its data.
benchmark() {
    local name=$1 folder=$2 questions=$3 images=$4 code=0
    shift 4
    local data=$DATA/$folder model
    model=$(basename "$CKPT")
    local answers=$OUT/$folder/answers/$model/$label.jsonl
    case ${STEP:-} in
        list)
            printf '%s\t%s\t%s\t%s\t%s\t%s\n' \
                "$name" "$METHOD" "$ratio" "${PROFILE:-}" "$answers" "${WHY:-}" >> "$CELLS"
            exit
            ;;
        need) need "$name"; exit ;;
    esac
    need "$name"
    local launch=("$PYTHON" -m)
    if ((NUM_PROCESSES > 1)); then
        export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # torchrun's own default, without its warning
        launch=("$PYTHON" -m llava.eval.launch --standalone --nproc_per_node "$NUM_PROCESSES" -m)
    fi
    run "${launch[@]}" llava.eval.answer --benchmark "$name" --model-path "$CKPT" --question-file "$data/$questions" \
        --image-folder "$data/$images" --answers-file "$answers" --temperature 0 --method "$METHOD" \
        ${RATIO:+--retention-ratio "$RATIO"} ${PROFILE:+--profile "$PROFILE"} ${LIMIT:+--limit "$LIMIT"} \
        ${SAMPLE:+--sample "$SAMPLE"} ${BATCH:+--batch-size "$BATCH"} --num-processes "$NUM_PROCESSES" "$@" || code=$?
    ((code == 0 || code == 3)) || exit "$code"
    # Under torchrun, too, questions that could not be asked end in exit code 3; what was answered is scored.
    if [[ -z ${DRY_RUN:-} ]] && grep -q '"error": "' "$answers"; then code=3; fi
    # Part of the questions is no submission.
    local export=()
    [[ -z ${EXPORT:-} || -n ${LIMIT:-}${SAMPLE:-} ]] || export=(--export "$OUT/$folder/answers_upload/$model/$label")
    run "$PYTHON" -m llava.eval.score --benchmark "$name" --answers-file "$answers" --data "$data" \
        ${export[@]+"${export[@]}"} || { local failed=$?; ((code)) || code=$failed; }
    exit "$code"
}
