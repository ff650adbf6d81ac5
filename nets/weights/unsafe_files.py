"""Why a weights file is refused, and how its owner saves the weights alone.

Looks at the operations of the pickle inside and executes none of them.
"""

from __future__ import annotations

import pickletools
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from teach_once.nets.networks.archs import ArchError
from teach_once.nets.weights.pickle import MOST_OPERATIONS
from teach_once.runtime.safe.text import one_line

WRAPPERS = ("state_dict", "model_state_dict", "model", "net")  # keys that hold a state dict
_ALL = "content"  # the variable in the lines that save a state dict
_TENSORS = f"{{k: v for k, v in {_ALL}.items() if isinstance(v, torch.Tensor)}}"
_NOT_MODULES = ("collections ", "builtins ", "__builtin__ ")
_MEMO = {"PROTO", "FRAME", "MARK", "MEMOIZE", "BINPUT", "LONG_BINPUT"}


class _Op(NamedTuple):
    """An operation of a pickle."""

    name: str
    argument: object


class _Content(NamedTuple):
    """What a file is, in words, and the expression that gives its state dict once it is loaded."""

    what: str
    state_dict: str


def foreign_class(pickle: bytes, path: Path, name: str) -> ArchError:
    """The error for a file whose pickle names a class that is not known here: what it is, the fix.

    The fix is the lines that save a plain state dict from it.
    """
    try:
        operations = islice(pickletools.genops(pickle), MOST_OPERATIONS)
        content = _content([_Op(each.name, argument) for each, argument, _ in operations], name)
    except Exception as error:  # damaged bytes make pickletools raise anything at all
        return ArchError(f"{one_line(path)} is not a readable weights file: {one_line(error)}")
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


def _content(operations: list[_Op], blocked: str) -> _Content:
    """blocked: the class that is not known."""
    values = [op for op in operations if op.name not in _MEMO]
    if module := _class_at(values, 0):
        return _Content(f"is a whole pickled module of class {module}", f"{_ALL}.state_dict()")
    beside = f"holds an object of class {one_line(blocked)} beside its weights"
    for index, op in enumerate(values[:-1]):
        if op.argument in WRAPPERS:
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
    name, argument = values[min(index, len(values) - 1)]
    is_object = name == "GLOBAL" and not str(argument).startswith(_NOT_MODULES)
    return one_line(argument).replace(" ", ".") if is_object else ""
