"""Copies a cache from where it lies to where it is asked for: a folder, or an object store."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path

from runtime.program import program_text
from runtime.urls import ObjectUrl
from store.copy_in import copy_to_folder
from store.copy_out import Copied, copy_to_objects
from store.errors import CacheError
from store.folder import FolderSource
from store.layout import cache_path
from store.manifest import Manifest
from store.reader import TeacherCache


def copy_cache(
    opened: TeacherCache, dest: Path, on_chunk: Callable[[int], None] = lambda count: None
) -> tuple[Path, Copied]:
    """Copy a complete cache below `dest`, a folder or a URL; where it is now, and what was done.

    on_chunk: called with the number of chunks that are done. Raises CacheError.
    """
    target = cache_path(dest, opened.manifest.teacher, opened.manifest.identity)
    if isinstance(target, ObjectUrl):
        return target, copy_to_objects(opened, target, on_chunk)
    if dest.suffix == ".h5":
        words = [program_text("store"), "export", shlex.quote(str(opened.path)), str(dest)]
        raise CacheError(f"{dest} is no folder", fix=" ".join(words))
    if not isinstance(opened.source, FolderSource):
        words = [program_text("store"), "import", shlex.quote(str(opened.path)), str(dest)]
        raise CacheError(f"{opened.path} is one file", fix=" ".join(words))
    return target, copy_to_folder(opened, target, on_chunk)


def num_chunks(manifest: Manifest) -> int:
    """How many chunks such a cache has, each view's counted."""
    return len(manifest.arrays) * manifest.num_views * manifest.blocks_per_view
