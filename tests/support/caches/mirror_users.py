"""Other processes that use a mirror; quick to import."""

from __future__ import annotations

from multiprocessing.synchronize import Event
from pathlib import Path

from teach_once.store.place.mirror_folder import MirrorFolder, Needs
from teach_once.store.read.mirror import Mirror, attach_again
from teach_once.store.read.reader import TeacherCache


def read_views(mirrors: dict[Path, Mirror], cache: Path, views: list[int]) -> None:
    attach_again(mirrors)
    opened = TeacherCache.open(cache)
    for view in views:
        opened.read_view(view)


def need(root: Path, paths: list[Path], is_ready: Event, is_done: Event) -> None:
    """Protect these files in the mirror until `is_done`."""
    needs, folder = Needs(root), MirrorFolder(root, 10**9)
    needs.remember(0, paths)
    with folder.locked() as opened:
        folder.make_room(opened, 0)
    is_ready.set()
    is_done.wait(60)
