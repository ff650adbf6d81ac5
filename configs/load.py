"""Load a config: YAML text, `key.sub=value` overrides, then validation that reports all errors.

Inheritance, includes and interpolation are not supported, so that a file is complete by itself.
"""

from __future__ import annotations

import functools
import os
import re
import shlex
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError

from teach_once.configs.paths import expand_home, locate_paths, not_found
from teach_once.configs.schema import ConfigSource, StudentConfig, TeacherConfig, as_plain
from teach_once.configs.schema_errors import cut, error_lines, field_names
from teach_once.configs.yaml_subset import YamlError, parse_yaml
from teach_once.runtime.command.program import program, program_text
from teach_once.runtime.errors import UserError, did_you_mean
from teach_once.runtime.safe.safe_read import BadFile, read_bounded
from teach_once.runtime.safe.text import one_line

CONFIG_DIR = Path(__file__).resolve().parent
_MOST_BYTES = 2**20  # size of a file; the project's largest has 3 kB
TEACHER_PREFIX = "teacher."
_PYTHON_PREFIX = "python:"
_WITHOUT_STEM = ("timm:", "python:")  # networks without `stem`

Config = TypeVar("Config", TeacherConfig, StudentConfig)


class ConfigError(UserError, ValueError):
    """A config that cannot be used, with the faulty keys and the file."""


def load_teacher(
    name_or_path: str | Path, overrides: Sequence[str] = (), *, text: str | None = None
) -> TeacherConfig:
    """Load `configs/teacher/NAME.yaml` or the file at a path.

    text: content of the file, which need not exist yet. Raises ConfigError if it is invalid.
    """
    return _load(TeacherConfig, "teacher", name_or_path, overrides, text)


def load_student(
    name_or_path: str | Path, overrides: Sequence[str] = (), *, text: str | None = None
) -> StudentConfig:
    """Load `configs/student/NAME.yaml` or the file at a path.

    Overrides that begin with `teacher.` apply to the teacher's file: see `split_overrides`. text:
    content of the file, which need not exist yet. Raises ConfigError if the config is invalid.
    """
    return _load(StudentConfig, "student", name_or_path, overrides, text)


def teachers_of(
    name_or_path: str, overrides: Sequence[str] | None, *, of_student: bool = True
) -> list[tuple[str, list[str]]]:
    """Return arguments of `load_teacher`: (name or path, overrides) of each teacher of a student.

    of_student: False if the name and the overrides are already a teacher's. Raises ConfigError if
    the student's config is invalid.
    """
    if not of_student:
        return [(name_or_path, list(overrides or []))]
    own, teachers = split_overrides(overrides or [])
    config = load_student(name_or_path, own)
    return [(name, teachers) for name in config.teachers or (config.teacher,)]


def split_overrides(overrides: Iterable[str]) -> tuple[list[str], list[str]]:
    """Split a student's overrides into its own and those for the teacher's file (`teacher.x=y`)."""
    own: list[str] = []
    teachers: list[str] = []
    for item in overrides:
        if item.startswith(TEACHER_PREFIX):
            teachers.append(item.removeprefix(TEACHER_PREFIX))
        else:
            own.append(item)
    return own, teachers


def to_yaml(config: TeacherConfig | StudentConfig) -> str:
    """Return the resolved config with all defaults as YAML that loads to the same config.

    `stem` is omitted if the network has none.
    """
    plain = as_plain(config)
    name = plain.pop("name")
    network = plain["teacher" if isinstance(config, TeacherConfig) else "student"]
    for each in (network, network.get("thinner") or {}):
        if str(each.get("arch", "")).startswith(_WITHOUT_STEM):
            del each["stem"]
    body = yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)
    return f"# {name}, as resolved\n{body}"


def available(kind: str) -> list[str]:
    """Return the sorted names of configs of one kind ("teacher" or "student")."""
    return sorted(path.stem for path in (CONFIG_DIR / kind).glob("*.yaml"))


def _load(
    schema: type[Config],
    kind: str,
    name_or_path: str | Path,
    overrides: Sequence[str],
    text: str | None,
) -> Config:
    path = _find(kind, str(name_or_path)) if text is None else Path(name_or_path)
    _check_other_keys(schema, overrides)
    try:
        raw = _read_yaml(path) if text is None else _parsed(text)
        expand_home(raw, kind)
        missing = locate_paths(raw, kind, path)
        for item in overrides:
            _apply_override(raw, item)
        expand_home(raw, kind)
    except ConfigError as error:
        raise ConfigError(f"{_shown(path)}: {error}") from None
    if "name" in raw:
        raise ConfigError(f"{_shown(path)}: name: a config is named by its file; remove this key")
    if "source" in raw:
        raise ConfigError(f"{_shown(path)}: source: unknown key")
    places = not_found(missing, raw, path)
    source = ConfigSource(str(name_or_path), tuple(overrides), places)
    try:
        config = TypeAdapter(schema).validate_python({**raw, "name": path.stem, "source": source})
    except ValidationError as error:
        raise _unusable(path, error_lines(schema, error)) from None
    for key in (key for key in places if kind == "student" and key.startswith("teacher")):
        raise _unusable(path, [f"{key}: file {places[key]} not found"])
    if not path.resolve().is_relative_to(CONFIG_DIR):
        _print_named_code(_shown(path), config)
    return config


def _check_other_keys(schema: type, overrides: Sequence[str]) -> None:
    """Raise ConfigError for a teacher's key in a student's override, and the reverse."""
    own, teachers = set(field_names(schema)), set(field_names(TeacherConfig))
    for item in overrides:
        key, _, rest = item.partition("=")[0].partition(".")
        if schema is StudentConfig and key in teachers - own:
            raise ConfigError(
                f"override {cut(repr(item))}: {key} is a key of the teacher's file",
                fix=f"write {cut(TEACHER_PREFIX + item)}",
            )
        first = re.split("[.=]", rest)[0]
        block = get_type_hints(TeacherConfig)["teacher"]
        if schema is TeacherConfig and key == "teacher" and first in own - set(field_names(block)):
            raise ConfigError(
                f"override {cut(repr(item))}: the prefix teacher. is for student commands",
                fix=f"write {cut(item.removeprefix(TEACHER_PREFIX))}",
            )


def _unusable(path: Path, lines: Sequence[str]) -> ConfigError:
    return ConfigError("\n  ".join([f"{_shown(path)} cannot be used:", *lines]))


def check_data_exists(config: TeacherConfig, *, packing: bool = False) -> None:
    """Raise ConfigError if the images named in a config do not exist.

    packing: for the program that packs them, which needs the original images.
    """
    source, dataset = config.source or ConfigSource(config.name), config.dataset
    if dataset.packed_as is not None and not packing:
        if not os.path.lexists(dataset.packed_as):
            raise ConfigError(
                f"dataset.packed: file {dataset.packed_as} not found; pack the images first",
                fix=shlex.join([*program("views"), "pack", source.name, *source.overrides]),
            )
        return
    for key, places in source.not_found.items():
        if key.startswith("dataset.") and key != "dataset.packed" and dataset.must_exist:
            raise ConfigError(f"{key}: {places} not found", fix=f"set {key}=PATH")


def _find(kind: str, name_or_path: str) -> Path:
    path = Path(os.path.expanduser(name_or_path))
    if path.suffix in (".yaml", ".yml"):
        if _is_there(path):
            return path
        raise ConfigError(f"file {one_line(path)} not found")
    found = CONFIG_DIR / kind / f"{name_or_path}.yaml"
    if "/" not in name_or_path and _is_there(found):
        return found
    names = available(kind)
    raise ConfigError(
        f"unknown {kind} config {cut(repr(name_or_path))}"
        f"{did_you_mean(name_or_path, names, most=3)}",
        fix=f"{program_text('configs')} list",
    )


def _is_there(path: Path) -> bool:
    """Return True if the path exists, even as a broken link."""
    try:
        return os.path.lexists(path)
    except ValueError:  # a NUL character
        return False


def _shown(path: Path) -> str:
    if path.is_relative_to(CONFIG_DIR):
        return f"configs/{path.relative_to(CONFIG_DIR)}"
    return one_line(path)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        return _parsed(read_bounded(path, _MOST_BYTES, follow=True).decode("utf-8"))
    except BadFile as error:
        raise ConfigError(error.what) from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"not UTF-8 text: {error}") from None
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}") from None


def _parsed(text: str) -> dict[str, Any]:
    try:
        raw = parse_yaml(text)
    except YamlError as error:
        raise ConfigError(str(error)) from None
    if not isinstance(raw, dict):
        raise ConfigError("expected a mapping of keys to values")
    return raw


def _apply_override(raw: dict[str, Any], item: str) -> None:
    """Set one dotted key in place; numeric parts index lists, as in `methods.kd.0.weight=2`."""
    key, equals, text = item.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {cut(repr(item))}: expected key.sub=value")
    try:
        value = parse_yaml(text)
    except YamlError as error:
        reason = str(error).removeprefix("not valid YAML: ").splitlines()[0]
        raise ConfigError(
            f"override {cut(repr(item))}: the value is not valid YAML: {reason}"
        ) from None
    *parents, last = key.split(".")
    node: Any = raw
    for part in parents:
        node = _child(node, part, item)
    if isinstance(node, list):
        _child(node, last, item)
        node[int(last)] = value
    elif isinstance(node, dict):
        node[last] = value
    else:
        raise ConfigError(
            f"override {cut(repr(item))}: {cut('.'.join(parents))} is a value, not a block"
        )


def _child(node: Any, part: str, item: str) -> Any:
    if isinstance(node, list):
        if not re.fullmatch("[0-9]{1,9}", part) or int(part) >= len(node):
            raise ConfigError(
                f"override {cut(repr(item))}: {cut(part)!r} is not an index into {len(node)} items"
            )
        return node[int(part)]
    if not isinstance(node, dict):
        raise ConfigError(f"override {cut(repr(item))}: block {cut(part)!r} not found")
    if node.get(part) is None:
        node[part] = {}
    return node[part]


def _named_code(config: TeacherConfig | StudentConfig) -> list[str]:
    """Return the Python functions that a config uses as networks and losses, each once."""
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


def _print_named_code(file: str, config: TeacherConfig | StudentConfig) -> None:
    """Print, once per process, which Python code a config runs, if any."""
    if code := _named_code(config):
        _print_once(f"note: {file} runs Python code: {', '.join(code)}")


@functools.cache
def _print_once(line: str) -> None:
    print(one_line(line, longest=1000), file=sys.stderr)
