"""The identity of a cache: the settings that determine its bytes, and nothing else.

Not included: paths, batch size, workers, device, the number of views, the list of taps.
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

# Increase it when the same settings give other bytes (pixels of a view, statistics of a
# recalibrated teacher, rounding). All existing caches then become invalid.
IDENTITY_VERSION = 1
PARENT = "parent_sha256"
_SHA256_DIGITS = 64
CONVERTED_FROM = "converted_from"  # dtypes before the conversion, see store.move.convert
Identity = dict[str, Any]
EVALUATION = "evaluation"  # folder of the evaluation caches inside a cache


def cache_identity(views: Mapping[str, Any], teacher: Mapping[str, Any]) -> Identity:
    """Join the identities of `views.identity.views_identity` and `nets.teacher.identity`.

    If the weights file is missing, weights_sha256 is None or incomplete. Such an identity can be
    compared with a cache's, but does not name a cache.
    """
    return {"identity_version": IDENTITY_VERSION, **views, **teacher}


def evaluation_identity(
    parent: Mapping[str, Any], split_digest: str, transform: Mapping[str, Any]
) -> Identity:
    """Return the identity of an evaluation cache: one view of a split, inside its parent.

    parent: identity of the enclosing cache, which determines the teacher and the taps' types.
    transform: the evaluation transform as plain data.
    """
    return {
        "identity_version": IDENTITY_VERSION,
        PARENT: identity_sha256(parent),
        "split_digest": split_digest,
        "transform": dict(transform),
    }


def field_of(identity: Mapping[str, Any], *keys: str) -> Any:
    """Return the value at these nested keys; None if a key is missing, as in a forged identity."""
    value: Any = identity
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def with_weights(identity: Identity, sha256: str | None) -> Identity:
    """Return the identity with other weights."""
    return {**identity, "teacher": {**identity["teacher"], "weights_sha256": sha256}}


def knows_weights(identity: Identity) -> bool:
    """Return True if the identity contains the full sha256 of the weights."""
    return len(identity["teacher"]["weights_sha256"] or "") == _SHA256_DIGITS


def with_weights_of(expected: Identity, other: Identity) -> Identity:
    """Return `expected` with the weights of `other` if all known digits of its own agree.

    An identity contains all digits of the weights' sha256, or the first ones, or none. The origin
    of a converted cache is copied too, because no config contains it.
    """
    if isinstance(origin := other.get(CONVERTED_FROM), dict) and CONVERTED_FROM not in expected:
        expected = {**expected, CONVERTED_FROM: origin}
    theirs = field_of(other, "teacher", "weights_sha256")
    known = expected["teacher"]["weights_sha256"] or ""
    if knows_weights(expected) or not (isinstance(theirs, str) and theirs.startswith(known)):
        return expected
    return with_weights(expected, theirs)


def canonical_json(value: Any) -> str:
    """Encode a value in its only spelling: sorted keys, no spaces, ASCII, no NaN."""
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False
    )


def identity_sha256(identity: Mapping[str, Any]) -> str:
    return hashlib.sha256(canonical_json(identity).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """Hash a file's content. Raises BadFile if it is not a regular file, FileNotFoundError."""
    with open_regular(path, follow=True) as file:
        return hashlib.file_digest(cast(Any, file), "sha256").hexdigest()


_LONGEST = 24  # maximum length of a value in a message
_MOST_TOLD = 20
_UNSET = canonical_json(None), None  # a missing key is equal to null


@dataclass(frozen=True)
class Difference:
    """One leaf that differs. field: its dotted key. expected, found: None if the key is missing."""

    field: str
    expected: Any
    found: Any

    def __str__(self) -> str:
        expected, found = short_repr(self.expected), short_repr(self.found)
        return f"{one_line(self.field)}: expected {expected}, found {found}"


def differences(expected: Mapping[str, Any], found: Mapping[str, Any]) -> list[Difference]:
    """Return every leaf that differs, in the order of the keys."""
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
    """Format a line per item; after the first few, only the number of the others."""
    more = len(found) - _MOST_TOLD
    return [*map(str, found[:_MOST_TOLD]), *([f"and {more:,} more"] if more > 0 else [])]


def leaves(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) of everything that is not a block."""
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
    """Return for each identity `key=value` of the leaves that differ between the identities.

    A leaf that is missing in some identities is "not set" there.
    """
    every = [{key: (canonical_json(value), value) for key, value in leaves(o)} for o in identities]
    keys = sorted({key for each in every for key in each})
    telling = [key for key in keys if len({each.get(key, _UNSET)[0] for each in every}) > 1]
    return [[f"{key}={short_repr(each.get(key, _UNSET)[1])}" for key in telling] for each in every]


def _holds_blocks(value: Any) -> TypeGuard[Sequence[Any]]:
    return isinstance(value, list | tuple) and any(isinstance(item, Mapping) for item in value)


def _numbered(items: Sequence[Any], length: int = 0) -> dict[str, Any]:
    """Return {position: item}, padded with empty blocks up to `length`."""
    filled = [*items, *[{}] * (length - len(items))]
    return {str(number): item for number, item in enumerate(filled)}


def short_repr(value: Any) -> str:
    """Format a value in one short line: both ends of a digest, "not set" for None."""
    text = "not set" if value is None else repr(value)
    return one_line(text if len(text) <= _LONGEST else f"{text[:17]}...{text[-4:]}")


NAME_PATTERN = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"  # name of a tap or a stage
_RESERVED = {"labels", "preview", "sample_digest", "zarr.json"}

TAP_NAMES = "[A-Za-z0-9._-], of at most 64 characters, none of the store's own names"


def is_tap_name(name: str) -> bool:
    """Return True if a tap and its folder may have this name next to a cache's own arrays."""
    return (
        re.fullmatch(NAME_PATTERN, name) is not None
        and ".." not in name
        and not name.endswith((".scale", ".class", ".rest"))
        and name not in _RESERVED
    )
