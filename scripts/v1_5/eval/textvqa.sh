#!/usr/bin/env bash
# TextVQA val: accuracy over ten people's answers, scored here. OCR=0 asks without the OCR tokens in the question file.
source "$(dirname "${BASH_SOURCE[0]}")/_common.sh"
benchmark textvqa textvqa llava_textvqa_val_v051_ocr.jsonl train_images \
    --max-new-tokens 128 ${OCR:+$([[ $OCR == 0 ]] && printf -- --no-ocr)} "$@"
