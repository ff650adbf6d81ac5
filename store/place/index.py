"""Write, remove and read the index of a cache at a place (see `store.format.index`)."""

from __future__ import annotations

import io
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Any

from teach_once.runtime.errors import Busy
from teach_once.runtime.safe.locks import Job, WriterLock, releasing
from teach_once.runtime.safe.safe_read import BadFile
from teach_once.store.errors import CacheError, Fault
from teach_once.store.format.index import (
    INDEX,
    MAX_INDEX_BYTES,
    Index,
    IndexedFile,
    index_text,
    is_evaluation_index,
    journal_names,
    metadata_paths,
    parse_index,
)
from teach_once.store.format.journal import (
    Coverage,
    Journal,
    is_journal_file,
    most_journal_bytes,
    read_journal_file,
)
from teach_once.store.format.manifest import MAX_MANIFEST_BYTES, Manifest, parse_manifest
from teach_once.store.format.metadata import MAX_METADATA_BYTES
from teach_once.store.format.spec import JOURNAL, MANIFEST
from teach_once.store.identity import EVALUATION
from teach_once.store.place.bucket import Bucket
from teach_once.store.place.bucket_log import put_whole_journal, read_remote_journal
from teach_once.store.place.open import place_at
from teach_once.store.place.place import Place, ReadablePlace, read_document


def remove_index(place: Place) -> None:
    """Remove the index before anything it lists changes; first the enclosing cache's index."""
    if (parent := _enclosing(place)) is not None:
        parent.delete(INDEX)
    place.delete(INDEX)


def _enclosing(place: Place) -> Place | None:
    """Return the place of the cache that contains an evaluation cache; None for any other cache."""
    around = place.path.parent
    if around.name != EVALUATION:
        return None
    parent = place_at(around.parent)
    return parent if parent.has(MANIFEST) else None


def write_index(place: Place, manifest: Manifest) -> bool:
    """Write the index of a cache that no process changes. Return False if the cache is incomplete.

    Only the whole files of a bucket's journal count. If they lack a block of a complete cache, a
    file that contains every block is put first.
    """
    if isinstance(place, Bucket):
        _complete_journal(place, manifest)
    names = {each.key.removeprefix(f"{JOURNAL}/") for each in place.list_files(JOURNAL)}
    journal, files = Journal.empty(manifest), dict[str, IndexedFile]()
    for name in sorted(filter(is_journal_file, names)):
        key = f"{JOURNAL}/{name}"
        content = _read(place, key, manifest)
        _enter(content, place.path / key, manifest, journal)
        files[key] = IndexedFile.of(content)
    if not Coverage(manifest, journal.there).is_complete:
        return False
    for key in metadata_paths(manifest):
        files[key] = IndexedFile.of(_read(place, key, manifest))
    for name in place.list_folders(EVALUATION):
        key = f"{EVALUATION}/{name}/{INDEX}"
        inner = read_document(place, key, MAX_INDEX_BYTES) if is_evaluation_index(key) else None
        if inner is not None:  # only complete caches have one
            files[key] = IndexedFile.of(inner)
    place.replace(INDEX, index_text(manifest, files))
    if (parent := _enclosing(place)) is not None:
        _write_anew(parent)
    return True


def _complete_journal(place: Bucket, manifest: Manifest) -> None:
    journal = read_remote_journal(place, manifest)
    if journal.num_loose and Coverage(manifest, journal.committed.there).is_complete:
        put_whole_journal(place, manifest, journal)


def _write_anew(place: Place) -> None:
    """Write the index of a cache that contains a finished one, unless it is in use."""
    text = read_document(place, MANIFEST, MAX_MANIFEST_BYTES) or b""
    with suppress(Busy, CacheError, BadFile):
        manifest = parse_manifest(text, place.path / MANIFEST)
        with _lock(place):
            write_index(place, manifest)


def write_missing_index(place: Place) -> None:
    """Write the index of a complete cache whose pass was killed before it did.

    Nothing is written if the cache is in use or read-only.
    """
    with suppress(OSError):
        if not place.has(INDEX):
            _write_anew(place)


def _lock(place: Place) -> AbstractContextManager[object]:
    """Keep other writers out of a folder; a bucket has no lock."""
    return releasing(WriterLock(place.path, Job())) if place.is_local else nullcontext()


def read_index(place: ReadablePlace, manifest: Manifest) -> Index | None:
    """Read the index; None if there is none. Raises BadFile if it does not fit the manifest."""
    content = read_document(place, INDEX, MAX_INDEX_BYTES)
    return None if content is None else parse_index(content, place.path / INDEX, manifest)


def read_indexed_journal(place: ReadablePlace, manifest: Manifest, index: Index) -> Journal:
    """Read the journal without listing it. Raises BadFile if a file does not match the index."""
    journal = Journal.empty(manifest)
    for key in journal_names(index):
        _enter(_read_indexed(place, key, manifest, index), place.path / key, manifest, journal)
    return journal


def index_faults(place: ReadablePlace, manifest: Manifest) -> list[Fault]:
    """Find the faults of the index and of the files that it lists; [] without an index."""
    try:
        index = read_index(place, manifest)
    except BadFile as error:
        return [Fault(f"index: {error.what}", error.path)]
    faults = []
    for key in index or ():
        try:
            _read_indexed(place, key, manifest, index or {})
        except BadFile as error:
            faults.append(Fault(error.what, error.path))
    return faults


def _read_indexed(place: ReadablePlace, key: str, manifest: Manifest, index: Index) -> bytes:
    content = _read(place, key, manifest)
    if IndexedFile.of(content) != index[key]:
        raise BadFile(place.path / key, f"is not the file that {INDEX} describes")
    return content


def _read(place: ReadablePlace, key: str, manifest: Manifest) -> bytes:
    most = MAX_INDEX_BYTES if is_evaluation_index(key) else MAX_METADATA_BYTES
    if key.startswith(f"{JOURNAL}/"):
        most = most_journal_bytes(manifest)
    content = read_document(place, key, most)
    if content is None:
        raise BadFile(place.path / key, "is missing")
    return content


def _enter(content: bytes, path: Path, manifest: Manifest, journal: Journal) -> None:
    file: Any = io.BytesIO(content)
    read_journal_file(file, path, len(content), manifest, journal)
