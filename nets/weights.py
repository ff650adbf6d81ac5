"""Reads and writes weights, and never runs code from a file.

A file holds a plain dict of tensors; it is written aside and renamed, and read with
`weights_only=True`.
"""

from __future__ import annotations

import argparse
import pathlib
import warnings
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
from torch import nn

from nets.archs import ArchError
from nets.unsafe_files import unreadable
from runtime.files import written_aside

_SHOWN_DIFFERENCES = 5
_WRAPPERS = ("state_dict", "model_state_dict", "model", "net")
# Classes in the checkpoints of timm's and torchvision's scripts, allowed because they only hold the
# values they are given. numpy's are not: its arrays trust what a file says of their memory.
_HARMLESS: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    argparse.Namespace,
    pathlib.PosixPath,
    (pathlib.PosixPath, "pathlib._local.PosixPath"),  # as Python 3.13 calls it
]
_PREFIXES = ("module.", "_orig_mod.", "student.", "model.", "net.")


def save_atomically(content: dict[str, Any], path: Path) -> None:
    """torch.save beside `path`, flush and rename: a reader sees the old file or the new one.

    The same content gives the same bytes, and so the same identity of what is made with it. Given a
    path, torch.save would write the temporary file's name into them: it is given an open file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_aside(path) as aside, aside.open("wb") as file:
        torch.save(content, file)


def read_tensors(path: Path) -> dict[str, Any]:
    """The dict in a file of weights or a checkpoint.

    Raises ArchError, which says what else the file is.
    """
    try:
        with torch.serialization.safe_globals(_HARMLESS), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a TorchScript program, before it raises
            content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ArchError(f"there is no weights file {path}") from None
    except Exception as error:  # damaged bytes make torch.load raise anything at all
        raise unreadable(path, error, _WRAPPERS) from None
    if not isinstance(content, dict):
        raise ArchError(f"{path} holds a {type(content).__name__}, not a dict of tensors")
    return content


def load_weights(network: nn.Module, path: Path) -> None:
    """Fill `network` from the state dict in a file.

    The state dict may be under a key of its own (`state_dict`, `model`, `model_state_dict`, `net`),
    and all its keys may share a prefix that wrappers leave (`module.`, `student.`, ...). Raises
    ArchError, which names the keys that do not fit.
    """
    expected = network.state_dict()
    loaded = _without_prefix(_unwrapped(read_tensors(path)), expected.keys())
    differences = [f"missing: {key}" for key in expected if key not in loaded]
    differences += [f"unexpected: {key}" for key in loaded if key not in expected]
    differences += [
        f"{key} has shape {_shape(loaded[key])}, expected {tuple(tensor.shape)}"
        for key, tensor in expected.items()
        if key in loaded and _shape(loaded[key]) != tuple(tensor.shape)
    ]
    if differences:
        more = len(differences) - _SHOWN_DIFFERENCES
        tail = f"\n  and {more} more" if more > 0 else ""
        shown = "\n  ".join(differences[:_SHOWN_DIFFERENCES])
        raise ArchError(f"the weights in {path} do not fit the network:\n  {shown}{tail}")
    network.load_state_dict(loaded)


def torchvision_file(name: str) -> Path:
    """The file where torch.hub puts weights such as `ResNet34_Weights.IMAGENET1K_V1`.

    It need not exist. Raises ArchError for an unknown name.
    """
    return Path(torch.hub.get_dir()) / "checkpoints" / Path(urlparse(_url(name)).path).name


def download_torchvision(name: str, file: Path) -> None:
    """Download these weights to `file`, their `torchvision_file`, and check the hash in its name.

    Raises ArchError if that fails.
    """
    url = _url(name)
    try:
        torch.hub.load_state_dict_from_url(url, check_hash=True, weights_only=True)
    except (OSError, RuntimeError) as error:
        raise ArchError(
            f"teacher.weights: {name} cannot be downloaded: {error}",
            fix=f"put the file of {url} at {file}",
        ) from None


def _url(name: str) -> str:
    from torchvision_shim import import_torchvision

    import_torchvision()
    from torchvision import models

    try:
        return str(models.get_weight(name).url)
    except (ValueError, KeyError, AttributeError):
        raise ArchError(f"teacher.weights: torchvision has no weights {name!r}") from None


def _unwrapped(content: dict[str, Any]) -> dict[str, Any]:
    for key in _WRAPPERS:
        if isinstance(content.get(key), dict):
            return _unwrapped(content[key])
    return content


def _without_prefix(tensors: dict[str, Any], expected: Collection[str]) -> dict[str, Any]:
    """The tensors, with or without the prefixes that all keys share: what fits `expected` best."""
    candidates = [tensors]
    while prefix := _shared_prefix(candidates[-1]):
        candidates.append({k.removeprefix(prefix): v for k, v in candidates[-1].items()})
    return max(candidates, key=lambda some: sum(key in expected for key in some))


def _shared_prefix(tensors: dict[str, Any]) -> str:
    """The known prefix with which all keys begin, or ""."""
    shared = (p for p in _PREFIXES if tensors and all(key.startswith(p) for key in tensors))
    return next(shared, "")


def _shape(value: Any) -> tuple[int, ...] | None:
    return tuple(value.shape) if isinstance(value, torch.Tensor) else None
