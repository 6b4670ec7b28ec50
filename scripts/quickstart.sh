#!/usr/bin/env bash
# From a bare clone to answers: installs into .venv, asks about two photographs at retention ratios 1.0 and 0.25, and
# draws which visual tokens were kept. Without CKPT it runs a tiny random model, whose words are noise while its token
# accounts and pictures are real; CKPT=./liuhaotian/llava-next-7b runs the real one.
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"
ensure_env demo

python=.venv/bin/python
out=${OUT:-outputs/quickstart}
mkdir -p "$out"
if [[ -z ${CKPT:-} ]]; then
    CKPT=$out/miniature
    say "Writing a tiny random LLaVA-NeXT in the published format to $CKPT"
    $python -m llava.model.miniature "$CKPT"
fi
photos=$($python -c 'import pathlib, skimage; print(pathlib.Path(skimage.__file__).parent / "data")')

for photo in coffee.png astronaut.png; do
    for ratio in 1.0 0.25; do
        say "$photo at retention ratio $ratio"
        $python -m llava.eval.run_llava --model-path "$CKPT" --image-file "$photos/$photo" \
            --query "What is shown in this image?" --max-new-tokens 16 --retention-ratio "$ratio"
    done
    say "What was kept of $photo at 0.25"
    $python -m llava.visualize --model-path "$CKPT" --image-file "$photos/$photo" \
        --retention-ratio 0.25 --output "$out/${photo%.png}_kept.png"
done
