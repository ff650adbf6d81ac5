"""Resolve relative paths in a config: in the config's folder, else in the current folder.

If neither has the file, it will be created (trained weights, downloaded data) next to the config,
or, for the project's own configs, in the current folder. A path on the command line is always
relative to the current folder. `~` is the user's home everywhere.
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
        *("teacher.weights", "training.init", "probe.train", "probe.test"),
    ),
}
_MAY_BE_NAMES = ("dataset.path",)  # name of a dataset to download, if there is no such folder


def expand_home(raw: dict[str, Any], kind: str) -> None:
    """Replace `~` at the start of each path in a file's content by the user's home folder."""
    for key in (*_KEYS[kind], *_list_keys(raw)):
        block, last = _block_of(raw, key)
        value = _value(block, last)
        if isinstance(value, str) and value.startswith("~"):
            block[last] = os.path.expanduser(value)


def locate_paths(raw: dict[str, Any], kind: str, file: Path) -> dict[str, str]:
    """Replace each relative path in a file's content by the path it refers to.

    Returns {dotted key: path as written} of the paths found in neither folder.
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
    """Return {dotted key: tried locations, in words} of paths that no override has replaced.

    missing: from `locate_paths`. raw: the content after overrides.
    """
    told = {}
    for key, written in missing.items():
        block, last = _block_of(raw, key)
        beside = str(file.parent / written)
        if _value(block, last) == beside:
            more = "" if beside == written else f" (or {written} in the current folder)"
            told[key] = beside + more
    return told


def no_weights(config: TeacherConfig, weights: Path) -> str:
    """Return the message for missing weights."""
    told = config.source.not_found if config.source else {}
    return f"teacher.weights: file {told.get('teacher.weights', weights)} not found"


def _list_keys(raw: Mapping[str, Any]) -> list[str]:
    """Return teachers.0, teachers.1, ... for a student's file that lists several."""
    several = raw.get("teachers")
    return [f"teachers.{i}" for i in range(len(several))] if isinstance(several, list) else []


def _block_of(raw: Mapping[str, Any], key: str) -> tuple[Any, str | int]:
    """Return the block or list that contains a dotted key, and the last part of the key."""
    *parents, last = key.split(".")
    block: Any = raw
    for parent in parents:
        block = block.get(parent) if isinstance(block, Mapping) else None
    # An index; a list in place of a block is reported by the schema.
    return block, int(last) if isinstance(block, list) and last.isdigit() else last


def _value(block: Any, key: str | int) -> Any:
    if isinstance(block, Mapping):
        return block.get(key)
    return block[key] if isinstance(block, list) and isinstance(key, int) else None


def _is_relative_path(key: str, value: str) -> bool:
    names_a_file = key != "teacher" and not key.startswith("teachers.")
    if not names_a_file and Path(value).suffix not in (".yaml", ".yml"):
        return False  # the name of a config of the project
    is_elsewhere = value.startswith(("torchvision:", "timm:", "s3://"))
    return not is_elsewhere and not Path(value).is_absolute()


def _exists(path: str) -> bool:
    try:
        return Path(path).exists()
    except OSError:  # a name too long for a file
        return False
