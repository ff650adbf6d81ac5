"""What a weights file holds that may not be loaded, and how its user saves the weights alone.

Looks at the operations of the pickle inside, and executes none of them.
"""

from __future__ import annotations

import pickletools
import re
import zipfile
from collections.abc import Collection
from pathlib import Path
from typing import IO, Any, NamedTuple

_LEGACY_HEADERS = 3  # pickles in front of the content, in files older than torch 1.6
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_ALL = "content"  # the variable in the lines that save a state dict
_TENSORS = f"{{k: v for k, v in {_ALL}.items() if isinstance(v, torch.Tensor)}}"
_MEMO = {"PROTO", "FRAME", "MARK", "MEMOIZE", "BINPUT", "LONG_BINPUT"}


class _Op(NamedTuple):
    name: str
    argument: Any


def told_why_unreadable(path: Path, error: Exception, wrappers: Collection[str]) -> str:
    """Plain text: what the file is, and where it is sound how to save a plain state dict from it.

    error: what torch.load raised. wrappers: keys under which checkpoints hold a state dict.
    """
    text = _COLOURS.sub("", str(error))
    if "TorchScript" in text:
        return _told(path, "is a TorchScript program", "torch.jit.load({})", f"{_ALL}.state_dict()")
    blocked = re.search(r"GLOBAL ([\w.]+) was not an allowed", text)
    operations = _operations(path) if blocked else []
    if blocked is None or not operations:
        reason = re.search(r"WeightsUnpickler error: (.*)", text)
        short = reason[1] if reason else (text.splitlines() or [type(error).__name__])[0]
        return f"{path} is not a readable weights file: {short}"
    what, state_dict = _described(operations, blocked[1], wrappers)
    return _told(path, what, "torch.load({}, weights_only=False)", state_dict)


def _told(path: Path, what: str, load: str, state_dict: str) -> str:
    plain = path.with_name(f"{path.stem}-weights.pt")
    return (
        f"{path} {what}, which only its own code can load\n"
        f"  fix: if you trust it, save its weights alone where that code is installed, and use "
        f"{plain}:\n"
        f"    import torch\n"
        f"    {_ALL} = {load.format(repr(str(path)))}\n"
        f"    torch.save({state_dict}, {str(plain)!r})"
    )


def _described(operations: list[_Op], blocked: str, wrappers: Collection[str]) -> tuple[str, str]:
    """What the file is, and how its state dict is reached once it is loaded."""
    values = [op for op in operations if op.name not in _MEMO]
    if found := _class_at(values, 0):
        return f"is a whole pickled module of class {found}", f"{_ALL}.state_dict()"
    for place, op in enumerate(values[:-1]):
        if op.argument in wrappers:
            held = f"{_ALL}[{op.argument!r}]"
            if found := _class_at(values, place + 1):
                what = f"holds a whole pickled module of class {found} under {op.argument!r}"
                return what, f"{held}.state_dict()"
            return f"holds an object of class {blocked} beside its weights", held
    return f"holds an object of class {blocked} beside its weights", _TENSORS


def _class_at(values: list[_Op], place: int) -> str:
    """The class of the object that begins there; none for a dict, a number or a text."""
    if values[place].argument == "module":  # the older format says so in front of its class
        place += 1
    name, argument = values[place]
    is_object = name == "GLOBAL" and argument != "collections OrderedDict"
    return str(argument).replace(" ", ".") if is_object else ""


def _operations(path: Path) -> list[_Op]:
    """Of the pickle that holds the content, in torch's own format or the one before it.

    None where it cannot be followed to its end.
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
