"""The environment variables that are heeded, and the one place that reads them."""

import os

RATIO = "LLAVA_RETENTION_RATIO"
"""The retention ratio, where no argument gives one."""
LOCAL_URLS = "LLAVA_ALLOW_LOCAL_URLS"
"""`1`: pictures may be fetched from this machine and its network too."""
GPUS = "CUDA_VISIBLE_DEVICES"
"""CUDA's own: which GPUs there are for the program."""


def read(name: str) -> str | None:
    """Return what a variable is set to now; None where it is missing or empty."""
    return os.environ.get(name) or None
