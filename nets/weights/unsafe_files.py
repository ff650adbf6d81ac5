"""Explain why a weights file is rejected, and how its owner can save only the weights.

Inspects the operations of the file's pickle without executing them.
"""

from __future__ import annotations

import pickletools
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from teach_once.nets.networks.archs import ArchError
from teach_once.nets.weights.pickle import MOST_OPERATIONS
from teach_once.runtime.safe.text import one_line

WRAPPERS = ("state_dict", "model_state_dict", "model", "net")  # keys whose value is a state dict
_ALL = "content"  # the variable in the lines that save a state dict
_TENSORS = f"{{k: v for k, v in {_ALL}.items() if isinstance(v, torch.Tensor)}}"
_NOT_MODULES = ("collections ", "builtins ", "__builtin__ ")
_MEMO = {"PROTO", "FRAME", "MARK", "MEMOIZE", "BINPUT", "LONG_BINPUT"}


class _Op(NamedTuple):
    """An operation of a pickle."""

    name: str
    argument: object


class _Content(NamedTuple):
    """A description of a file, and the expression for its state dict after loading."""

    what: str
    state_dict: str


def foreign_class(pickle: bytes, path: Path, name: str) -> ArchError:
    """Return the error for a file whose pickle names an unknown class.

    The fix is the lines of Python that save a plain state dict from the file.
    """
    try:
        operations = islice(pickletools.genops(pickle), MOST_OPERATIONS)
        content = _content([_Op(each.name, argument) for each, argument, _ in operations], name)
    except Exception as error:  # damaged bytes make pickletools raise anything at all
        return ArchError(f"{one_line(path)} is not a readable weights file: {one_line(error)}")
    return _refused(path, content, "torch.load({}, weights_only=False)")


def torchscript_program(path: Path) -> ArchError:
    """Return the error for a file that contains a program in addition to weights."""
    script = _Content("is a TorchScript program", f"{_ALL}.state_dict()")
    return _refused(path, script, "torch.jit.load({})")


def _refused(path: Path, content: _Content, load: str) -> ArchError:
    plain = path.with_name(f"{path.stem}-weights.pt")
    return ArchError(
        f"{one_line(path)} {content.what}, which only its original code can load",
        fix=f"if you trust it, save its weights alone where that code is installed, and use "
        f"{one_line(plain)}:\n"
        f"    import torch\n"
        f"    {_ALL} = {load.format(repr(str(path)))}\n"
        f"    torch.save({content.state_dict}, {str(plain)!r})",
    )


def _content(operations: list[_Op], blocked: str) -> _Content:
    """Describe the content of a file from its operations; blocked: the unknown class."""
    values = [op for op in operations if op.name not in _MEMO]
    if module := _class_at(values, 0):
        return _Content(f"is a whole pickled module of class {module}", f"{_ALL}.state_dict()")
    beside = f"contains an object of class {one_line(blocked)} in addition to weights"
    for index, op in enumerate(values[:-1]):
        if op.argument in WRAPPERS:
            wrapped = f"{_ALL}[{op.argument!r}]"
            if module := _class_at(values, index + 1):
                what = f"contains a whole pickled module of class {module} under {op.argument!r}"
                return _Content(what, f"{wrapped}.state_dict()")
            return _Content(beside, wrapped)
    return _Content(beside, _TENSORS)


def _class_at(values: list[_Op], index: int) -> str:
    """Return the class of the object that begins at `index`; "" for a dict, number or string."""
    if values[index].argument == "module":  # in the older format, this precedes the class
        index += 1
    name, argument = values[min(index, len(values) - 1)]
    is_object = name == "GLOBAL" and not str(argument).startswith(_NOT_MODULES)
    return one_line(argument).replace(" ", ".") if is_object else ""
