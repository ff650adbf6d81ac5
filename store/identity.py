"""The identity of a cache: everything that decides its bytes, and nothing else.

Left out on purpose: paths, batch size, workers, device, the number of views, the list of taps.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from runtime.reading import open_regular

FORMAT_VERSION = 1  # of every identity, and of manifests of caches whose logits are whole
CUT_VERSION = 2  # of the manifest of a cache whose logits are cut
_SHA256_DIGITS = 64
CONVERTED_FROM = "converted_from"  # the types that a cache's records had before, see store.convert
Identity = dict[str, Any]


def cache_identity(views: Mapping[str, Any], teacher: Mapping[str, Any]) -> Identity:
    """Join what `views.identity.views_identity` and `nets.identity.teacher_identity` give.

    An identity whose weights_sha256 is None or incomplete, because the weights file is missing,
    can be compared with a cache's but names none.
    """
    return {"format_version": FORMAT_VERSION, **views, **teacher}


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
    """Whether the sha256 of the weights is known in full."""
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
    """Of a regular file's content. Raises BadFile, FileNotFoundError."""
    with open_regular(path, follow=True) as file:
        return hashlib.file_digest(cast(Any, file), "sha256").hexdigest()
