"""Make a cache smaller: delete the views from some number on, and opt-in taps.

The order is: the manifest, which then only plans the rest; the journal; the chunks. So no journal
line ever contains a deleted chunk, and the cache is valid after any interruption. The same command
then deletes the rest. For readers that have the cache open, deleted chunks are missing.
"""

from __future__ import annotations

import dataclasses
import os
import re
import stat
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePath

from teach_once.runtime.command.program import program_text
from teach_once.runtime.formats import counted
from teach_once.runtime.safe.confined import listed_inside, opened_folder
from teach_once.runtime.safe.locks import Job, WriterLock, releasing
from teach_once.store.errors import CacheBusy, CacheError, UnknownTap, UnknownView, refusals_of
from teach_once.store.format.certificate import RANGES
from teach_once.store.format.content import beyond, replace_metadata, settle_metadata
from teach_once.store.format.journal import forget
from teach_once.store.format.manifest import Manifest, read_manifest, write_manifest
from teach_once.store.format.spec import ZARR_GROUP, is_opt_in, kind_of, tap_of
from teach_once.store.inspect.inspect import agreement
from teach_once.store.place.folder import Folder
from teach_once.store.place.index import remove_index, write_index
from teach_once.store.read.reader import TeacherCache


@contextmanager
def changing(path: Path) -> Iterator[Manifest]:
    """Yield the manifest of the cache at `path` with its lock held.

    Raises CacheBusy if a process is writing it, CacheMissing, CacheDamaged, CacheNotWritable.
    """
    read_manifest(path)  # before locking, which leaves a file even in a folder without a cache
    with refusals_of(path):
        lock = WriterLock(path, Job(), CacheBusy)
    with releasing(lock), refusals_of(path):
        yield read_manifest(path)


def trim_cache(path: Path, *, num_views: int | None = None, drop_taps: Collection[str] = ()) -> int:
    """Keep the first `num_views` views (default: all) and drop these taps; return the freed bytes.

    drop_taps: "attention" means all stages' attention maps; unknown opt-in taps are ignored. Raises
    CacheError, also if another process is writing the cache.
    """
    if path.is_file():
        raise CacheError(
            f"{path} is a file: only a cache folder can be made smaller",
            fix=f"trim the folder and export that: {program_text('store')} export CACHE FILE.h5",
        )
    with changing(path) as manifest:
        trimmed = _trimmed(path, manifest, num_views or manifest.num_views, drop_taps)
        remove_index(Folder(path))
        settle_metadata(path, manifest)
        if trimmed != manifest:
            trimmed = replace_metadata(path, trimmed)
        forget(path, beyond(trimmed), manifest)
        num_bytes = sum(_removed(path, name) for name in list(_surplus(path, trimmed)))
        write_index(Folder(path), trimmed)
        return num_bytes


def _trimmed(path: Path, manifest: Manifest, views: int, drop_taps: Collection[str]) -> Manifest:
    if not 1 <= views <= manifest.num_views:
        raise UnknownView(
            f"--views {views} is out of range: {path} is planned for "
            f"{counted(manifest.num_views, 'view')}"
        )
    for tap in drop_taps:
        if not is_opt_in(tap):
            raise UnknownTap(
                f"only attentions, the hint and the embedding can be dropped: not {tap!r}"
            )
    taps = {
        tap: spec for tap, spec in manifest.taps.items() if not {tap, kind_of(tap)} & set(drop_taps)
    }
    if not taps:
        raise UnknownTap(f"{path} holds no other taps: delete it instead")
    measured = manifest.measured
    if manifest.measured_views > views:
        measured = {**measured, "views": views}
        if "correct" in taps:
            opened = TeacherCache.open(path, num_views=views, taps=["correct"])
            measured["train_agreement"] = agreement(opened, views)
    elif views != manifest.num_views:
        measured = manifest.measured_with_views
    return dataclasses.replace(manifest, num_views=views, taps=taps, measured=measured)


def _surplus(path: Path, manifest: Manifest) -> Iterator[str]:
    """Yield chunks of views and taps that the manifest does not plan, and folders of such taps."""
    planned = manifest.arrays
    for name in sorted(listed_inside(path, ZARR_GROUP)):
        folder, spec = f"{ZARR_GROUP}/{name}", planned.get(name)
        if spec is not None and not spec.all_views:
            files = listed_inside(path, folder)
            yield from (f"{folder}/{f}" for f in files if _view_of(f) >= manifest.num_views)
        elif spec is None and is_opt_in(tap_of(name)):
            yield from (f"{folder}/{file}" for file in listed_inside(path, folder))
            yield folder


def _view_of(file: str) -> int:
    """Return the view of a chunk; -1 for another file."""
    match = re.fullmatch(r"c\.(\d{1,9})(\.\d+)+", file)
    return int(match[1]) if match else -1


def _removed(path: Path, relative: str) -> int:
    """Remove a file, a link or an empty folder of the cache; returns the bytes of the file."""
    place = PurePath(relative)
    with opened_folder(path, place.parent) as folder:
        status = os.stat(place.name, dir_fd=folder, follow_symlinks=False)
        if stat.S_ISDIR(status.st_mode):
            os.rmdir(place.name, dir_fd=folder)
            return 0
        os.unlink(place.name, dir_fd=folder)
        return status.st_size


def record_figures(path: Path, figures: Mapping[str, float]) -> None:
    """Write metrics, named as in `store.format.certificate.RANGES`, into a folder's manifest.

    The certificate's other metrics are kept. Raises CacheError, also if another process is writing
    the cache.
    """
    if unknown := figures.keys() - RANGES.keys():
        raise ValueError(f"{min(unknown)} is not a figure of a certificate")
    if path.is_file():
        raise CacheError(
            f"{path} is a file: figures are only recorded in a cache folder",
            fix=f"{program_text('store')} import {path}, and export it again afterwards",
        )
    with changing(path) as manifest:
        measured = {**manifest.measured_with_views, **figures}
        write_manifest(path, dataclasses.replace(manifest, measured=measured))
