"""Reads a config: YAML text, `key.sub=value` overrides, then validation that reports all errors.

Leaves out inheritance, includes and interpolation: a file says everything it means.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError

from configs.named_code import tell_of_code
from configs.paths import locate_paths, not_found
from configs.schema import Source, StudentConfig, TeacherConfig, as_plain
from configs.yaml_subset import YamlError, parse_yaml
from runtime.errors import UserError, did_you_mean
from runtime.reading import BadFile, read_bounded
from runtime.text import one_line

CONFIG_DIR = Path(__file__).parent
_MOST_BYTES = 2**20  # of a file; the largest here has 3 kB
TEACHER_PREFIX = "teacher."

_MISSING = (
    "missing",
    "missing_argument",
    "missing_keyword_only_argument",
    "union_tag_not_found",
)
_NOT_A_BLOCK = ("dataclass_type", "model_attributes_type", "dict_type")

Config = TypeVar("Config", TeacherConfig, StudentConfig)


class ConfigError(UserError, ValueError):
    """A config that cannot be used: what is wrong, at which key of which file."""


def load_teacher(name_or_path: str | Path, overrides: Sequence[str] = ()) -> TeacherConfig:
    """Load `configs/teacher/NAME.yaml` or the file at a path; raises ConfigError."""
    return _load(TeacherConfig, "teacher", name_or_path, overrides)


def load_student(name_or_path: str | Path, overrides: Sequence[str] = ()) -> StudentConfig:
    """Load `configs/student/NAME.yaml` or the file at a path; raises ConfigError.

    Overrides that begin with `teacher.` are meant for the teacher's file: see `split_overrides`.
    """
    return _load(StudentConfig, "student", name_or_path, overrides)


def teachers_of(
    name_or_path: str, overrides: Sequence[str] | None, *, of_student: bool = True
) -> list[tuple[str, list[str]]]:
    """What `load_teacher` takes: the name or path of each teacher of a student, and its overrides.

    of_student: false: the name and the overrides are a teacher's already. Raises ConfigError.
    """
    if not of_student:
        return [(name_or_path, list(overrides or []))]
    own, teachers = split_overrides(overrides or [])
    config = load_student(name_or_path, own)
    return [(name, teachers) for name in config.teachers or (config.teacher,)]


def split_overrides(overrides: Iterable[str]) -> tuple[list[str], list[str]]:
    """Split a student's overrides into its own and those (`teacher.x=y`) for the teacher's file."""
    own: list[str] = []
    teachers: list[str] = []
    for item in overrides:
        if item.startswith(TEACHER_PREFIX):
            teachers.append(item.removeprefix(TEACHER_PREFIX))
        else:
            own.append(item)
    return own, teachers


def to_yaml(config: TeacherConfig | StudentConfig) -> str:
    """The resolved config, every default filled in, as YAML that loads back to the same config."""
    plain = as_plain(config)
    name = plain.pop("name")
    body = yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)
    return f"# {name}, as resolved\n{body}"


def available(kind: str) -> list[str]:
    """Names of the configs of one kind ("teacher" or "student"), sorted."""
    return sorted(path.stem for path in (CONFIG_DIR / kind).glob("*.yaml"))


def _load(
    schema: type[Config], kind: str, name_or_path: str | Path, overrides: Sequence[str]
) -> Config:
    path = _find(kind, str(name_or_path))
    try:
        raw = _read_yaml(path)
        missing = locate_paths(raw, kind, path)
        for item in overrides:
            _apply_override(raw, item)
    except ConfigError as error:
        raise ConfigError(f"{_shown(path)}: {error}") from None
    if "name" in raw:
        raise ConfigError(f"{_shown(path)}: name: the file's own name is the name; remove this key")
    if "source" in raw:
        raise ConfigError(f"{_shown(path)}: source: unknown key")
    places = not_found(missing, raw, path)
    source = Source(str(name_or_path), tuple(overrides), places)
    try:
        config = TypeAdapter(schema).validate_python({**raw, "name": path.stem, "source": source})
    except ValidationError as error:
        raise _unusable(path, _error_lines(schema, error)) from None
    for key in (key for key in places if kind == "student" and key.startswith("teacher")):
        raise _unusable(path, [f"{key}: there is no file {places[key]}"])
    if not path.resolve().is_relative_to(CONFIG_DIR):
        tell_of_code(_shown(path), config)
    return config


def _unusable(path: Path, lines: Sequence[str]) -> ConfigError:
    return ConfigError("\n  ".join([f"{_shown(path)} cannot be used:", *lines]))


def refuse_missing_data(config: TeacherConfig, *, packing: bool = False) -> None:
    """Raise ConfigError where the images that a config's file names are in no folder it means.

    packing: for the program that packs them, which needs the original.
    """
    source, dataset = config.source or Source(config.name), config.dataset
    if dataset.packed_as is not None and not packing:
        if not os.path.lexists(dataset.packed_as):
            raise ConfigError(
                f"dataset.packed: the images have not been packed; there is no {dataset.packed_as}",
                fix=shlex.join(["python", "-m", "views", "pack", source.name, *source.overrides]),
            )
        return
    for key, places in source.not_found.items():
        if key.startswith("dataset.") and key != "dataset.packed" and dataset.must_exist:
            raise ConfigError(f"{key}: there is no {places}", fix=f"set {key}=PATH")


def _find(kind: str, name_or_path: str) -> Path:
    path = Path(name_or_path)
    if path.suffix in (".yaml", ".yml"):
        if _is_there(path):
            return path
        raise ConfigError(f"no file {one_line(path)}")
    found = CONFIG_DIR / kind / f"{name_or_path}.yaml"
    if "/" not in name_or_path and _is_there(found):
        return found
    names = available(kind)
    hint = did_you_mean(name_or_path, names)
    raise ConfigError(
        f"no {kind} config {_cut(repr(name_or_path))} in configs/{kind}{hint or '.'} "
        f"Known: {', '.join(names)}"
    )


def _is_there(path: Path) -> bool:
    """Whether there is something of that name, be it a link that leads nowhere."""
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
        raw = parse_yaml(read_bounded(path, _MOST_BYTES, follow=True).decode("utf-8"))
    except BadFile as error:
        raise ConfigError(error.what) from None
    except YamlError as error:
        raise ConfigError(str(error)) from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"not UTF-8 text: {error}") from None
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}") from None
    if not isinstance(raw, dict):
        raise ConfigError("expected a mapping of keys to values at the top")
    return raw


def _apply_override(raw: dict[str, Any], item: str) -> None:
    """Set one dotted key in place; numbers in it index lists, as in `methods.kd.0.weight=2`."""
    key, equals, text = item.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {_cut(repr(item))} is not of the form key.sub=value")
    try:
        value = parse_yaml(text)
    except YamlError as error:
        reason = str(error).removeprefix("not valid YAML: ").splitlines()[0]
        raise ConfigError(
            f"override {_cut(repr(item))}: the value is not valid YAML: {reason}"
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
            f"override {_cut(repr(item))}: {_cut('.'.join(parents))} is a value, not a block"
        )


def _child(node: Any, part: str, item: str) -> Any:
    if isinstance(node, list):
        if not re.fullmatch("[0-9]{1,9}", part) or int(part) >= len(node):
            raise ConfigError(
                f"override {_cut(repr(item))}: {_cut(part)!r} is not an index into {len(node)} "
                f"items"
            )
        return node[int(part)]
    if not isinstance(node, dict):
        raise ConfigError(f"override {_cut(repr(item))}: there is no block {_cut(part)!r}")
    if node.get(part) is None:
        node[part] = {}
    return node[part]


def _error_lines(schema: type, error: ValidationError) -> list[str]:
    """One line per key, its dotted path first."""
    every = error.errors(include_url=False)
    told = [details for details in every if not _only_follows(details, every)]
    found: dict[str, list[Any]] = {}
    for details in told:
        found.setdefault(_where(schema, details), []).append(details)
    return [f"{where}: {_problem(schema, group)}" for where, group in found.items()]


def _only_follows(details: Any, every: Sequence[Any]) -> bool:
    """Whether a list is called empty because its items are wrong, which other lines say."""
    depth = len(details["loc"])
    return details["type"] == "too_short" and any(
        len(other["loc"]) > depth and other["loc"][:depth] == details["loc"] for other in every
    )


def _where(schema: type, details: Any) -> str:
    keys = [*_resolve(schema, details["loc"])[0]]
    if details["type"].startswith("union_tag"):
        keys.append(details["ctx"]["discriminator"].strip("'"))
    return ".".join(_cut(str(key)) for key in keys) or "(top)"


def _problem(schema: type, group: Sequence[Any]) -> str:
    """What is wrong with one key; where it may be of several types, none of which fits, all."""
    details = group[0]
    if details["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        keys, owner = _resolve(schema, details["loc"])
        return f"unknown key{did_you_mean(str(keys[-1]), _field_names(owner))}"
    if details["type"] in _MISSING:
        return "missing"
    start = "Input should be "
    messages = [_message(each) for each in group]
    if all(message.startswith(start) for message in messages):
        messages = [start + " or ".join(message.removeprefix(start) for message in messages)]
    return "; ".join(messages) + _value_found(details)


def _message(details: Any) -> str:
    """pydantic's words, or ours where they speak of Python instead of YAML."""
    if details["type"] in _NOT_A_BLOCK:
        return "Input should be a block of keys"
    if details["type"] == "tuple_type":
        return "Input should be a list"
    if details["type"] == "too_short":
        return "must not be empty"
    if details["type"] == "union_tag_invalid":
        return f"Input should be one of {details['ctx']['expected_tags']}"
    return str(details["msg"]).removeprefix("Value error, ")


def _value_found(details: Any) -> str:
    value = details["input"]
    if details["type"] == "union_tag_invalid":
        value = details["ctx"]["tag"]
    if not isinstance(value, (str, int, float, bool, type(None))):
        return ""
    hint = ""
    if details["type"] == "int_type" and re.fullmatch("[-+]?[0-9_]*[0-9]", str(value)):
        digits = str(value).replace("_", "")
        hint = f"; write {int(digits)}" if len(digits) < 20 else "; too many digits"
    return f" (found {_cut(repr(value))}){hint}"


def _cut(text: str, most: int = 80) -> str:
    return text if len(text) <= most else f"{text[: most - 3]}..."


def _resolve(schema: type, loc: Sequence[Any]) -> tuple[list[Any], Any]:
    """Walk `loc` through the dataclasses: the real keys (union tags dropped) and the last owner."""
    owner: Any = schema
    keys: list[Any] = []
    annotation: Any = schema
    for part in loc:
        classes = _dataclasses_in(annotation)
        tagged = [c for c in classes if part in _tags(c)]
        if tagged and len(classes) > 1:
            annotation = tagged[0]
            continue
        owners = [c for c in classes if part in _field_names(c)]
        if owners:
            owner, annotation = owners[0], get_type_hints(owners[0], include_extras=True)[part]
        elif classes:
            owner = classes[0]
        elif not isinstance(part, int) and not _takes_any_key(annotation):
            continue  # the name of a branch of a union of plain types
        keys.append(part)
    return keys, owner


def _dataclasses_in(annotation: Any) -> list[Any]:
    if isinstance(annotation, type) and dataclasses.is_dataclass(annotation):
        return [annotation]
    return [found for arg in get_args(annotation) for found in _dataclasses_in(arg)]


def _takes_any_key(annotation: Any) -> bool:
    return annotation is dict or any(_takes_any_key(arg) for arg in get_args(annotation))


def _tags(schema: Any) -> set[str]:
    hints = get_type_hints(schema)
    return {tag for key in ("type", "kind") if key in hints for tag in get_args(hints[key])}


def _field_names(schema: Any) -> list[str]:
    return [field.name for field in dataclasses.fields(schema)]
