"""The arithmetic of a forward pass: float32, TF32 (GPU only), or autocast to a 16-bit type."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_AUTOCAST = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@contextmanager
def arithmetic(precision: str, device: torch.device) -> Iterator[None]:
    """Run what is inside in `precision`; on a GPU, "float32" really is and uses no TF32."""
    dtype = _AUTOCAST.get(precision)
    before = torch.backends.cudnn.allow_tf32
    if device.type == "cuda":
        torch.backends.cudnn.allow_tf32 = precision == "tf32"
    try:
        with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
            yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def pick_device(name: str) -> torch.device:
    """ "auto" is the GPU where there is one; anything else is torch's own name of a device.

    Of several GPUs each process that torchrun starts takes its own.
    """
    if name != "auto":
        return torch.device(name)
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
