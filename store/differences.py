"""Where two identities differ, field by field."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

from runtime.text import one_line
from store.identity import canonical_json

_LONGEST = 24  # characters of a value in a message
_MOST_TOLD = 20
_UNSET = canonical_json(None), None  # a key that is missing is as one that is null


@dataclass(frozen=True)
class Difference:
    """One leaf that differs. field: its dotted key. None means a missing key."""

    field: str
    expected: Any
    found: Any

    def __str__(self) -> str:
        expected, found = short_repr(self.expected), short_repr(self.found)
        return f"{one_line(self.field)}: expected {expected}, found {found}"


def differences(expected: Mapping[str, Any], found: Mapping[str, Any]) -> list[Difference]:
    """Every leaf that differs, in the order of the keys."""
    return list(_differences(expected, found, ""))


def _differences(
    expected: Mapping[str, Any], found: Mapping[str, Any], prefix: str
) -> Iterator[Difference]:
    for key in sorted({*expected, *found}):
        ours, theirs = expected.get(key), found.get(key)
        if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
            yield from _differences(ours, theirs, f"{prefix}{key}.")
        elif _holds_blocks(ours) and _holds_blocks(theirs):
            length = max(len(ours), len(theirs))
            one, other = (_numbered(each, length) for each in (ours, theirs))
            yield from _differences(one, other, f"{prefix}{key}.")
        elif canonical_json(ours) != canonical_json(theirs):
            yield Difference(f"{prefix}{key}", ours, theirs)


def told(found: Sequence[object]) -> list[str]:
    """A line each, and how many more there are where a file states more than can be read."""
    more = len(found) - _MOST_TOLD
    return [*map(str, found[:_MOST_TOLD]), *([f"and {more:,} more"] if more > 0 else [])]


def leaves(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of everything that is no block."""
    if isinstance(value, Mapping) and value:
        blocks = value
    elif isinstance(value, list) and _holds_blocks(value):
        blocks = _numbered(value)
    else:
        yield prefix.removesuffix("."), value
        return
    for key, item in blocks.items():
        yield from leaves(item, f"{prefix}{key}.")


def distinguishing(identities: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Return, for each identity, `key=value` of its leaves that are not the same in all of them.

    A leaf that only others have counts too: it is "not set".
    """
    every = [{key: (canonical_json(value), value) for key, value in leaves(o)} for o in identities]
    keys = sorted({key for each in every for key in each})
    telling = [key for key in keys if len({each.get(key, _UNSET)[0] for each in every}) > 1]
    return [[f"{key}={short_repr(each.get(key, _UNSET)[1])}" for key in telling] for each in every]


def _holds_blocks(value: Any) -> TypeGuard[Sequence[Any]]:
    return isinstance(value, list | tuple) and any(isinstance(item, Mapping) for item in value)


def _numbered(items: Sequence[Any], length: int = 0) -> dict[str, Any]:
    """By position; empty blocks fill it up to `length`."""
    filled = [*items, *[{}] * (length - len(items))]
    return {str(number): item for number, item in enumerate(filled)}


def short_repr(value: Any) -> str:
    """Short enough for a line: both ends of a digest. None is a key that is missing or null."""
    text = "not set" if value is None else repr(value)
    return one_line(text if len(text) <= _LONGEST else f"{text[:17]}...{text[-4:]}")
