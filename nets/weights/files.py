"""Read and write weights files without running code from them.

A file contains a plain dict of tensors and is replaced atomically. Reading does not use torch's
loader: `nets.weights.container` finds the storages, and the tensors are views of them. Only tensors
of plain numbers are accepted: sparse, quantized, complex and meta tensors are rejected.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
from collections.abc import Callable, Collection, Hashable, Mapping
from pathlib import Path
from typing import IO, Any, BinaryIO, cast
from urllib.parse import urlparse

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from teach_once.nets.networks.archs import ArchError
from teach_once.nets.weights.classes import Other, Storage
from teach_once.nets.weights.container import Container, check_container, open_weights
from teach_once.nets.weights.pickle import read_pickle
from teach_once.nets.weights.unsafe_files import WRAPPERS
from teach_once.runtime.safe.files import written_aside
from teach_once.runtime.safe.text import one_line

_SHOWN_DIFFERENCES = 5
_MOST_WRAPPERS = 4  # nested dicts around a state dict
_DTYPES = {  # by the class of a storage
    "BoolStorage": torch.bool,
    "ByteStorage": torch.uint8,
    "UntypedStorage": torch.uint8,
    "CharStorage": torch.int8,
    "ShortStorage": torch.int16,
    "IntStorage": torch.int32,
    "LongStorage": torch.int64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
}
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8)
_PREFIXES = ("module.", "_orig_mod.", "student.", "model.", "net.")


def save_atomically(content: dict[str, Any], path: Path) -> None:
    """Save atomically: torch.save to a temporary file, flush, rename to `path`.

    The same content gives the same bytes, and therefore the same identity of anything made from it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_aside(path) as aside, aside.open("wb") as file:
        write_tensors(content, file)


def write_tensors(content: dict[str, Any], file: BinaryIO) -> str:
    """Write with torch.save to an open file; returns the sha256 of the bytes.

    With a path, torch.save would put the name of the temporary file into the archive. Raises
    OSError if the disk fails, which torch would convert to another error.
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
    """A file that computes the sha256 of everything written and keeps the first OSError."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._digest = file, hashlib.sha256()
        self.refused: OSError | None = None

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()

    def writable(self) -> bool:
        return True

    def write(self, data: bytes | memoryview) -> int:  # type: ignore[override]  # any buffer
        self._digest.update(data)
        try:
            self._file.write(data)
        except OSError as error:
            self.refused = error
            raise
        return len(data)


def read_tensors(path: Path, *, follow: bool = True) -> dict[str, Any]:
    """Read the dict in a weights file or a checkpoint, after verifying its checksums.

    The format is safetensors if the file's name ends in `.safetensors`. Tensors may be views of a
    private memory map of the file until they are copied. A value that is neither a tensor nor a
    plain value becomes an `Other`. follow: follow symbolic links.

    Raises ArchError if the file is missing, damaged or has other content, and BadFile if it is not
    a regular file.
    """
    with open_weights(path, follow=follow) as file:
        if path.suffix == ".safetensors":
            return _read_safetensors(file, path)
        content = _content(file, path, check_container(file, path))
    if not isinstance(content, dict):
        raise ArchError(
            f"{one_line(path)} contains a {_described(content)}, expected a dict of tensors"
        )
    return content


def _content(file: BinaryIO, path: Path, container: Container) -> object:
    """Return the content of a file; its tensors are views of one memory map.

    A tensor cannot extend beyond the end of its storage: torch checks its shape.
    """
    whole = torch.UntypedStorage.from_file(
        f"/proc/self/fd/{file.fileno()}", False, os.fstat(file.fileno()).st_size
    )
    flat: dict[Hashable, Tensor] = {}

    def make_tensor(
        storage: Storage,
        dtype: str | None,
        offset: int,
        size: tuple[int, ...],
        stride: tuple[int, ...],
    ) -> Tensor:
        if storage.key not in flat:
            start = container.offsets[storage.key]
            numbers = whole[start : start + storage.num_bytes]
            if start % storage.element_bytes:  # possible in the format before torch 1.6
                numbers = numbers.clone()
            kind = _DTYPES[storage.kind]
            flat[storage.key] = torch.empty(0, dtype=kind).set_(numbers)
        own = flat[storage.key]
        if dtype is not None:
            own = own.view(getattr(torch, dtype.removeprefix("torch.")))
        return own.as_strided(size, stride, offset)

    try:
        return read_pickle(io.BytesIO(container.pickle), make_tensor).content
    except Exception as error:  # torch raises various errors for impossible shapes
        reason = one_line(str(error).partition("\n")[0])
        raise ArchError(f"{one_line(path)} is not a readable weights file: {reason}") from None


def _described(value: object) -> str:
    return value.kind if isinstance(value, Other) else type(value).__name__


def _read_safetensors(file: BinaryIO, path: Path) -> dict[str, Any]:
    """Read the tensors of an open file with the safetensors library, which checks and maps it."""
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
    """Load the state dict in a file into `network`.

    The state dict may be nested under a key (`state_dict`, `model`, `model_state_dict`, `net`), and
    all its keys may share a prefix added by wrappers (`module.`, `student.`, ...). The precision
    may differ. convert: applied if the tensors do not fit unchanged. without: modules that keep
    their current weights; the file may lack them or have them in another shape.

    Raises ArchError with the mismatched keys if the weights do not fit.
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
    """Return a line for each tensor that is missing, unexpected or of another shape or dtype."""
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


def mismatch_with(own: object, found: object, *, exactly: bool = False) -> str:
    """Return why `found` cannot replace `own`; "" if it can.

    exactly: require the same dtype, otherwise a dtype of the same kind.
    """
    if not isinstance(own, Tensor):
        same = type(found) is type(own)
        return "" if same else f"is a {_described(found)}, expected a {type(own).__name__}"
    if not isinstance(found, Tensor) or type(found) not in (Tensor, nn.Parameter):
        return f"is a {_described(found)}, expected a tensor"
    if kind := _unusable(found):
        return f"is a {kind} tensor, expected a plain one"
    if found.shape != own.shape:
        return f"has shape {tuple(found.shape)}, expected {tuple(own.shape)}"
    if found.dtype != own.dtype and (exactly or not _same_kind(own.dtype, found.dtype)):
        return f"has dtype {_name(found.dtype)}, expected {_name(own.dtype)}"
    return ""


def _unusable(tensor: Tensor) -> str:
    """Return the kind of a tensor whose values are not plain numbers in memory; otherwise ""."""
    if tensor.layout != torch.strided:
        return "sparse"
    if tensor.is_quantized:
        return "quantized"
    return f"{tensor.device.type}" if tensor.device.type != "cpu" else ""


def _same_kind(own: torch.dtype, found: torch.dtype) -> bool:
    return any(own in kind and found in kind for kind in (_FLOATS, _INTEGERS))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def torchvision_file(name: str) -> Path:
    """Return the path where torch.hub stores weights such as `ResNet34_Weights.IMAGENET1K_V1`.

    The file need not exist. Raises ArchError for an unknown name.
    """
    return Path(torch.hub.get_dir()) / "checkpoints" / Path(urlparse(_url(name)).path).name


def download_torchvision(name: str, file: Path) -> None:
    """Download torchvision's weights to `file` and check the hash in the file's name.

    file: path from `torchvision_file`. Raises ArchError if the download fails.
    """
    url = _url(name)
    digits = re.search(r"-([0-9a-f]{8,})\.", file.name)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(
            url, str(file), hash_prefix=digits and digits[1], progress=False
        )
    except (OSError, RuntimeError) as error:
        raise ArchError(
            f"teacher.weights: {name} cannot be downloaded: {error}",
            fix=f"download {url} to {file}",
        ) from None


def _url(name: str) -> str:
    from teach_once.runtime.machine.torchvision_shim import import_torchvision

    import_torchvision()
    from torchvision import models

    try:
        return str(models.get_weight(name).url)
    except (ValueError, KeyError, AttributeError):
        raise ArchError(f"teacher.weights: torchvision has no weights {name!r}") from None


def _unwrapped(content: dict[str, Any], path: Path) -> dict[str, Any]:
    """Return the state dict inside any wrapping dicts. Raises ArchError if a key is not a name."""
    for _ in range(_MOST_WRAPPERS):
        inner = (content[key] for key in WRAPPERS if isinstance(content.get(key), dict))
        if (found := next(inner, None)) is None:
            break
        content = found
    else:
        raise ArchError(
            f"{one_line(path)} nests its state dict under more than {_MOST_WRAPPERS} keys such as "
            f"'model'"
        )
    if wrong := [key for key in content if not isinstance(key, str)]:
        raise ArchError(
            f"{one_line(path)} has the key {one_line(wrong[0])}, of type "
            f"{type(wrong[0]).__name__}; expected names of tensors"
        )
    return content


def _without_prefix(tensors: dict[str, Any], expected: Collection[str]) -> dict[str, Any]:
    """Remove prefixes shared by all keys, if the result fits `expected` better."""
    candidates = [tensors]
    while prefix := _shared_prefix(candidates[-1]):
        candidates.append({k.removeprefix(prefix): v for k, v in candidates[-1].items()})
    return max(candidates, key=lambda some: sum(key in expected for key in some))


def _shared_prefix(tensors: dict[str, Any]) -> str:
    """Return the known prefix shared by all keys, or ""."""
    shared = (p for p in _PREFIXES if tensors and all(key.startswith(p) for key in tensors))
    return next(shared, "")
