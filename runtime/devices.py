"""The device that this process computes on. Imports torch only inside its functions."""

from __future__ import annotations

from typing import TYPE_CHECKING

from runtime.errors import DeviceError
from runtime.limits import Share, usable_cores

if TYPE_CHECKING:
    import torch


def pick_device(name: str) -> torch.device:
    """The device that `name` asks for, made the current one. Raises DeviceError.

    "auto" is a GPU if there is one; anything else is torch's own name of a device. If that leaves
    the GPU open, the processes of one machine are spread over those they see. From here on this
    process computes with no more threads than it has cores to itself.
    """
    import torch

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
    """The device by its name, perhaps without an index. Raises DeviceError if it is missing."""
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise DeviceError(f"device {name!r} is unknown: {reason}", fix="DEVICE=auto") from None
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if count <= (device.index or 0):
            there = f"cuda:0 to cuda:{count - 1}" if count else "no GPU"
            fix = "DEVICE=auto" if count else "DEVICE=cpu"
            raise DeviceError(f"device {name!r} is not available: torch sees {there}", fix=fix)
    return device
