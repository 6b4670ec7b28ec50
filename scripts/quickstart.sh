#!/usr/bin/env bash
# From a bare clone to answers: installs into .venv and asks, at retention ratios 1.0 and 0.25, ten questions about
# synthetic scenes, with the truth beside the answers, and one about a photograph; draws which visual tokens were kept.
# Without CKPT it runs the small checkpoint of playground/pocket, which knows its scenes and nothing of photographs;
# CKPT=./liuhaotian/llava-next-7b runs the real one, on the photograph alone.
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"
ensure_env pocket

python=.venv/bin/python
out=${OUT:-outputs/quickstart}
pictures=("$($python -c 'import pathlib, sklearn; print(pathlib.Path(sklearn.__file__).parent / "datasets/images/china.jpg")')")
mkdir -p "$out"
if [[ -z ${CKPT:-} ]]; then
    CKPT=playground/pocket
    say "Ten test questions, their truth, and the answers at retention ratios 1.0 and 0.25"
    attend $python -m llava.pocket.demo --model-path "$CKPT" --pictures "$out/scenes"
    pictures+=("$out"/scenes/{textvqa,mmvet}.png)
fi
for ratio in 1.0 0.25; do
    say "A photograph at retention ratio $ratio"
    attend $python -m llava.eval.run_llava --model-path "$CKPT" --image-file "${pictures[0]}" \
        --query "Describe the picture." --max-new-tokens 48 --retention-ratio "$ratio"
done
for picture in "${pictures[@]}"; do
    name=$(basename "${picture%.*}")
    say "What was kept of $name at 0.25"
    attend $python -m llava.visualize --model-path "$CKPT" --image-file "$picture" --retention-ratio 0.25 --output "$out/${name}_kept.png"
done
