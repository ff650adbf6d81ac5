"""Convert pydantic's errors to messages, one line per key, beginning with its dotted path."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any, get_args, get_type_hints

from pydantic import ValidationError

from teach_once.runtime.command.program import program_text
from teach_once.runtime.errors import did_you_mean

_MOST_LISTED = 8  # keys in a message
_MISSING = (
    "missing",
    "missing_argument",
    "missing_keyword_only_argument",
    "union_tag_not_found",
)
_NOT_A_BLOCK = ("dataclass_type", "model_attributes_type", "dict_type")


def error_lines(schema: type, error: ValidationError) -> list[str]:
    """Return one line per key, beginning with its dotted path."""
    every = error.errors(include_url=False)
    told = [details for details in every if not _only_follows(details, every)]
    found: dict[str, list[Any]] = {}
    for details in told:
        found.setdefault(_where(schema, details), []).append(details)
    return [f"{where}: {_problem(schema, group)}" for where, group in found.items()]


def _only_follows(details: Any, every: Sequence[Any]) -> bool:
    """Return True if a list is reported as empty only because its items are invalid."""
    depth = len(details["loc"])
    return details["type"] == "too_short" and any(
        len(other["loc"]) > depth and other["loc"][:depth] == details["loc"] for other in every
    )


def _where(schema: type, details: Any) -> str:
    keys = [*_resolve(schema, details["loc"])[0]]
    if details["type"].startswith("union_tag"):
        keys.append(details["ctx"]["discriminator"].strip("'"))
    return ".".join(cut(str(key)) for key in keys) or "(top)"


def _problem(schema: type, group: Sequence[Any]) -> str:
    """Describe the fault of one key; for a union, the faults of all its types."""
    details = group[0]
    if details["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        keys, owner = _resolve(schema, details["loc"])
        known = field_names(owner)
        near = did_you_mean(str(keys[-1]), known, most=3)
        all_keys = f"the keys here are {', '.join(known)}"
        if len(known) > _MOST_LISTED:
            all_keys = f"{program_text('configs')} reference lists all keys"
        return "unknown key" + (near or f"; {all_keys}")
    if details["type"] == "union_tag_not_found":
        return f"missing; expected one of {', '.join(_types_at(schema, details['loc']))}"
    if details["type"] in _MISSING:
        return "missing"
    start = "Input should be "
    messages = [_message(each) for each in group]
    if all(message.startswith(start) for message in messages):
        messages = [start + " or ".join(message.removeprefix(start) for message in messages)]
    return "; ".join(messages) + _value_found(details)


def _message(details: Any) -> str:
    """Return pydantic's message, or a message in terms of YAML instead of Python."""
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
    return f" (found {cut(repr(value))}){hint}"


def cut(text: str, most: int = 80) -> str:
    """Return the text, truncated if it is long."""
    return text if len(text) <= most else f"{text[: most - 3]}..."


def _resolve(schema: type, loc: Sequence[Any]) -> tuple[list[Any], Any]:
    """Walk `loc` through the dataclasses; returns the keys, without union tags, and the owner."""
    owner: Any = schema
    keys: list[Any] = []
    annotation: Any = schema
    for part in loc:
        classes = _dataclasses_in(annotation)
        tagged = [c for c in classes if part in _tags(c)]
        if tagged and len(classes) > 1:
            annotation = tagged[0]
            continue
        owners = [c for c in classes if part in field_names(c)]
        if owners:
            owner, annotation = owners[0], get_type_hints(owners[0], include_extras=True)[part]
        elif classes:
            owner = classes[0]
        elif not isinstance(part, int) and not _takes_any_key(annotation):
            continue  # a branch of a union of plain types
        keys.append(part)
    return keys, owner


def _dataclasses_in(annotation: Any) -> list[Any]:
    if isinstance(annotation, type) and dataclasses.is_dataclass(annotation):
        return [annotation]
    return [found for arg in get_args(annotation) for found in _dataclasses_in(arg)]


def _takes_any_key(annotation: Any) -> bool:
    return annotation is dict or any(_takes_any_key(arg) for arg in get_args(annotation))


def _tags(schema: Any) -> tuple[str, ...]:
    return get_args(get_type_hints(schema).get("type"))


def _types_at(schema: type, loc: Sequence[Any]) -> list[str]:
    """Return the values of `type` of the union at `loc`."""
    keys, owner = _resolve(schema, loc)
    variants = _dataclasses_in(get_type_hints(owner)[keys[-1]])
    return [tag for variant in variants for tag in _tags(variant)]


def field_names(schema: Any) -> list[str]:
    """Return the keys of a block."""
    return [field.name for field in dataclasses.fields(schema)]
