"""index.json: the small files of a complete cache, for readers that cannot list files.

A reader finds all files by the manifest except the journal's, which it lists. If a server provides
files by name only, the reader takes their names from the index.

The index is written last: by a finished pass, a copy or an import. It is removed before any file
that it lists changes, when the cache grows, is trimmed or is repaired. So an existing index always
describes the existing files, even if a writer was killed. A complete cache may lack the index if
its writer was killed just before; an incomplete cache never has one.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from teach_once.runtime.safe.safe_read import BadFile, parse_json
from teach_once.store.format.journal import is_journal_file
from teach_once.store.format.manifest import Manifest, Sha256, first_problem
from teach_once.store.format.spec import (
    JOURNAL,
    ZARR_GROUP,
    bytes_crc32c,
    crc_hex,
    metadata_names,
)
from teach_once.store.identity import EVALUATION, NAME_PATTERN, canonical_json, identity_sha256

INDEX = "index.json"
MAX_INDEX_BYTES = 16 * 2**20
_NAME, _VERSION, _CHECKSUM = "teach-once-index", 1, "index_crc32c"
_MOST_FILES = 20_000
_JOURNAL_FILE = re.compile(rf"{JOURNAL}/([^/]+)")
_EVALUATION_INDEX = re.compile(rf"{EVALUATION}/({NAME_PATTERN})/{re.escape(INDEX)}")


class IndexedFile(BaseModel):
    """The size and the sha256 of one file."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)
    size: Annotated[int, Field(ge=0, le=2**53)]
    sha256: Sha256

    @classmethod
    def of(cls, content: bytes) -> IndexedFile:
        """Return the entry of a file with this content."""
        return cls(size=len(content), sha256=hashlib.sha256(content).hexdigest())


class _Document(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)
    format: Literal["teach-once-index"]
    format_version: Literal[1]
    identity_sha256: Sha256
    files: Annotated[dict[str, IndexedFile], Field(max_length=_MOST_FILES)]


Index = Mapping[str, IndexedFile]  # path below the cache -> size and sha256, in the order of paths


def index_text(manifest: Manifest, files: Index) -> bytes:
    """Return the bytes of index.json."""
    content = {
        "format": _NAME,
        "format_version": _VERSION,
        "identity_sha256": identity_sha256(manifest.identity),
        "files": {name: files[name].model_dump() for name in sorted(files)},
    }
    return (json.dumps({**content, _CHECKSUM: _crc32c(content)}, indent=1) + "\n").encode()


def parse_index(text: bytes, path: Path, manifest: Manifest) -> Index:
    """Return the index in these bytes. Raises BadFile unless it fits the manifest."""
    content = parse_json(text, path)
    if not isinstance(content, dict) or content.pop(_CHECKSUM, None) != _crc32c(content):
        raise BadFile(path, "does not match its checksum")
    try:
        document = _Document.model_validate(content)
    except ValidationError as error:
        raise BadFile(path, str(first_problem(error))) from None
    if document.identity_sha256 != identity_sha256(manifest.identity):
        raise BadFile(path, "is the index of another cache")
    metadata = metadata_paths(manifest)
    for name in document.files.keys() - metadata:
        if not (is_evaluation_index(name) or _is_of_journal(name)):
            raise BadFile(path, "names a file that is not one of an index")
    if missing := metadata - document.files.keys():
        raise BadFile(path, f"lacks {min(missing)}")
    return dict(sorted(document.files.items()))


def metadata_paths(manifest: Manifest) -> set[str]:
    """Return the paths below the cache of the zarr.json files that the manifest implies."""
    return {f"{ZARR_GROUP}/{name}" for name in metadata_names(manifest.array_names)}


def is_evaluation_index(name: str) -> bool:
    """Return True if a path below the cache is the index of an evaluation cache."""
    return _EVALUATION_INDEX.fullmatch(name) is not None and ".." not in name


def _is_of_journal(name: str) -> bool:
    match = _JOURNAL_FILE.fullmatch(name)
    return match is not None and is_journal_file(match[1])


def journal_names(index: Index) -> list[str]:
    """Return the paths of the journal's files, in their order."""
    return sorted(name for name in index if name.startswith(f"{JOURNAL}/"))


def _crc32c(content: Mapping[str, Any]) -> str:
    return crc_hex(bytes_crc32c(canonical_json(content).encode()))
