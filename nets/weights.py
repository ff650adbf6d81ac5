"""Reads and writes weights, and never runs code from a file.

A file holds a plain dict of tensors; it is written aside and renamed, and read with
`weights_only=True` after `nets.weights_container` has looked at it. Only tensors that hold plain
numbers get into a network: none that is sparse, quantised, complex or without data.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import pathlib
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import IO, Any, BinaryIO, cast
from urllib.parse import urlparse

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from nets.archs import ArchError
from nets.unsafe_files import torchscript_program, unreadable
from nets.weights_container import check_container
from runtime.files import written_aside
from runtime.reading import open_regular
from runtime.text import one_line

_SHOWN_DIFFERENCES = 5
_WRAPPERS = ("state_dict", "model_state_dict", "model", "net")
_MOST_WRAPPERS = 4  # around one another
# Classes in the checkpoints of timm's and torchvision's scripts, allowed because they only hold the
# values they are given. numpy's are not: its arrays trust what a file says of their memory.
_HARMLESS: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    argparse.Namespace,
    pathlib.PosixPath,
    (pathlib.PosixPath, "pathlib._local.PosixPath"),  # as Python 3.13 calls it
]
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8)
_PREFIXES = ("module.", "_orig_mod.", "student.", "model.", "net.")


def save_atomically(content: dict[str, Any], path: Path) -> None:
    """torch.save beside `path`, flush and rename: a reader sees the old file or the new one.

    The same content gives the same bytes, and so the same identity of what is made with it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_aside(path) as aside, aside.open("wb") as file:
        write_tensors(content, file)


def write_tensors(content: dict[str, Any], file: BinaryIO) -> str:
    """torch.save to an opened file; returns the sha256 of what was written.

    Given a path, torch.save would write the temporary file's name into it. Raises OSError where the
    disk refuses, which torch would turn into another error.
    """
    sink = _Sink(file)
    try:
        torch.save(content, cast(IO[bytes], sink))
    except RuntimeError:
        if sink.refused is not None:
            raise sink.refused from None
        raise
    return sink.sha256


class _Sink(io.RawIOBase):
    """Writes to a file and remembers the sha256 of all of it, and what the disk refused."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._digest = file, hashlib.sha256()
        self.refused: OSError | None = None

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._digest.update(data)
        try:
            self._file.write(data)
        except OSError as error:
            self.refused = error
            raise
        return len(data)


def read_tensors(path: Path, *, follow: bool = True) -> dict[str, Any]:
    """The dict in a file of weights or a checkpoint, whose checksums have been compared.

    A file is one of safetensors by its name.

    Tensors may lie in the file itself (a private map of it) until they are copied. follow: also
    through a link. Raises ArchError, which says what else the file is; BadFile where it is no
    regular file.
    """
    try:
        file = open_regular(path, follow=follow)
    except FileNotFoundError:
        raise ArchError(f"there is no weights file {one_line(path)}") from None
    with file:
        if path.suffix == ".safetensors":
            return _read_safetensors(file, path)
        if (container := check_container(file, path)) == "script":
            raise torchscript_program(path)
        content = _loaded(file, path, is_zip=container == "zip")
    if not isinstance(content, dict):
        raise ArchError(f"{one_line(path)} holds a {type(content).__name__}, not a dict of tensors")
    return content


def _loaded(file: BinaryIO, path: Path, *, is_zip: bool) -> Any:
    """What torch reads from the opened file.

    A mapped file cannot be read beyond its end: unmapped, torch believes the lengths that the
    pickle claims, and reads other memory.
    """
    try:
        with torch.serialization.safe_globals(_HARMLESS):
            opened = f"/proc/self/fd/{file.fileno()}" if is_zip else file
            return torch.load(opened, map_location="cpu", weights_only=True, mmap=is_zip)
    except Exception as error:  # damaged bytes make torch.load raise anything at all
        raise unreadable(file, path, error, _WRAPPERS) from None


def _read_safetensors(file: BinaryIO, path: Path) -> dict[str, Any]:
    """The tensors of an opened file, which the format's own reader maps and checks."""
    try:
        return dict(load_file(f"/proc/self/fd/{file.fileno()}"))
    except (SafetensorError, OSError) as error:
        raise ArchError(
            f"{one_line(path)} is not a readable .safetensors file: {one_line(error)}"
        ) from None


def load_weights(
    network: nn.Module,
    path: Path,
    *,
    convert: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
    without: Collection[str] = (),
) -> None:
    """Fill `network` from the state dict in a file.

    The state dict may be under a key of its own (`state_dict`, `model`, `model_state_dict`, `net`),
    and all its keys may share a prefix that wrappers leave (`module.`, `student.`, ...). Numbers
    may be of another precision. convert: applied to tensors that do not fit as they are. without:
    modules that the file may lack or have in another shape, which stay as they are. Raises
    ArchError, which names the keys that do not fit.
    """
    expected = _without_modules(network.state_dict(), without)
    loaded = _without_prefix(_unwrapped(read_tensors(path), path), expected.keys())
    differing = _differences(_without_modules(loaded, without), expected)
    if differing and convert is not None:
        loaded = convert(loaded)
        differing = _differences(_without_modules(loaded, without), expected)
    if differing:
        more = len(differing) - _SHOWN_DIFFERENCES
        tail = f"\n  and {more} more" if more > 0 else ""
        shown = "\n  ".join(differing[:_SHOWN_DIFFERENCES])
        raise ArchError(f"the weights in {one_line(path)} do not fit the network:\n  {shown}{tail}")
    network.load_state_dict(network.state_dict() | _without_modules(loaded, without))


def _differences(loaded: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    """One line for each tensor that a file lacks, has beside, or has in another form."""
    return [
        *(f"missing: {key}" for key in expected if key not in loaded),
        *(f"unexpected: {one_line(key)}" for key in loaded if key not in expected),
        *(
            f"{key} {mismatch}"
            for key, own in expected.items()
            if key in loaded and (mismatch := mismatch_with(own, loaded[key]))
        ),
    ]


def _without_modules(tensors: Mapping[str, Any], modules: Collection[str]) -> dict[str, Any]:
    prefixes = tuple(f"{module}." for module in modules)
    return {key: value for key, value in tensors.items() if not key.startswith(prefixes)}


def mismatch_with(own: Any, found: Any, *, exactly: bool = False) -> str:
    """Why `found` cannot take the place of `own`, in words; "" where it can.

    exactly: it must have the same type of number, else one that holds the same kind of number.
    """
    if not isinstance(own, Tensor):
        same = type(found) is type(own)
        return "" if same else f"is a {type(found).__name__}, expected a {type(own).__name__}"
    if type(found) not in (Tensor, nn.Parameter):
        return f"is a {type(found).__name__}, expected a tensor"
    if kind := _unusable(found):
        return f"is a {kind} tensor, expected a plain one"
    if found.shape != own.shape:
        return f"has shape {tuple(found.shape)}, expected {tuple(own.shape)}"
    if found.dtype != own.dtype and (exactly or not _same_kind(own.dtype, found.dtype)):
        return f"holds {_name(found.dtype)}, expected {_name(own.dtype)}"
    return ""


def _unusable(tensor: Tensor) -> str:
    """What kind of tensor it is, if its values are not simply in memory."""
    if tensor.layout != torch.strided:
        return "sparse"
    if tensor.is_quantized:
        return "quantised"
    return f"{tensor.device.type}" if tensor.device.type != "cpu" else ""


def _same_kind(own: torch.dtype, found: torch.dtype) -> bool:
    return any(own in kind and found in kind for kind in (_FLOATS, _INTEGERS))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


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


def _unwrapped(content: dict[str, Any], path: Path) -> dict[str, Any]:
    """The state dict, out of the dicts around it. Raises ArchError where its keys are no names."""
    for _ in range(_MOST_WRAPPERS):
        inner = (content[key] for key in _WRAPPERS if isinstance(content.get(key), dict))
        if (found := next(inner, None)) is None:
            break
        content = found
    else:
        raise ArchError(
            f"{one_line(path)} holds dicts within dicts, more than {_MOST_WRAPPERS} levels deep, "
            f"under keys such as 'model'"
        )
    if wrong := [key for key in content if not isinstance(key, str)]:
        raise ArchError(
            f"{one_line(path)} has the key {one_line(wrong[0])}, of type "
            f"{type(wrong[0]).__name__}; expected names of tensors"
        )
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
