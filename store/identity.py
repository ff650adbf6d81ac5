"""The identity of a cache: everything that decides its bytes, and nothing else.

Left out on purpose: paths, batch size, workers, device, the number of views, the list of taps.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

FORMAT_VERSION = 1
BN_VERSION = 2  # raise it when recalibration would give other statistics
_SHA256_DIGITS = 64
Identity = dict[str, Any]


def cache_identity(
    config: Mapping[str, Any],
    *,
    dataset_digest: str,
    augment_version: int,
    stages: Mapping[str, str],
    weights_sha256: str | None,
    source: Mapping[str, str | None] | None = None,
    dataset_type: str | None = None,
    limit_cuts: bool = True,
    has_stem: bool = True,
) -> Identity:
    """The identity that a teacher config (as plain dicts) describes.

    stages: tap name -> module name. weights_sha256 is None, or its first digits, where the
    weights are not at hand; such an identity can be compared with a cache's but names none.
    source: module -> sha256 of its file, for a network of the user's own; for any other there is no
    such key. dataset_type: of the dataset that a file was packed from; default: the config's.
    limit_cuts: whether dataset.limit leaves any sample out. has_stem: whether there is a choice of
    stems. Without, they are as unset.
    """
    dataset, teacher, taps = config["dataset"], config["teacher"], config["taps"]
    return {
        "format_version": FORMAT_VERSION,
        "dataset": {
            "type": dataset_type or dataset["type"],
            "split": "train",
            "limit": dataset["limit"] if limit_cuts else None,
            "validation_fraction": dataset["validation_fraction"],
            "digest": dataset_digest,
            "normalisation": dataset["normalisation"],
        },
        "views": {
            "augment": without_nulls(config["views"]["augment"]),
            "augment_version": augment_version,
            "seed": config["views"]["seed"],
        },
        "teacher": {
            "arch": teacher["arch"],
            "stem": teacher["stem"] if has_stem else "cifar",
            "stages": dict(stages),
            "weights_sha256": weights_sha256,
            **({"source": dict(source)} if source else {}),
            "bn": teacher["bn"],
            **({"bn_version": BN_VERSION} if teacher["bn"] == "recalibrated" else {}),
            "precision": teacher["precision"],
        },
        "taps": {"logits": taps["logits"], "means": taps["means"]},
    }


def with_weights(identity: Identity, sha256: str | None) -> Identity:
    """The same identity of other weights."""
    return {**identity, "teacher": {**identity["teacher"], "weights_sha256": sha256}}


def knows_weights(identity: Identity) -> bool:
    """Whether the sha256 of the weights is known in full."""
    return len(identity["teacher"]["weights_sha256"] or "") == _SHA256_DIGITS


def with_weights_of(expected: Identity, found: Identity) -> Identity:
    """`expected`, with the weights of `found` where it does not know its own and they may be these.

    Weights that are not at hand have a weights_sha256 of None, or the first digits of it.
    """
    theirs = found["teacher"]["weights_sha256"]
    known = expected["teacher"]["weights_sha256"] or ""
    if knows_weights(expected) or not str(theirs).startswith(known):
        return expected
    return with_weights(expected, theirs)


def without_nulls(block: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that are off are no part of an identity: a new one leaves old caches valid."""
    return {key: value for key, value in block.items() if value is not None}


def canonical_json(value: Any) -> str:
    """One spelling per value: sorted keys, no spaces, ASCII, no NaN."""
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False
    )


def identity_sha256(identity: Mapping[str, Any]) -> str:
    return hashlib.sha256(canonical_json(identity).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def differing_fields(expected: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """One line per leaf that differs: `teacher.arch: expected 'resnet56', found 'resnet20'`."""
    return [
        f"{key}: expected {shown_value(ours)}, found {shown_value(theirs)}"
        for key, ours, theirs in differences(expected, found)
    ]


def differences(
    expected: Mapping[str, Any], found: Mapping[str, Any], prefix: str = ""
) -> Iterator[tuple[str, Any, Any]]:
    """(dotted key, expected, found) of each leaf that differs; None where there is no such key."""
    for key in sorted({*expected, *found}):
        ours, theirs = expected.get(key), found.get(key)
        if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
            yield from differences(ours, theirs, f"{prefix}{key}.")
        elif canonical_json(ours) != canonical_json(theirs):
            yield f"{prefix}{key}", ours, theirs


def shown_value(value: Any) -> str:
    """Short enough for a line: of a digest both ends."""
    text = repr(value)
    return text if len(text) <= 24 else f"{text[:17]}...{text[-4:]}"
