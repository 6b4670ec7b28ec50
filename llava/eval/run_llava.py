"""Ask a LLaVA about pictures: `python -m llava.eval.run_llava --model-path DIR --image-file IMG --query "…"`.

The answer goes to stdout, the account of the visual tokens to stderr; with `--json` both are one object on stdout.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import groupby
from os import PathLike
from pathlib import Path
from statistics import fmean
from typing import Any

from llava.compress import base, get
from llava.compress.base import Compressor
from llava.compress.trace import Trace
from llava.constants import (
    DEFAULT_IM_END_TOKEN,
    DEFAULT_IM_START_TOKEN,
    DEFAULT_IMAGE_TOKEN,
    IMAGE_PLACEHOLDER,
    InputError,
)
from llava.conversation import check_template, conv_templates, template_name
from llava.eval.start import start_line
from llava.images import Source, load_image, load_images
from llava.mm_utils import process_images, tokenizer_image_token
from llava.utils import (
    OneLineParser,
    add_generation_arguments,
    add_method_arguments,
    add_model_arguments,
    load_options,
    ratio_text,
    run_command,
)


def build_prompt(query: str, images: int, config: Any, conv_mode: str | None = None) -> str:
    """Put a question into the checkpoint's template.

    Args:
        query: the question; where it names no `<image>` itself, one for each image is put before it.
        images: number of images.
        config: the model's.
        conv_mode: key of `conv_templates`; None: the one the checkpoint was trained with.

    Raises:
        InputError: there is no such template.
    """
    token = DEFAULT_IMAGE_TOKEN
    if getattr(config, "mm_use_im_start_end", False):
        token = DEFAULT_IM_START_TOKEN + token + DEFAULT_IM_END_TOKEN
    text = query.replace(IMAGE_PLACEHOLDER, token)
    if DEFAULT_IMAGE_TOKEN not in text:
        text = f"{token}\n" * images + text
    check_template(conv_mode)
    conversation = conv_templates[conv_mode or template_name(config)].copy()
    conversation.append_message(conversation.roles[0], text)
    conversation.append_message(conversation.roles[1], None)
    return conversation.get_prompt()


def ask(
    tokenizer: Any,
    model: Any,
    processor: Any,
    query: str,
    images: Source | Iterable[Source],
    *,
    conv_mode: str | None = None,
    method: Compressor | str | None = None,
    retention_ratio: float | None = None,
    trace: Trace | None = None,
    **generation: Any,
) -> str:
    """Answer one question about pictures.

    Args:
        tokenizer: as `load_pretrained_model` returns it, like `model` and `processor`.
        model: the model.
        processor: the image processor.
        query: the question.
        images: pictures of any mode and size, or paths, addresses and whatever else `load_image` takes, one or several;
            may be empty. Those whose EXIF orientation says so are turned upright first.
        conv_mode: see `build_prompt`.
        method: compression method for this question, or its name or call; None: the model's, which stays as it is.
        retention_ratio: of the method, for this question.
        trace: filled with what happened to the visual tokens, if given.
        **generation: for `generate`, such as `max_new_tokens`.

    Raises:
        InputError: there is no such method, ratio or picture; or see `generate`.
    """
    if method is not None or retention_ratio is not None:
        generation["method"] = _chosen(model.method if method is None else method, retention_ratio)
    pictures = load_images(images, exif=True)
    prompt = build_prompt(query, len(pictures), model.config, conv_mode)
    ids = tokenizer_image_token(prompt, tokenizer, return_tensors="pt")
    views = process_images(pictures, processor, model.config) if pictures else None
    sizes = [picture.size for picture in pictures]
    output = model.generate(ids[None], images=views, image_sizes=sizes, trace=trace, **generation)
    return str(tokenizer.decode(output[0], skip_special_tokens=True)).strip()


def _chosen(method: Compressor | str, ratio: float | None) -> Compressor:
    """Return a method with a ratio, if one is given."""
    if isinstance(method, str):
        return get(method, retention_ratio=ratio)
    return method if ratio is None else replace(method, retention_ratio=ratio)


def image_sources(given: Any, sep: str | None = None) -> list[Any]:
    """Return the pictures that an `--image-file` names, or several of them, or an attribute of that name.

    Args:
        given: a text or a list. A text alone is split at `sep`, unless it names a file or is a `data:` address, and
            other addresses only before the next one; texts of a list are taken as they are, like all that is no text.
        sep: a comma, if not given.
    """
    if isinstance(given, list | tuple) and len(given) != 1:
        return list(given)
    (one,) = given if isinstance(given, list | tuple) else (given,)
    if not isinstance(one, str) or one.startswith("data:") or _is_file(one):
        return [one]
    between = re.escape(sep or ",") + (r"\s*(?=https?://)" if "://" in one.split(sep or ",")[0] else "")
    return [name.strip() for name in re.split(between, one)]


def _is_file(name: str) -> bool:
    try:
        return Path(name).is_file()
    except OSError:  # a list of names may be too long for one
        return False


def eval_model(args: Any) -> None:
    """Run the command on parsed arguments, or on any object with the attributes of LLaVA's quick start.

    Raises:
        InputError: whatever is asked for cannot be had; `main` prints it as one line.
    """
    defaults = vars(build_parser().parse_args(["--model-path", "", "--image-file", "", "--query", ""]))
    args = argparse.Namespace(**{key: getattr(args, key, default) for key, default in defaults.items()})
    from llava.model.builder import choose_method, load_pretrained_model, read_config

    sources = image_sources(args.image_file, args.sep)
    images = [load_image(source, exif=True) for source in sources]
    method = choose_method(read_config(args.model_path), args.method, args.retention_ratio, args.profile)
    base.resolve_ratio(method.retention_ratio)  # a bad value in the environment is refused before the model loads
    tokenizer, model, processor, _ = load_pretrained_model(args.model_path, args.model_base, **load_options(args))
    if processor is None:
        raise InputError(f"{args.model_path!r} is a language model without vision; give a LLaVA checkpoint")
    model.method = method
    trace = Trace()
    sampling = args.temperature > 0
    answer = ask(
        tokenizer,
        model,
        processor,
        args.query,
        images,
        conv_mode=args.conv_mode,
        trace=trace,
        do_sample=sampling,
        temperature=args.temperature if sampling else None,
        top_p=args.top_p,
        num_beams=args.num_beams,
        max_new_tokens=args.max_new_tokens,
    )
    ledger = trace.ledger()
    if args.json:
        ratio = ledger["images"][0]["requested_ratio"]
        print(json.dumps({"answer": answer, "query": args.query, "retention_ratio": ratio, **ledger}))
    else:
        sys.stderr.write(start_line(args, model) + describe(ledger, [_label(source) for source in sources]))
        print(answer)


def _label(source: Any) -> str:
    """Name a picture in the account: the last part of its path or address, else what it is."""
    if isinstance(source, str | PathLike) and not str(source).startswith("data:"):
        return Path(source).name
    return type(source).__name__ if not isinstance(source, str) else "data"


def describe(ledger: dict[str, Any], names: Sequence[str]) -> str:
    """Write a ledger for people."""
    lines = [f"method {ledger['method']}"]
    for name, image in zip(names, ledger["images"], strict=True):
        before, after = image["patches_before"], image["patches_after"]
        width, height = image["size"]
        grid = f"a {image['grid'][0]}x{image['grid'][1]} grid" if image["grid"] else "a single view"
        lines.append(f"image {name}: {width}x{height}, {grid}")
        asked, planned = ratio_text(image["requested_ratio"]), image["planned"]
        planned = " to ".join(map(str, planned)) if isinstance(planned, list) else planned
        lines.append(f"  {asked}: of {sum(before)} patches {planned} planned to enter the language model")
        views = ["thumbnail", *(f"crop {j + 1}" for j in range(len(before) - 1))]
        kept = ", ".join(f"{view} {k} of {n}" for view, k, n in zip(views, after, before, strict=True))
        appended = f" and {image['appended']} appended" if image["appended"] else ""
        lines.append(f"  kept {image['kept']}{appended} ({image['kept_ratio']:.1%}): {kept}")
        if image["grid"]:
            lines.append(f"  crop ratios {', '.join('-' if r is None else f'{r:.3f}' for r in image['crop_ratios'])}")
        lines.append(f"  {image['tokens']} tokens with {image['newlines']} newlines")
    lines.append(f"sequence of {', '.join(map(str, ledger['sequence_lengths']))} tokens")
    for layers in ledger["visual_per_layer"]:
        if len(set(layers)) > 1:
            runs = ", ".join(f"{len(list(some))} of {number}" for number, some in groupby(layers))
            lines.append(f"visual tokens by layer, newlines included: {runs}; on average {fmean(layers):.1f}")
    lines.append("seconds: " + ", ".join(f"{stage} {seconds:.3f}" for stage, seconds in ledger["seconds"].items()))
    return "\n".join(lines) + "\n"


def build_parser() -> argparse.ArgumentParser:
    """Return the command's parser."""
    parser = OneLineParser(prog="llava.eval.run_llava", description="Ask a LLaVA about pictures.")
    add_model_arguments(parser)
    parser.add_argument("--model-name", help="accepted for compatibility")
    parser.add_argument(
        "--image-file", required=True, action="append", help="file or http(s) address; several: repeat it, or use --sep"
    )
    parser.add_argument("--sep", default=",", help="what separates files in a single --image-file (default: a comma)")
    parser.add_argument("--query", required=True)
    parser.add_argument("--conv-mode", help="conversation template (default: the checkpoint's)")
    add_generation_arguments(parser, 512)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_method_arguments(parser)
    return parser


def main() -> None:
    """Run the command."""
    eval_model(build_parser().parse_args())


if __name__ == "__main__":
    run_command(main)
