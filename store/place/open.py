"""The place that a path names: the only decision between folder and bucket in the project."""

from __future__ import annotations

from pathlib import Path

from teach_once.runtime.machine.urls import ObjectUrl
from teach_once.store.place.bucket import Bucket
from teach_once.store.place.folder import Folder
from teach_once.store.place.place import Place


def place_at(path: Path) -> Place:
    """Return the files below `path`, a folder or a URL as `path_or_url` makes it."""
    return Bucket(path) if isinstance(path, ObjectUrl) else Folder(path)
