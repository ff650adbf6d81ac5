"""Why torch refuses a weights file, and how its owner saves the weights alone.

Looks at the operations of the pickle inside and executes none of them.
"""

from __future__ import annotations

import pickletools
import re
import zipfile
from collections.abc import Collection
from pathlib import Path
from typing import IO, Any, NamedTuple

from nets.archs import ArchError

_LEGACY_HEADERS = 3  # pickles before the content, in files older than torch 1.6
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_ALL = "content"  # the variable in the lines that save a state dict
_TENSORS = f"{{k: v for k, v in {_ALL}.items() if isinstance(v, torch.Tensor)}}"
_MEMO = {"PROTO", "FRAME", "MARK", "MEMOIZE", "BINPUT", "LONG_BINPUT"}


class _Op(NamedTuple):
    name: str
    argument: Any


class _Content(NamedTuple):
    """What a file is, in words, and the expression that gives its state dict once it is loaded."""

    what: str
    state_dict: str


def unreadable(path: Path, error: Exception, wrappers: Collection[str]) -> ArchError:
    """The error for a file that torch.load refused with `error`: what it is, and the fix.

    The fix, where the file is sound, is the lines that save a plain state dict from it. wrappers:
    keys under which checkpoints hold a state dict.
    """
    text = _COLOURS.sub("", str(error))
    if "TorchScript" in text:
        script = _Content("is a TorchScript program", f"{_ALL}.state_dict()")
        return _refused(path, script, "torch.jit.load({})")
    blocked = re.search(r"GLOBAL ([\w.]+) was not an allowed", text)
    operations = _operations(path) if blocked else []
    if blocked is None or not operations:
        reason = re.search(r"WeightsUnpickler error: (.*)", text)
        short = reason[1] if reason else (text.splitlines() or [type(error).__name__])[0]
        return ArchError(f"{path} is not a readable weights file: {short}")
    content = _content(operations, blocked[1], wrappers)
    return _refused(path, content, "torch.load({}, weights_only=False)")


def _refused(path: Path, content: _Content, load: str) -> ArchError:
    plain = path.with_name(f"{path.stem}-weights.pt")
    return ArchError(
        f"{path} {content.what}, which only its own code can load",
        fix=f"if you trust it, save its weights alone where that code is installed, and use "
        f"{plain}:\n"
        f"    import torch\n"
        f"    {_ALL} = {load.format(repr(str(path)))}\n"
        f"    torch.save({content.state_dict}, {str(plain)!r})",
    )


def _content(operations: list[_Op], blocked: str, wrappers: Collection[str]) -> _Content:
    """blocked: the class that torch refused to load."""
    values = [op for op in operations if op.name not in _MEMO]
    if module := _class_at(values, 0):
        return _Content(f"is a whole pickled module of class {module}", f"{_ALL}.state_dict()")
    beside = f"holds an object of class {blocked} beside its weights"
    for index, op in enumerate(values[:-1]):
        if op.argument in wrappers:
            wrapped = f"{_ALL}[{op.argument!r}]"
            if module := _class_at(values, index + 1):
                what = f"holds a whole pickled module of class {module} under {op.argument!r}"
                return _Content(what, f"{wrapped}.state_dict()")
            return _Content(beside, wrapped)
    return _Content(beside, _TENSORS)


def _class_at(values: list[_Op], index: int) -> str:
    """The class of the object that begins there; "" for a dict, a number or a string."""
    if values[index].argument == "module":  # the older format says so before its class
        index += 1
    name, argument = values[index]
    is_object = name == "GLOBAL" and argument != "collections OrderedDict"
    return str(argument).replace(" ", ".") if is_object else ""


def _operations(path: Path) -> list[_Op]:
    """Those of the pickle that holds the content, in torch's format or the one before it.

    [] where the pickle cannot be followed to its end.
    """
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                (name,) = (n for n in archive.namelist() if n.endswith("/data.pkl"))
                return _parsed(archive.read(name))
        with path.open("rb") as file:
            for _ in range(_LEGACY_HEADERS):
                _parsed(file)
            return _parsed(file)
    except (ValueError, zipfile.BadZipFile):
        return []


def _parsed(pickle: bytes | IO[bytes]) -> list[_Op]:
    return [_Op(operation.name, argument) for operation, argument, _ in pickletools.genops(pickle)]
