"""What an image costs: `python -m llava.efficiency [--model llava-next-7b] [--method globalcom2] [--paper-tables]`.

Prints tokens, operations, bytes moved, memory occupied and the least time on known GPUs, of a request with and without
compression, from sizes alone; or reproduces Tables V and VI of the paper.
"""

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

from llava.compress import get
from llava.constants import InputError
from llava.efficiency import report
from llava.efficiency.devices import DEVICES, get_device
from llava.efficiency.shapes import MODELS, load
from llava.output import check_output
from llava.utils import OneLineParser, add_method_arguments, at_least, run_command


def image_size(text: str) -> tuple[int, int]:
    """Read `(width, height)` from a text like 640x480."""
    found = re.fullmatch(r"([1-9]\d{0,5})[x×]([1-9]\d{0,5})", text.strip().lower())
    if not found:
        raise argparse.ArgumentTypeError(f"must be WIDTHxHEIGHT in pixels, got {text!r}")
    return int(found[1]), int(found[2])


def build_parser() -> argparse.ArgumentParser:
    """Return the command's parser."""
    parser = OneLineParser(prog="llava.efficiency", description=(__doc__ or "").split(":")[0])
    models = f"{', '.join(MODELS)}, the folder or config.json of a checkpoint, or its hub id"
    parser.add_argument("--model", default="llava-next-7b", help=models)
    add_method_arguments(parser)
    parser.add_argument("--image-size", type=image_size, default=(672, 672), help="WIDTHxHEIGHT (default: 672x672)")
    parser.add_argument("--text-tokens", type=at_least(0), default=60, help="of the prompt (default: 60)")
    parser.add_argument(
        "--output-tokens", type=at_least(1), default=2, help="produced (default: 2, a word and its end)"
    )
    parser.add_argument("--batch-size", type=at_least(1), default=1, help="such requests run together")
    parser.add_argument(
        "--device", action="append", help=f"a GPU; may be repeated (default: all of {', '.join(DEVICES)})"
    )
    parser.add_argument("--paper-tables", action="store_true", help="reproduce Tables V and VI of the paper instead")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw times and limits against the retention ratio")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def paper_tables(as_json: bool) -> None:
    """Print the reproduction; exit code 1 if a printed figure does not come out."""
    data = report.paper_data()
    print(json.dumps(data) if as_json else report.paper_text())
    if data["reproduced"] != data["printed"]:
        sys.stderr.write(f"{data['printed'] - data['reproduced']} printed figures do not come out of their formulas\n")
        raise SystemExit(1)


def print_analysis(args: argparse.Namespace) -> None:
    """Print the analysis of a request, and draw it if asked to."""
    if args.plot:
        check_output(args.plot)
    from llava.efficiency.analysis import analyse  # loads torch, which the paper's tables do without

    model, devices = load(args.model), [get_device(name) for name in args.device or DEVICES]
    method = get(args.method or "globalcom2", retention_ratio=args.retention_ratio, profile=args.profile)
    sizes: dict[str, Any] = {"text": args.text_tokens, "output": args.output_tokens, "batch": args.batch_size}
    data = analyse(model, method, args.image_size, devices, **sizes)
    if args.plot:
        from llava.efficiency.plot import draw, sweep

        draw(sweep(model, method, args.image_size, devices[0], **sizes), args.plot)
    print(json.dumps(data) if args.json else report.analysis_text(data))


def main() -> None:
    """Run the command."""
    args = build_parser().parse_args()
    if args.paper_tables and args.plot:
        raise InputError(f"--plot {args.plot} draws the analysis of a request; leave --paper-tables out")
    if args.paper_tables:
        paper_tables(args.json)
    else:
        print_analysis(args)


if __name__ == "__main__":
    run_command(main)
