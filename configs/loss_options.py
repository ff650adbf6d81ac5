"""The built-in losses by name, with their options, as the source of train/losses.py defines them.

A loss is registered in one place: above its function, whose parameters with a number as default
are its options. Configs are checked without importing that file, which would load torch and turn
the direction of imports round; so its text is parsed.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

_SOURCE = Path(__file__).parent.parent / "train" / "losses.py"
_DECORATOR = "loss_term"


class LossOption(NamedTuple):
    """An option of a loss: the name of its type in the signature, and its default."""

    type: str
    default: float


class BuiltInLoss(NamedTuple):
    """What a loss computes, in the first line of its docstring, its options and other inputs."""

    meaning: str
    options: Mapping[str, LossOption]
    inputs: tuple[str, ...]


@functools.cache
def built_in_losses() -> Mapping[str, BuiltInLoss]:
    """The losses by name, in the order of the source."""
    tree = ast.parse(_SOURCE.read_text(encoding="utf-8"))
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    return {
        each.name: BuiltInLoss(_first_line(each), _options(each), _inputs(each))
        for each in functions
        if _is_registered(each)
    }


def _is_registered(function: ast.FunctionDef) -> bool:
    calls = (each for each in function.decorator_list if isinstance(each, ast.Call))
    return any(isinstance(call.func, ast.Name) and call.func.id == _DECORATOR for call in calls)


def _first_line(function: ast.FunctionDef) -> str:
    return (ast.get_docstring(function) or "").partition("\n")[0]


def _options(function: ast.FunctionDef) -> dict[str, LossOption]:
    parameters, defaults = function.args.args, function.args.defaults
    with_default = zip(parameters[len(parameters) - len(defaults) :], defaults, strict=True)
    return {
        parameter.arg: LossOption(_type_of(parameter), default.value)
        for parameter, default in with_default
        if isinstance(default, ast.Constant) and isinstance(default.value, (int, float))
    }


def _inputs(function: ast.FunctionDef) -> tuple[str, ...]:
    """The parameters that are not options."""
    options = _options(function)
    return tuple(each.arg for each in function.args.args if each.arg not in options)


def _type_of(parameter: ast.arg) -> str:
    return ast.unparse(parameter.annotation) if parameter.annotation else "float"
