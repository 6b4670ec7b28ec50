"""What a request really takes: `python -m llava.efficiency.measure [--model llava-next-7b] [--ratios 1 0.25 0.1]`.

Without compression and at several ratios, in turns and in one run: preprocessing, tower, selection, projector, prefill,
every decoding step, all of it; peak memory; KV cache. A model's name stands for its sizes with random weights, which
take as long as trained ones. S is how much faster a request is than the first, S_limit how much faster it could be
if every stage did its own work at the first one's rate and selecting cost no more than its products, and
Φ = (1 − 1/S) / (1 − 1/S_limit) the share of what can be saved that is saved.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from PIL import Image

from llava.compress import get
from llava.compress.base import Compressor
from llava.compress.trace import GenerationClock, Trace
from llava.constants import IMAGE_TOKEN_INDEX, InputError
from llava.efficiency import naive_profile, transformers_next
from llava.efficiency.__main__ import image_size
from llava.efficiency.bench import (
    Seconds,
    alternate,
    largest,
    machine,
    peak_bytes,
    pool_memory,
    spreads,
    table,
    timed,
)
from llava.efficiency.build import DTYPES, image_processor, random_model
from llava.efficiency.ideal import ideal, phi
from llava.efficiency.methods import plan_request, trace_requests
from llava.efficiency.request import Request
from llava.efficiency.shapes import MODELS, Model, from_config, load
from llava.mm_utils import process_images
from llava.model.builder import load_pretrained_model
from llava.utils import OneLineParser, at_least, ratio_argument, require_cuda, run_command

STAGES = {"vision": "tower", "selection": "selection", "packing": "projector", "prefill": "prefill", "decode": "decode"}
"""What a trace calls a stage, and what it is called here; placing tokens counts to the projector."""
FIRST = ("preprocessing", "tower", "selection", "projector", "prefill")
"""What must be done before the first token."""
HF = "transformers' LlavaNext"
HOST = torch.device("cpu")
PLACEHOLDER = 0
"""An id that no prompt here has."""


class Answered(NamedTuple):
    """What came of asking once."""

    seconds: dict[str, float]
    """Of every part."""
    trace: Trace | None = None
    """What happened; of transformers' model nobody knows."""
    cached: int | None = None
    """Bytes of the KV cache."""


@dataclass(kw_only=True)
class Subject:
    """A model at hand, and what it is asked."""

    model: Any
    processor: Any
    shape: Model
    image: Image.Image
    text: int
    output: int
    options: dict[str, Any]
    """For `generate`."""

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return torch.device(self.model.device)

    @property
    def settings(self) -> dict[str, Any]:
        """For `generate`: as many new tokens as are wanted, whatever they are."""
        return {"do_sample": False, "max_new_tokens": self.output, "min_new_tokens": self.output, **self.options}

    def prompt(self, placeholder: int, tokens: int, batch: int) -> torch.Tensor:
        """Return ids `[B, text + tokens]` of a prompt with an image in it."""
        ids = torch.arange(self.text) % (self.model.config.vocab_size - 4) + 3
        half = self.text // 2
        return torch.cat((ids[:half], torch.full((tokens,), placeholder), ids[half:])).expand(batch, -1)

    def ask(self, method: Compressor, batch: int) -> Answered:
        """Answer once."""
        trace = Trace()
        forget_length(self.model)

        def answer() -> tuple[Any, float]:
            images = [self.image] * batch
            views, before = timed(lambda: process_images(images, self.processor, self.model.config), HOST)
            sizes = [self.image.size] * batch
            more = {"return_dict_in_generate": True, "trace": trace, "method": method, **self.settings}
            given = self.prompt(IMAGE_TOKEN_INDEX, 1, batch)
            return self.model.generate(given, images=views, image_sizes=sizes, **more), before

        (answered, before), whole = timed(answer, self.device)
        seconds = {"preprocessing": before} | {STAGES[name]: taken for name, taken in trace.seconds.items()}
        return Answered(_complete(seconds, whole), trace, _cache_bytes(answered.past_key_values))


@dataclass(kw_only=True)
class Theirs:
    """transformers' LLaVA-NeXT on a subject's weights, and what it is asked."""

    subject: Subject
    tokens: int
    """Of the image."""

    def __post_init__(self) -> None:
        """Build it."""
        subject, config = self.subject, self.subject.model.config
        # Where two canvases tie, theirs takes the one that is first with width and height exchanged.
        pinpoints = [list(pair)[::-1] for pair in config.image_grid_pinpoints]
        self.model = transformers_next.around(subject.model, PLACEHOLDER, pinpoints)
        self.processor = transformers_next.processor(subject.shape.tower.image_size, pinpoints)

    def ask(self, batch: int) -> Answered:
        """Answer once; tower, projector and prefill cannot be told apart."""
        subject, trace = self.subject, Trace()
        device = subject.device
        forget_length(self.model)

        def answer() -> float:
            views, before = timed(lambda: self.processor([subject.image] * batch, return_tensors="pt"), HOST)
            clock = GenerationClock(trace, device)
            ids = subject.prompt(PLACEHOLDER, self.tokens, batch).to(device)
            views["pixel_values"] = views["pixel_values"].to(device).to(subject.model.dtype)
            given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **views}
            with clock:
                self.model.generate(**given, stopping_criteria=clock.criteria, **subject.settings)
            return before

        before, whole = timed(answer, device)
        return Answered(_complete({"preprocessing": before, **trace.seconds}, whole))


def forget_length(model: Any) -> None:
    """Let transformers size a static cache by this request, and not by the longest one the model has answered."""
    model._previous_max_cache_length = -1


def _complete(seconds: dict[str, float], whole: float) -> dict[str, float]:
    """Add what is in no stage, what comes before the first token, and all of it."""
    rest = {"other": whole - sum(seconds.values()), "first token": whole - seconds["decode"], "request": whole}
    return seconds | rest


def _cache_bytes(cache: Any) -> int:
    return sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values))


def measure(subject: Subject, methods: Sequence[Compressor], batch: int | None, repeats: int, hf: bool) -> list[Any]:
    """Return a row for every method, the first being what the others are compared with, and for transformers' model.

    Args:
        subject: the model.
        methods: with their ratios.
        batch: requests answered at once; None: for each method as many as fit into the device's memory.
        repeats: how often each is run.
        hf: whether transformers' own model runs too.

    Raises:
        InputError: not one request fits, or a method cannot meet its ratio.
    """
    names, sizes = [str(method) for method in methods], [batch or _most(subject, method) for method in methods]
    asks: list[Callable[[], Answered]] = [partial(subject.ask, *each) for each in zip(methods, sizes, strict=True)]
    if hf:
        theirs = Theirs(subject=subject, tokens=plan_request(subject.shape, get("none"), subject.image.size).visual)
        names.append(HF)
        sizes.append(batch or _room(theirs.ask, sizes[0]))
        asks.append(partial(theirs.ask, sizes[-1]))
    taken = [spreads(one) for one in alternate([partial(_seconds, ask) for ask in asks], repeats)]
    base = {part: spread.median for part, spread in taken[0].items()}
    weighed = [_weigh(subject, ask, size) for ask, size in zip(asks, sizes, strict=True)]
    before = cast(Request, weighed[0][1])  # ours
    rows: list[dict[str, Any]] = []
    for name, size, parts, (peak, request, cached) in zip(names, sizes, taken, weighed, strict=True):
        limit = None if request is None or request is before else ideal(base, before, request)
        row: dict[str, Any] = {
            "method": name,
            "batch": size,
            "tokens": (request or before).tokens[0],
            "tokens_per_layer": None if request is None else list(request.tokens),
            "seconds": {part: asdict(spread) for part, spread in parts.items()},
            "peak_bytes": peak,
            "kv_bytes": cached,
        }
        share = size / sizes[0]
        for span in ("first token", "request"):
            row[span] = {"speedup": base[span] / parts[span].median * share}
            if limit is not None:
                row[span]["limit"] = base[span] / limit[span] * share
                row[span]["phi"] = phi(row[span]["speedup"], row[span]["limit"])
        rows.append(row)
    return rows


def _seconds(ask: Callable[[], Answered]) -> Seconds:
    return ask().seconds


def _weigh(subject: Subject, ask: Callable[[], Answered], batch: int) -> tuple[int, Request | None, int | None]:
    """Answer once more: the most bytes held meanwhile, what was run, and the bytes of the KV cache."""
    last: list[Answered] = []
    peak = peak_bytes(lambda: last.append(ask()), subject.device)
    (answered,) = last
    # The trace holds tensors, the request numbers alone.
    request = None if answered.trace is None else _request(subject, answered.trace, batch)
    return peak, request, answered.cached


def _request(subject: Subject, trace: Trace, batch: int) -> Request:
    """What a row of the batch ran on; all rows are alike."""
    return replace(trace_requests(subject.shape, trace, subject.output)[0], batch=batch)


def _most(subject: Subject, method: Compressor) -> int:
    """How many requests fit into the device's memory."""
    if subject.device.type != "cuda":
        raise InputError("--batch-size max needs a CUDA device, whose memory is the limit; give a number")
    return _room(lambda batch: subject.ask(method, batch), 1024, str(method))


def _room(ask: Callable[[int], Any], most: int, name: str = HF) -> int:
    """A tenth less than what fits, as in turns with others there is a little less room.

    Raises:
        InputError: not one request fits.
    """
    found = largest(ask, most)
    if not found:
        raise InputError(f"not one request with {name} fits into the device's memory; take a smaller --model")
    return found - found // 10


def text(rows: Sequence[dict[str, Any]], output: int) -> str:
    """Lay the rows out, times in ms."""
    head = ("", "batch", "tokens", *FIRST, "per step", "request [quartiles]", "S", "S_limit", "Φ", "peak MiB", "KV MiB")
    lines = [head]
    for row in rows:
        seconds = row["seconds"]
        parts = [f"{1e3 * seconds[part]['median']:.1f}" if part in seconds else "–" for part in FIRST]
        step = f"{1e3 * seconds['decode']['median'] / (output - 1):.1f}" if output > 1 else "–"
        whole = seconds["request"]
        said = f"{1e3 * whole['median']:.0f} [{1e3 * whole['low']:.0f}, {1e3 * whole['high']:.0f}]"
        gain = row["request"]
        speed = [f"{gain[key]:.2f}" if gain.get(key) is not None else "–" for key in ("speedup", "limit", "phi")]
        kv = "–" if row["kv_bytes"] is None else f"{row['kv_bytes'] / 2**20:.0f}"
        name = row["method"].replace("retention_ratio=", "")
        lines.append(
            (
                name,
                str(row["batch"]),
                str(row["tokens"]),
                *parts,
                step,
                said,
                *speed,
                f"{row['peak_bytes'] / 2**20:.0f}",
                kv,
            )
        )
    return table(lines)


def subject_of(args: argparse.Namespace) -> Subject:
    """Load or build the model the command names.

    Raises:
        InputError: there is none.
    """
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type not in ("cuda", "cpu"):
        raise InputError(f"--device {args.device}: what runs elsewhere cannot be timed; give cuda or cpu")
    require_cuda(args.device)
    if device.type == "cuda":  # one of them, whose memory is measured
        device = torch.device("cuda", device.index or 0)
    dtype = DTYPES[args.dtype]
    if args.model in MODELS:
        shape = load(args.model)
        layers = args.layers or shape.language.layers
        element = dtype.itemsize
        shape = replace(
            shape,
            language=replace(shape.language, layers=layers, element_bytes=element),
            tower=replace(shape.tower, element_bytes=element),
        )
        torch.manual_seed(0)
        model, processor = random_model(shape, dtype=dtype, device=device), image_processor(shape)
    elif args.layers:
        raise InputError(f"--layers {args.layers} is for the sizes of a known model; {args.model!r} has its own")
    else:
        _, model, processor, _ = load_pretrained_model(args.model, device=str(device), dtype=args.dtype)
        shape = from_config(model.config.to_dict() | {"dtype": args.dtype, "torch_dtype": args.dtype}, args.model)
    if args.compile:
        model.get_vision_tower().compile_layers()
    options = {"cache_implementation": "static"} if args.static_cache else {}
    noise = np.random.default_rng(0).integers(0, 256, (*args.image_size[::-1], 3), dtype=np.uint8)
    return Subject(
        model=model,
        processor=processor,
        shape=shape,
        image=Image.fromarray(noise),
        text=args.text_tokens,
        output=args.output_tokens,
        options=options,
    )


def _batch(word: str) -> int | None:
    return None if word == "max" else at_least(1)(word)


def build_parser() -> argparse.ArgumentParser:
    """Return the command's parser."""
    parser = OneLineParser(prog="llava.efficiency.measure", description=(__doc__ or "").split(":")[0])
    parser.add_argument("--model", default="llava-next-7b", help=f"{', '.join(MODELS)}, or a checkpoint's folder")
    parser.add_argument("--layers", type=at_least(1), help="of the language model, if not the named model's own number")
    parser.add_argument("--method", default="globalcom2", help="a name or a call (default: globalcom2)")
    parser.add_argument("--ratios", nargs="+", type=ratio_argument, default=[0.75, 0.5, 0.25, 0.1])
    parser.add_argument("--image-size", type=image_size, default=(672, 672), help="WIDTHxHEIGHT (default: 672x672)")
    parser.add_argument("--text-tokens", type=at_least(1), default=60, help="of the prompt (default: 60)")
    parser.add_argument("--output-tokens", type=at_least(1), default=2, help="default: 2, a word and its end")
    parser.add_argument("--batch-size", type=_batch, default=1, help="requests answered at once, or max (CUDA)")
    parser.add_argument("--repeats", type=at_least(1), default=5)
    parser.add_argument("--device", help="cuda, cpu (default: cuda if there is one)")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--pool", action="store_true", help="CPU: let the allocator keep what is freed, as CUDA's does")
    parser.add_argument("--against", choices=["hf"], help="run transformers' own LlavaNext on the same weights too")
    parser.add_argument("--profile-naive", action="store_true", help="measure the naive arrangement's stages instead")
    parser.add_argument("--stages", nargs="+", choices=naive_profile.STAGES, default=naive_profile.STAGES, help="of it")
    parser.add_argument("--static-cache", action="store_true", help="decode with a KV cache of fixed size")
    parser.add_argument(
        "--compile", action="store_true", help="compile the tower's layers (not those where a method merges)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


@torch.no_grad()
def main() -> None:
    """Run the command."""
    args = build_parser().parse_args()
    methods = [get("none"), *(get(args.method, retention_ratio=share) for share in args.ratios if share < 1)]
    if args.pool and not pool_memory():
        raise InputError("--pool: this C library cannot keep what is freed; leave the option out")
    subject = subject_of(args)
    said = f"{args.model}, {subject.shape.language.layers} layers, {args.dtype}; {machine(subject.device)}"
    if args.profile_naive:
        rows = naive_profile.measure(
            subject.model, subject.processor, subject.image, args.ratios, args.repeats, args.stages
        )
        laid = naive_profile.text(rows)
    else:
        rows = measure(subject, methods, args.batch_size, args.repeats, args.against == "hf")
        laid = text(rows, args.output_tokens)
    print(json.dumps({"machine": said, "rows": rows}) if args.json else f"{said}\n\n{laid}")


if __name__ == "__main__":
    run_command(main)
