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

_SOURCE = Path(__file__).parent.parent / "train" / "losses.py"
_DECORATOR = "loss_term"


@functools.cache
def built_in_losses() -> Mapping[str, Mapping[str, str]]:
    """Loss -> its options, each with the name of its type: {"kd": {"temperature": "float"}}."""
    tree = ast.parse(_SOURCE.read_text(encoding="utf-8"))
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    return {each.name: _options(each) for each in functions if _is_registered(each)}


def _is_registered(function: ast.FunctionDef) -> bool:
    calls = (each for each in function.decorator_list if isinstance(each, ast.Call))
    return any(isinstance(call.func, ast.Name) and call.func.id == _DECORATOR for call in calls)


def _options(function: ast.FunctionDef) -> dict[str, str]:
    parameters, defaults = function.args.args, function.args.defaults
    with_default = zip(parameters[len(parameters) - len(defaults) :], defaults, strict=True)
    return {
        parameter.arg: ast.unparse(parameter.annotation) if parameter.annotation else "float"
        for parameter, default in with_default
        if isinstance(default, ast.Constant) and isinstance(default.value, (int, float))
    }
