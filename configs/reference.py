"""Generate docs/reference/config.md: every key of teacher and student files, from the schema.

Types and defaults are those that pydantic checks. The meaning of a key is its attribute docstring
in `configs/schema/`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from pydantic import ConfigDict, TypeAdapter, with_config

from teach_once.configs import schema
from teach_once.configs.schema.losses import BUILT_IN_LOSSES

JsonSchema = Mapping[str, Any]

_LARGEST_SAID = 2**31 - 2  # larger limits only catch typing errors and are not printed


def type_in_words(schema: JsonSchema) -> str:
    """Describe a type in Markdown: `integer ≥ 1`, `list of strings or null`, "block"."""
    if "anyOf" in schema:
        return " or ".join(type_in_words(branch) for branch in schema["anyOf"])
    if "oneOf" in schema or "$ref" in schema:
        return "block"
    if "const" in schema or "enum" in schema:
        return _one_of(schema.get("enum", [schema.get("const")]))
    if schema["type"] == "array":
        return _list(schema)
    if schema["type"] == "object":
        return f"{type_in_words(schema['additionalProperties'])} per name"
    if schema["type"] == "boolean":
        return _one_of([True, False])
    return "`null`" if schema["type"] == "null" else f"{schema['type']}{_range(schema)}"


def default_in_words(schema: JsonSchema, is_required: bool) -> str:
    """Format a default as YAML, or "required"; `{}` for a block whose keys all have defaults."""
    if is_required:
        return "required"
    default = schema.get("default", {})
    if isinstance(default, Mapping):
        return f"`{{type: {default['type']}}}`" if "type" in default else "`{}`"
    return _as_yaml(default)


def _as_yaml(value: object) -> str:
    return f"`{value if isinstance(value, str) else json.dumps(value)}`"


def _one_of(values: list[Any]) -> str:
    *others, last = map(_as_yaml, values)
    return f"{', '.join(others)} or {last}" if others else last


def _list(schema: JsonSchema) -> str:
    if "prefixItems" in schema:
        count, item = len(schema["prefixItems"]), schema["prefixItems"][0]
        return f"list of {count} {_plural(type_in_words(item))}"
    return f"list of {_plural(type_in_words(schema['items']))}"


def _plural(words: str) -> str:
    noun, _, rest = words.partition(" ")
    return f"{noun}s {rest}".rstrip()


def _range(schema: JsonSchema) -> str:
    least, most = schema.get("minimum"), schema.get("maximum")
    if least is not None and most is not None and most <= _LARGEST_SAID:
        return f" from {least} to {most}"
    limits = {
        "≥": least,
        ">": schema.get("exclusiveMinimum"),
        "≤": most,
        "<": schema.get("exclusiveMaximum"),
    }
    said = (
        f" {sign} {limit}"
        for sign, limit in limits.items()
        if limit is not None and limit <= _LARGEST_SAID
    )
    return ",".join(said)


_HEAD = """\
# Every key

Written by `python -m configs reference > docs/reference/config.md`.

A file of `configs/teacher/` defines a cache; a file of `configs/student/` defines a run. On the
command line, a key is set by its dotted path: `training.epochs=10`. Commands for students also take
keys of the teacher's file, after `teacher.`: `teacher.dataset.max_per_class=200`. An unknown key is
an error.
"""
_LOSSES = """\
## Losses

The options of a built-in loss are keys of its term: `{loss: kd, weight: 0.9, temperature: 4}`.

| loss | options | what it computes |
|---|---|---|"""
_NOT_KEYS = ("name", "source")  # set from the file's name and the command line
_TAG = "type"  # the key that selects a block's variant


def reference() -> str:
    """Return the page as Markdown."""
    teacher = _File(schema.TeacherConfig).sections("configs/teacher/NAME.yaml")
    student = _File(schema.StudentConfig).sections("configs/student/NAME.yaml")
    return "\n".join([_HEAD, *teacher, *student, _LOSSES, *_loss_rows(), ""])


def meanings(block: type) -> dict[str, str]:
    """Return {key: attribute docstring} of a schema's dataclass, inherited keys first."""
    texts: dict[str, str] = {}
    for each in reversed(block.__mro__):
        if dataclasses.is_dataclass(each):
            texts |= _own_meanings(each)
    return texts


def _own_meanings(block: type) -> dict[str, str]:
    """Return the docstrings of keys that a block does not inherit.

    Pydantic reads attribute docstrings when it builds a class. For the blocks themselves that would
    slow the start of every command by a tenth of a second, and it omits inherited keys. Therefore
    it reads them from a substitute class with the block's module and name.
    """
    keys = [(name, object) for name in block.__annotations__]
    stand_in = dataclasses.make_dataclass(block.__name__, keys)
    stand_in.__module__ = block.__module__
    documented = with_config(ConfigDict(use_attribute_docstrings=True))(stand_in)
    described = TypeAdapter(documented).json_schema()["properties"]
    return {
        key: _on_one_line(value["description"])
        for key, value in described.items()
        if "description" in value
    }


class _File:
    """One kind of file: its blocks from the top down, each once."""

    def __init__(self, root: type) -> None:
        whole = TypeAdapter(root).json_schema()
        self._root = root.__name__
        self._blocks: dict[str, JsonSchema] = {**whole["$defs"], self._root: whole}
        self._described: set[str] = set()

    def sections(self, file: str) -> Iterator[str]:
        """Yield the lines of the page for this kind of file."""
        keys = _without(self._blocks[self._root]["properties"], _NOT_KEYS)
        yield from (f"## `{file}`", "", *self._table("", self._root, keys))
        yield from self._sections_below("", keys)

    def _sections_below(self, prefix: str, keys: JsonSchema) -> Iterator[str]:
        for key, value in keys.items():
            names = [name for name in _blocks_in(value) if name not in self._described]
            self._described.update(names)
            if names:
                yield from self._section(prefix + key + _path_of_items(value), names)

    def _section(self, path: str, names: list[str]) -> Iterator[str]:
        """Yield a block: its common keys, the keys of each variant, then nested blocks."""
        prefix, common = f"{path}.", self._common_keys(names)
        variants = names if len(names) > 1 else []
        yield from (f"### `{path}`", "")
        if common:
            heading = "Common to all:" if variants else self._description(names[0])
            yield from (heading, "", *self._table(prefix, names[0], common))
        for name in variants:
            yield from self._variant(prefix, name, common)
        for name in names:
            yield from self._sections_below(prefix, self._blocks[name]["properties"])

    def _variant(self, prefix: str, name: str, common: JsonSchema) -> Iterator[str]:
        own = _without(self._blocks[name]["properties"], common)
        yield from (f"#### `{_TAG}`: {type_in_words(own[_TAG])}", "", self._description(name), "")
        yield from self._table(prefix, name, _without(own, [_TAG]))

    def _common_keys(self, names: list[str]) -> JsonSchema:
        first, *others = (self._blocks[name]["properties"] for name in names)
        return {
            key: value
            for key, value in first.items()
            if all(other.get(key) == value for other in others)
        }

    def _description(self, name: str) -> str:
        return _on_one_line(self._blocks[name]["description"])

    def _table(self, prefix: str, name: str, keys: JsonSchema) -> Iterator[str]:
        """Yield a table of the given keys of a block, in the order of the source."""
        if not keys:
            return
        texts, required = meanings(getattr(schema, name)), self._blocks[name].get("required", ())
        yield from ("| key | type | default | meaning |", "|---|---|---|---|")
        for key in sorted(keys, key=list(texts).index):
            default = default_in_words(keys[key], key in required)
            yield _row(f"`{prefix}{key}`", type_in_words(keys[key]), default, texts[key])
        yield ""


def _loss_rows() -> Iterator[str]:
    for name, block in BUILT_IN_LOSSES.items():
        options = TypeAdapter(block).json_schema()["properties"].items()
        cells = (_option_in_words(key, option) for key, option in options)
        yield _row(f"`{name}`", "<br>".join(cells), _on_one_line(block.__doc__ or ""))


def _option_in_words(name: str, option: JsonSchema) -> str:
    return f"`{name}`: {type_in_words(option)}, default `{json.dumps(option['default'])}`"


def _row(*cells: str) -> str:
    escaped = (cell.replace("|", "\\|") for cell in cells)
    return f"| {' | '.join(escaped)} |"


def _blocks_in(value: JsonSchema) -> list[str]:
    """Return the names of blocks that a key may contain, directly, in lists or by name."""
    if "$ref" in value:
        return [value["$ref"].removeprefix("#/$defs/")]
    inner = [*value.get("anyOf", ()), *value.get("oneOf", ())]
    inner += [value[key] for key in ("items", "additionalProperties") if key in value]
    return [name for each in inner for name in _blocks_in(each)]


def _path_of_items(value: JsonSchema) -> str:
    """Return the suffix of the path to blocks inside a key: name and index, for named lists."""
    return ".NAME.N" if value.get("type") == "object" else ""


def _without(keys: JsonSchema, left_out: Iterable[str]) -> JsonSchema:
    return {key: value for key, value in keys.items() if key not in left_out}


def _on_one_line(text: str) -> str:
    return " ".join(text.split())
