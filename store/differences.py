"""Where two identities differ, field by field."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from store.identity import canonical_json

_LONGEST = 24  # characters of a value in a message


@dataclass(frozen=True)
class Difference:
    """One leaf that differs. field: its dotted key. None stands for a missing key."""

    field: str
    expected: Any
    found: Any

    def __str__(self) -> str:
        return f"{self.field}: expected {short_repr(self.expected)}, found {short_repr(self.found)}"


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
        elif canonical_json(ours) != canonical_json(theirs):
            yield Difference(f"{prefix}{key}", ours, theirs)


def short_repr(value: Any) -> str:
    """Short enough for a line: both ends of a digest."""
    text = repr(value)
    return text if len(text) <= _LONGEST else f"{text[:17]}...{text[-4:]}"
