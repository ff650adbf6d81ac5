"""The type and default of a key in words, from its JSON schema."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

JsonSchema = Mapping[str, Any]

_LARGEST_SAID = 2**31 - 2  # larger limits only catch typing errors


def type_in_words(schema: JsonSchema) -> str:
    """`integer ≥ 1`, `list of strings or null`, ... as Markdown; "block" for a block of keys."""
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
    """As YAML has it, or "required"; a block whose keys all have defaults is `{}`."""
    if is_required:
        return "required"
    default = schema.get("default", {})
    if isinstance(default, Mapping):
        return f"`{{kind: {default['kind']}}}`" if "kind" in default else "`{}`"
    return _as_yaml(default)


def _as_yaml(value: Any) -> str:
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
