"""Reads a config: YAML text, then `key.sub=value` overrides, then validation with all errors told.

Leaves out inheritance, includes and interpolation: a file says everything it means.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError

from configs.schema import StudentConfig, TeacherConfig, as_plain

CONFIG_DIR = Path(__file__).parent
TEACHER_PREFIX = "teacher."

Config = TypeVar("Config", TeacherConfig, StudentConfig)


class ConfigError(ValueError):
    """A config that cannot be used: what is wrong, at which key of which file."""


class _Loader(yaml.SafeLoader):
    """YAML 1.2 numbers and booleans: `1e-3` is a number, `no` is a string; keys must be unique."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, rx) for tag, rx in resolvers if not tag.endswith((":float", ":bool"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:\d+\.\d*|\.\d+)(?:[eE][-+]?\d+)?$|^[-+]?\d+[eE][-+]?\d+$"),
    list("-+.0123456789"),
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)


def _unique_mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    keys = [loader.construct_object(key, deep=True) for key, _ in node.value]
    repeated = sorted({str(key) for key in keys if keys.count(key) > 1})
    if repeated:
        line = node.start_mark.line + 1
        raise ConfigError(
            f"key {repeated[0]!r} stands twice in the block that begins at line {line}"
        )
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor("tag:yaml.org,2002:map", _unique_mapping)


def load_teacher(name_or_path: str | Path, overrides: Sequence[str] = ()) -> TeacherConfig:
    """Load `configs/teacher/NAME.yaml` or the file at a path; raises ConfigError."""
    return _load(TeacherConfig, "teacher", name_or_path, overrides)


def load_student(name_or_path: str | Path, overrides: Sequence[str] = ()) -> StudentConfig:
    """Load `configs/student/NAME.yaml` or the file at a path; raises ConfigError.

    Overrides that begin with `teacher.` are meant for the teacher's file: see `split_overrides`.
    """
    return _load(StudentConfig, "student", name_or_path, overrides)


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
        for item in overrides:
            _apply_override(raw, item)
    except ConfigError as error:
        raise ConfigError(f"{_shown(path)}: {error}") from None
    if "name" in raw:
        raise ConfigError(f"{_shown(path)}: name: the file's own name is the name; remove this key")
    try:
        return TypeAdapter(schema).validate_python({**raw, "name": path.stem})
    except ValidationError as error:
        lines = "\n".join(f"  {line}" for line in _error_lines(schema, error))
        raise ConfigError(f"{_shown(path)} cannot be used:\n{lines}") from None


def _find(kind: str, name_or_path: str) -> Path:
    path = Path(name_or_path)
    if path.suffix in (".yaml", ".yml"):
        if path.is_file():
            return path
        raise ConfigError(f"no file {path}")
    found = CONFIG_DIR / kind / f"{name_or_path}.yaml"
    if "/" not in name_or_path and found.is_file():
        return found
    names = available(kind)
    raise ConfigError(
        f"no {kind} config {name_or_path!r} in configs/{kind}{_did_you_mean(name_or_path, names)}; "
        f"there are: {', '.join(names)}"
    )


def _shown(path: Path) -> str:
    if path.is_relative_to(CONFIG_DIR):
        return f"configs/{path.relative_to(CONFIG_DIR)}"
    return str(path)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)  # a SafeLoader
    except yaml.YAMLError as error:
        raise ConfigError(f"not valid YAML: {error}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"not UTF-8 text: {error}") from None
    if not isinstance(raw, dict):
        raise ConfigError("expected a mapping of keys to values at the top")
    return raw


def _apply_override(raw: dict[str, Any], item: str) -> None:
    """Set one dotted key in place; numbers in it index lists, as in `methods.kd.0.weight=2`."""
    key, equals, text = item.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {item!r} is not of the form key.sub=value")
    try:
        value = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError:
        raise ConfigError(f"override {item!r}: the value is not valid YAML") from None
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
        raise ConfigError(f"override {item!r}: {'.'.join(parents)} is a value, not a block")


def _child(node: Any, part: str, item: str) -> Any:
    if isinstance(node, list):
        if not part.isdigit() or int(part) >= len(node):
            raise ConfigError(f"override {item!r}: {part!r} is not an index into {len(node)} items")
        return node[int(part)]
    if not isinstance(node, dict):
        raise ConfigError(f"override {item!r}: there is no block {part!r}")
    if node.get(part) is None:
        node[part] = {}
    return node[part]


def _error_lines(schema: type, error: ValidationError) -> list[str]:
    return [_error_line(schema, details) for details in error.errors(include_url=False)]


def _error_line(schema: type, details: Any) -> str:
    keys, owner = _resolve(schema, details["loc"])
    where = ".".join(str(key) for key in keys) or "(top)"
    if details["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        hint = _did_you_mean(str(keys[-1]), _field_names(owner))
        return f"{where}: unknown key{hint}"
    if details["type"] in ("missing", "missing_argument", "missing_keyword_only_argument"):
        return f"{where}: missing"
    message = details["msg"].removeprefix("Value error, ")
    value = details["input"]
    plain = isinstance(value, (str, int, float, bool, type(None)))
    return f"{where}: {message}" + (f" (found {value!r})" if plain else "")


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
    if dataclasses.is_dataclass(annotation):
        return [annotation]
    return [found for arg in get_args(annotation) for found in _dataclasses_in(arg)]


def _takes_any_key(annotation: Any) -> bool:
    return annotation is dict or any(_takes_any_key(arg) for arg in get_args(annotation))


def _tags(schema: Any) -> set[str]:
    hints = get_type_hints(schema)
    return {tag for key in ("type", "kind") if key in hints for tag in get_args(hints[key])}


def _field_names(schema: Any) -> list[str]:
    return [field.name for field in dataclasses.fields(schema)]


def _did_you_mean(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""
