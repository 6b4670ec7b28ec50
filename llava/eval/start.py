"""What runs, in one line: where, how, which method at which ratio, and where that ratio came from."""

from dataclasses import replace
from typing import Any

import torch

from llava import env
from llava.compress import get
from llava.compress.base import Compressor
from llava.model.builder import read_config


def start_line(args: Any, model: Any, processes: int = 1) -> str:
    """Say what runs, with a line end; a GPU that was asked for and is not there is said too.

    Args:
        args: options of the command: `model_path`, `method`, `retention_ratio`.
        model: as loaded, with its `method`.
        processes: of the run.
    """
    method = model.method
    source = ratio_source(args, method)
    method = replace(method, retention_ratio=method.ratio if method.follows_ratio else None)
    devices = ", ".join(dict.fromkeys(_device(parameter.device) for parameter in model.parameters()))
    dtype = str(model.dtype).removeprefix("torch.")
    attention = model.config._attn_implementation
    several = f" by {processes} processes" if processes > 1 else ""
    missing = _missing_gpu()
    return f"running on {devices}{several} in {dtype} with {attention} attention: {method}, {source}{missing}\n"


def ratio_source(args: Any, method: Compressor) -> str:
    """Say where the retention ratio in force came from, in the order in which `choose_method` looks."""
    if not method.follows_ratio:
        return "which no retention ratio applies to"
    config = read_config(args.model_path)
    spec = args.method or config.get("method")
    if spec is not None and get(spec).retention_ratio is not None:
        source = "--method" if args.method else "the checkpoint's config.json"
    elif args.retention_ratio is not None:
        source = "--retention-ratio"
    elif config.get("retention_ratio") is not None:
        source = "the checkpoint's config.json"
    elif env.read(env.RATIO):
        source = env.RATIO
    else:
        source = "line 101 of llava/model/llava_arch.py"
    return f"ratio from {source}"


def _device(device: torch.device) -> str:
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)


def _missing_gpu() -> str:
    asked = env.read(env.GPUS)
    if asked in (None, "-1") or torch.cuda.is_available():
        return ""
    return f"; {env.GPUS}={asked} asks for a GPU, and torch finds none"
