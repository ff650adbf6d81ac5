"""The device of this process, and the arithmetic of networks on it.

That is float32, TF32 (GPU only), or autocast to a 16-bit type.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from runtime.errors import DeviceError
from runtime.limits import Share, usable_cores

_AUTOCAST = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@contextmanager
def arithmetic(precision: str, device: torch.device) -> Iterator[None]:
    """Run a forward pass in `precision`; on a GPU, "float32" really is and uses no TF32."""
    dtype = _AUTOCAST.get(precision)
    with tf32_only_for(precision), torch.autocast(device.type, dtype=dtype, enabled=bool(dtype)):
        yield


@contextmanager
def tf32_only_for(precision: str) -> Iterator[None]:
    """While open, a GPU uses TF32 for float32 numbers only if `precision` is "tf32".

    It must enclose the backward pass too, which chooses its arithmetic when it runs; autocast must
    not, as the backward pass repeats the types of the forward pass. "tf32" is about convolutions:
    matrix products stay as the user set them, by default in float32.
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


def pick_device(name: str) -> torch.device:
    """The device that `name` asks for, made the current one. Raises DeviceError.

    "auto" is the GPU where there is one; anything else is torch's own name of a device. Where that
    leaves open which GPU, processes of one machine take turns with those that each of them sees.
    From here on this process computes with no more threads than it has cores to itself.
    """
    device = check_device(name)
    if device.type == "cuda":
        if device.index is None:
            turn = Share.of_this_process().index % torch.cuda.device_count()
            device = torch.device("cuda", turn)
        torch.cuda.set_device(device)
    if usable_cores() < torch.get_num_threads():
        torch.set_num_threads(usable_cores())
    return device


def check_device(name: str) -> torch.device:
    """The device by its name, perhaps without a number. Raises DeviceError where there is none."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise DeviceError(f"device {name!r} is unknown: {reason}\n  fix: DEVICE=auto") from None
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if count <= (device.index or 0):
            there = f"cuda:0 to cuda:{count - 1}" if count else "no GPU"
            fix = "DEVICE=auto" if count else "DEVICE=cpu"
            raise DeviceError(f"device {name!r} is not available: torch sees {there}\n  fix: {fix}")
    return device
