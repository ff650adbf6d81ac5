"""The identity of a cache: everything that decides its bytes, and nothing else.

Left out on purpose: paths, batch size, workers, device, the number of views, the list of taps.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard, cast

from teach_once.runtime.safe.safe_read import open_regular
from teach_once.runtime.safe.text import one_line

# Raise it when the same settings would give other bytes: other pixels of a view, other statistics
# of a recalibrated teacher, another rounding. Every cache is then made anew.
IDENTITY_VERSION = 1
PARENT = "parent_sha256"
_SHA256_DIGITS = 64
CONVERTED_FROM = "converted_from"  # the types that a cache's records had before, see store.convert
Identity = dict[str, Any]
EVALUATION = "evaluation"  # the folder of the caches inside a cache


def cache_identity(views: Mapping[str, Any], teacher: Mapping[str, Any]) -> Identity:
    """Join what `views.identity.views_identity` and `nets.teacher.identity.teacher_identity` give.

    An identity whose weights_sha256 is None or incomplete, because the weights file is missing,
    can be compared with a cache's but names none.
    """
    return {"identity_version": IDENTITY_VERSION, **views, **teacher}


def evaluation_identity(
    parent: Mapping[str, Any], split_digest: str, transform: Mapping[str, Any]
) -> Identity:
    """Return the identity of an evaluation cache: one view of a split, inside its parent.

    parent: the identity of the cache around it, which decides the teacher and the taps' types.
    transform: the evaluation transform as plain data.
    """
    return {
        "identity_version": IDENTITY_VERSION,
        PARENT: identity_sha256(parent),
        "split_digest": split_digest,
        "transform": dict(transform),
    }


def field_of(identity: Mapping[str, Any], *keys: str) -> Any:
    """The value at these keys; None where there is none: an identity may come from a stranger."""
    value: Any = identity
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def with_weights(identity: Identity, sha256: str | None) -> Identity:
    """The same identity with other weights."""
    return {**identity, "teacher": {**identity["teacher"], "weights_sha256": sha256}}


def knows_weights(identity: Identity) -> bool:
    """Return True if the sha256 of the weights is known in full."""
    return len(identity["teacher"]["weights_sha256"] or "") == _SHA256_DIGITS


def with_weights_of(expected: Identity, other: Identity) -> Identity:
    """`expected`, completed with the weights of `other` where all that is known of its own agrees.

    An identity knows all digits of its weights' sha256, or the first ones, or none. What a cache
    was converted from is taken over too: a config does not say it.
    """
    if isinstance(origin := other.get(CONVERTED_FROM), dict) and CONVERTED_FROM not in expected:
        expected = {**expected, CONVERTED_FROM: origin}
    theirs = field_of(other, "teacher", "weights_sha256")
    known = expected["teacher"]["weights_sha256"] or ""
    if knows_weights(expected) or not (isinstance(theirs, str) and theirs.startswith(known)):
        return expected
    return with_weights(expected, theirs)


def canonical_json(value: Any) -> str:
    """One spelling per value: sorted keys, no spaces, ASCII, no NaN."""
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False
    )


def identity_sha256(identity: Mapping[str, Any]) -> str:
    return hashlib.sha256(canonical_json(identity).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """Hash a regular file's content. Raises BadFile, FileNotFoundError."""
    with open_regular(path, follow=True) as file:
        return hashlib.file_digest(cast(Any, file), "sha256").hexdigest()


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
    """(dotted key, value) of everything that is not a block."""
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


NAME_PATTERN = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"  # of a tap, or a stage
_RESERVED = {"labels", "preview", "sample_digest", "zarr.json"}

TAP_NAMES = "[A-Za-z0-9._-], of at most 64 characters, none of the store's own names"


def is_tap_name(name: str) -> bool:
    """Return True if a tap, and its folder, can be called so beside the arrays that every cache
    has.
    """
    return (
        re.fullmatch(NAME_PATTERN, name) is not None
        and ".." not in name
        and not name.endswith((".scale", ".class", ".rest"))
        and name not in _RESERVED
    )
