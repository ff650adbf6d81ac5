"""Precision of a network's forward pass: float32, TF32 (GPU only), or autocast to a 16-bit type."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

_AUTOCAST = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@contextmanager
def autocast(precision: str, device: torch.device) -> Iterator[None]:
    """Run a forward pass in `precision`; on a GPU, "float32" disables TF32."""
    dtype = _AUTOCAST.get(precision)
    with tf32_only_for(precision), torch.autocast(device.type, dtype=dtype, enabled=bool(dtype)):
        yield


@contextmanager
def tf32_only_for(precision: str) -> Iterator[None]:
    """Let a GPU use TF32 for float32 tensors only if `precision` is "tf32".

    The context must also enclose the backward pass, which chooses its kernels when it runs.
    (Autocast encloses the forward pass only; the backward pass uses the same types.) "tf32" affects
    convolutions. Matrix products keep the user's setting, which is float32 by default.
    """
    convolutions, products = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    if precision != "tf32":
        torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = convolutions
        torch.set_float32_matmul_precision(products)


def bfloat16_hint(precision: str, device: torch.device) -> str:
    """Return a hint if the CPU lacks instructions for bfloat16, which makes it slow; else ""."""
    if precision != "bfloat16" or device.type != "cpu" or _has_bfloat16():
        return ""
    return (
        "hint: this CPU has neither AVX512-BF16 nor AMX, so training.precision=float32 may be "
        "several times faster than bfloat16; python -m train plan measures both"
    )


def _has_bfloat16() -> bool:
    cpu = torch.cpu
    return bool(cpu._is_avx512_bf16_supported() or cpu._is_amx_tile_supported())
