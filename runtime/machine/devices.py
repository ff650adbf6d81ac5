"""The device that this process computes on. Imports torch only inside its functions."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from teach_once.runtime.errors import DeviceError
from teach_once.runtime.machine.resources import Share, usable_cores

if TYPE_CHECKING:
    import torch


def pick_device(name: str) -> torch.device:
    """Return the requested device and make it current. Raises DeviceError if it is missing.

    "auto" is a GPU if there is one; other names are torch's. If the name does not select a GPU, the
    processes of a machine are distributed over its visible GPUs. Afterwards this process uses at
    most as many threads as its share of the cores.
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


def check_device_name(name: str) -> None:
    """Raise DeviceError if `name` is not a valid device name. Does not load torch."""
    if not re.fullmatch(r"auto|cpu|mps|(cuda|xpu)(:\d+)?", name):
        raise DeviceError(
            f"device {name!r} is unknown: expected auto, cpu, cuda, cuda:1, xpu or mps",
            fix=_option("auto"),
        )


def check_device(name: str) -> torch.device:
    """Return a device by name, with or without an index. Raises DeviceError if it is missing."""
    import torch

    check_device_name(name)
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if count <= (device.index or 0):
            there = f"cuda:0 to cuda:{count - 1}" if count else "no GPU"
            fix = _option("auto" if count else "cpu")
            raise DeviceError(f"device {name!r} is not available: torch finds {there}", fix=fix)
    return device


def _option(name: str) -> str:
    return f"--device {name}; with make: DEVICE={name}"
