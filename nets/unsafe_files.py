"""Why torch refuses a weights file, and how its owner saves the weights alone.

Looks at the operations of the pickle inside and executes none of them.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path
from typing import BinaryIO, NamedTuple

from nets.archs import ArchError
from nets.weights_container import Op, operations
from runtime.text import one_line

_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_ALL = "content"  # the variable in the lines that save a state dict
_TENSORS = f"{{k: v for k, v in {_ALL}.items() if isinstance(v, torch.Tensor)}}"
_MEMO = {"PROTO", "FRAME", "MARK", "MEMOIZE", "BINPUT", "LONG_BINPUT"}


class _Content(NamedTuple):
    """What a file is, in words, and the expression that gives its state dict once it is loaded."""

    what: str
    state_dict: str


def unreadable(
    file: BinaryIO, path: Path, error: Exception, wrappers: Collection[str]
) -> ArchError:
    """The error for a file that torch.load refused with `error`: what it is, and the fix.

    The fix, where the file is sound, is the lines that save a plain state dict from it. file: as
    `nets.weights_container.check_container` left it. wrappers: keys under which checkpoints hold a
    state dict.
    """
    text = _COLOURS.sub("", str(error))
    blocked = re.search(r"GLOBAL ([\w.]+) was not an allowed", text)
    if blocked is None:
        reason = re.search(r"WeightsUnpickler error: (.*)", text)
        short = reason[1] if reason else (text.splitlines() or [type(error).__name__])[0]
        return ArchError(f"{one_line(path)} is not a readable weights file: {one_line(short)}")
    content = _content(list(operations(file)), blocked[1], wrappers)
    return _refused(path, content, "torch.load({}, weights_only=False)")


def torchscript_program(path: Path) -> ArchError:
    """The error for a file that holds a program beside its weights."""
    script = _Content("is a TorchScript program", f"{_ALL}.state_dict()")
    return _refused(path, script, "torch.jit.load({})")


def _refused(path: Path, content: _Content, load: str) -> ArchError:
    plain = path.with_name(f"{path.stem}-weights.pt")
    return ArchError(
        f"{one_line(path)} {content.what}, which only its own code can load",
        fix=f"if you trust it, save its weights alone where that code is installed, and use "
        f"{one_line(plain)}:\n"
        f"    import torch\n"
        f"    {_ALL} = {load.format(repr(str(path)))}\n"
        f"    torch.save({content.state_dict}, {str(plain)!r})",
    )


def _content(operations: list[Op], blocked: str, wrappers: Collection[str]) -> _Content:
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


def _class_at(values: list[Op], index: int) -> str:
    """The class of the object that begins there; "" for a dict, a number or a string."""
    if values[index].argument == "module":  # the older format says so before its class
        index += 1
    name, argument = values[min(index, len(values) - 1)]
    is_object = name == "GLOBAL" and argument != "collections OrderedDict"
    return one_line(argument).replace(" ", ".") if is_object else ""
