"""Reads and writes weights; never runs code from a file.

Files hold a plain dict of tensors. They are written aside and renamed, and read with
`weights_only=True`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nets.archs import ArchError

_SHOWN_DIFFERENCES = 5


def save_atomically(content: dict[str, Any], path: Path) -> None:
    """torch.save beside `path`, flush, rename: a reader sees the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with aside.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def read_tensors(path: Path) -> dict[str, Any]:
    """The dict in a file of weights or a checkpoint; ArchError if it is not one."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ArchError(f"there is no weights file {path}") from None
    except Exception as error:  # damaged bytes make torch.load raise anything at all
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ArchError(f"{path} is not a readable weights file: {reason}") from None
    if not isinstance(content, dict):
        raise ArchError(f"{path} holds a {type(content).__name__}, not a dict of tensors")
    return content


def load_weights(network: nn.Module, path: Path) -> None:
    """Fill `network` from a plain state dict; ArchError names the keys that do not fit."""
    found = read_tensors(path)
    expected = network.state_dict()
    differences = [f"missing: {key}" for key in expected if key not in found]
    differences += [f"not expected: {key}" for key in found if key not in expected]
    differences += [
        f"{key} has shape {_shape(found[key])}, expected {tuple(tensor.shape)}"
        for key, tensor in expected.items()
        if key in found and _shape(found[key]) != tuple(tensor.shape)
    ]
    if differences:
        more = len(differences) - _SHOWN_DIFFERENCES
        tail = f"\n  and {more} more" if more > 0 else ""
        shown = "\n  ".join(differences[:_SHOWN_DIFFERENCES])
        raise ArchError(f"the weights in {path} do not fit the network:\n  {shown}{tail}")
    network.load_state_dict(found)


def _shape(value: Any) -> tuple[int, ...] | None:
    return tuple(value.shape) if isinstance(value, torch.Tensor) else None
