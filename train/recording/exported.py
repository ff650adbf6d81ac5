"""An exported student: the names of its files, its card, and their verification.

Exports are meant to be passed on. The card (student.json) contains its own checksum and the sha256
of the two other files, which reveal damage and mixtures of two exports. Does not import torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from teach_once.runtime.metrics import check_known
from teach_once.runtime.safe.safe_read import BadFile, parse_json, read_bounded
from teach_once.runtime.safe.text import one_line
from teach_once.store.identity import file_sha256, identity_sha256
from teach_once.train.runs.files import EMA, Metrics, Sha256, Text

STEMS = ("student", f"student{EMA}")
NAMES = [f"{stem}.{end}" for stem in STEMS for end in ("pt", "pt2", "json")]
_MOST_BYTES = 64 * 2**20  # size of a card, which lists the names of the classes
_CHECKSUM = "content_sha256"


class _Card(BaseModel):
    """The fields that readers use; the checksum covers the whole card."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)
    model: Text
    epoch: Annotated[int, Field(ge=1, le=2**31 - 1)]
    classes: list[str]
    metrics: Metrics
    program_metrics: Annotated[dict[str, float], AfterValidator(check_known)]
    files_sha256: dict[str, Sha256]
    content_sha256: Sha256


def card_document(card: Mapping[str, Any]) -> bytes:
    """Build the bytes of a card."""
    return (json.dumps({**card, _CHECKSUM: identity_sha256(card)}, indent=1) + "\n").encode()


def verify_export(folder: Path) -> list[dict[str, Any]]:
    """Read the cards of an export, and verify them and their files.

    Raises BadFile, which names the file, and FileNotFoundError if one is missing.
    """
    stems = [stem for stem in STEMS if (folder / f"{stem}.json").exists()]
    return [_verified(folder, stem) for stem in stems or STEMS[:1]]


def _verified(folder: Path, stem: str) -> dict[str, Any]:
    path = folder / f"{stem}.json"
    try:
        card = parse_json(read_bounded(path, _MOST_BYTES), path)
        _Card.model_validate(card)
    except BadFile as error:
        raise _bad(path, error.what) from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = one_line(".".join(map(str, first["loc"])))
        raise _bad(path, f"{field}: {one_line(first['msg'])}") from None
    if card.pop(_CHECKSUM) != identity_sha256(card):
        raise _bad(path, "has been changed or damaged: its checksum does not match")
    for name in (f"{stem}.pt", f"{stem}.pt2"):
        if file_sha256(folder / name) != card["files_sha256"].get(name):
            raise _bad(folder / name, f"does not match {path.name}: its sha256 differs")
    return dict(card)


def _bad(path: Path, what: str) -> BadFile:
    return BadFile(path, what, fix="export the student again, or copy the export again")
