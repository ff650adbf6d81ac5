"""What a relative path in a config's file means: the folder of that file, else the current folder.

Where neither has it, it is to be made (weights to be trained, data to be downloaded) beside the
file; but in the current folder for the project's own files, which are written for its root. A path
on the command line always means the current folder. `~` is the user's home everywhere.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from teach_once.configs.schema import TeacherConfig

_CONFIG_DIR = Path(__file__).resolve().parent
_KEYS = {
    "student": ("teacher", "student.init"),
    "teacher": (
        *("dataset.root", "dataset.file", "dataset.packed", "dataset.path"),
        *("teacher.weights", "training.init"),
    ),
}
_MAY_BE_NAMES = ("dataset.path",)  # of a dataset to download, where there is no such folder


def expand_home(raw: dict[str, Any], kind: str) -> None:
    """Put the home's folder in the place of `~` at the begin of each path of a file's content."""
    for key in (*_KEYS[kind], *_list_keys(raw)):
        block, last = _block_of(raw, key)
        value = _value(block, last)
        if isinstance(value, str) and value.startswith("~"):
            block[last] = os.path.expanduser(value)


def locate_paths(raw: dict[str, Any], kind: str, file: Path) -> dict[str, str]:
    """Put the path that is meant in the place of each relative one of a file's content.

    Returns {dotted key: path as written} of those that are in neither folder.
    """
    missing = {}
    for key in (*_KEYS[kind], *_list_keys(raw)):
        block, last = _block_of(raw, key)
        value = _value(block, last)
        if not isinstance(value, str) or not _is_relative_path(key, value):
            continue
        beside = str(file.parent / value)
        is_anywhere = _exists(beside) or _exists(value) or key in _MAY_BE_NAMES
        if not is_anywhere and not file.resolve().is_relative_to(_CONFIG_DIR):
            missing[key] = value
        if _exists(beside) or key in missing:
            block[last] = beside
    return missing


def not_found(missing: Mapping[str, str], raw: Mapping[str, Any], file: Path) -> dict[str, str]:
    """{dotted key: the places that were tried, in words} of those that no override has replaced.

    missing: of `locate_paths`. raw: the content after overrides.
    """
    told = {}
    for key, written in missing.items():
        block, last = _block_of(raw, key)
        beside = str(file.parent / written)
        if _value(block, last) == beside:
            more = "" if beside == written else f", nor {written} in the current folder"
            told[key] = beside + more
    return told


def no_weights(config: TeacherConfig, weights: Path) -> str:
    """The message for weights that are not there."""
    told = config.source.not_found if config.source else {}
    return f"teacher.weights: there is no file {told.get('teacher.weights', weights)}"


def _list_keys(raw: Mapping[str, Any]) -> list[str]:
    """teachers.0, teachers.1, ... of a student's file that lists several."""
    several = raw.get("teachers")
    return [f"teachers.{i}" for i in range(len(several))] if isinstance(several, list) else []


def _block_of(raw: Mapping[str, Any], key: str) -> tuple[Any, str | int]:
    """The block or list that holds a dotted key, and the last part of the key."""
    *parents, last = key.split(".")
    block: Any = raw
    for parent in parents:
        block = block.get(parent) if isinstance(block, Mapping) else None
    # An index, unless a list stands where a block should: then the schema says so.
    return block, int(last) if isinstance(block, list) and last.isdigit() else last


def _value(block: Any, key: str | int) -> Any:
    if isinstance(block, Mapping):
        return block.get(key)
    return block[key] if isinstance(block, list) and isinstance(key, int) else None


def _is_relative_path(key: str, value: str) -> bool:
    names_a_file = key != "teacher" and not key.startswith("teachers.")
    if not names_a_file and Path(value).suffix not in (".yaml", ".yml"):
        return False  # the name of one of the project's own
    is_elsewhere = value.startswith(("torchvision:", "timm:", "s3://"))
    return not is_elsewhere and not Path(value).is_absolute()


def _exists(path: str) -> bool:
    try:
        return Path(path).exists()
    except OSError:  # a name that is too long for any file
        return False
