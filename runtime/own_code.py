"""Imports what a config names as `package.module:name`, and says where the user's module fails."""

from __future__ import annotations

import importlib
import traceback
from typing import Any

from runtime.errors import UserError
from runtime.text import one_line


class CannotImport(UserError):
    """A module that a config names cannot be imported, or lacks the name."""


def import_named(module: str, name: str) -> Any:
    """The object `name` of a module. Raises CannotImport, whatever the module itself raises."""
    try:
        return getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        fix = "put the module where Python finds it, or correct its name"
        raise CannotImport(one_line(error), fix=fix) from None
    except AttributeError as error:
        raise CannotImport(one_line(error), fix="correct the name after the colon") from None
    except Exception as error:
        said, place = f"{type(error).__name__}: {one_line(error)}", _place(error)
        fix = f"correct {place}" if place else "write package.module:name"
        raise CannotImport(f"{said} in {place}" if place else said, fix=fix) from error


def _place(error: Exception) -> str:
    """The last place in a file of the user's that leads to an error; "" without one."""
    if isinstance(error, SyntaxError):
        return f"{one_line(error.filename)}, line {error.lineno}"
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if "importlib" not in frame.filename:
            is_ours = frame.filename == __file__
            return "" if is_ours else f"{one_line(frame.filename)}, line {frame.lineno}"
    return ""
