"""Code that a config names: networks (`python:module:function`) and losses (`module:function`).

Who uses somebody's config runs the code that it names, as if it were a program of theirs.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

from teach_once.configs.schema import StudentConfig, TeacherConfig, as_plain
from teach_once.runtime.safe.text import one_line

_PYTHON_PREFIX = "python:"


def named_code(config: TeacherConfig | StudentConfig) -> list[str]:
    """The networks and losses of a config that are functions of Python modules, each once."""
    named: set[str] = set()
    waiting: list[Any] = [as_plain(config)]
    while waiting:
        block = waiting.pop()
        for key, value in block.items() if isinstance(block, dict) else enumerate(block):
            if isinstance(value, dict | list):
                waiting.append(value)
            elif key == "arch" and value.startswith(_PYTHON_PREFIX):
                named.add(value.removeprefix(_PYTHON_PREFIX))
            elif key == "loss" and ":" in value:
                named.add(value)
    return sorted(named)


def tell_of_code(file: str, config: TeacherConfig | StudentConfig) -> None:
    """Print, once per process, which code a config names, if any."""
    if code := named_code(config):
        _tell(f"note: {file} names code, which runs when the config is used: {', '.join(code)}")


@functools.cache
def _tell(line: str) -> None:
    print(one_line(line, longest=1000), file=sys.stderr)
