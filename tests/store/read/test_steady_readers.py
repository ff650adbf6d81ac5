"""A reader of a cache that grows or shrinks finds either the old or the new cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from teach_once.runtime.machine.urls import path_or_url
from teach_once.runtime.safe import confined as inside
from teach_once.store import CacheBusy, CacheDamaged, CacheError, TapSpec, TeacherCache
from teach_once.store.format import content as store_content
from teach_once.store.format.manifest import read_manifest
from teach_once.store.format.metadata import metadata_faults, zarr_metadata
from teach_once.store.move.copy import copy_cache
from teach_once.store.move.trim import trim_cache
from tests.support.caches.object_store import Server
from tests.support.caches.random_cache import TAPS, fill, journal_of, open_writer, records_of

CACHES = path_or_url("s3://bucket/caches")
MORE = {**TAPS, "embedding": TapSpec((2,), "float16")}


@pytest.fixture
def at_step(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[], object]], list[str]]:
    """Another process acts when the reader, which opens one file after the other, opens its n-th.

    Returns the files that the reader has opened, a list that grows.
    """
    opened: list[str] = []
    real = inside.open_regular

    def arrange(step: int, act: Callable[[], object]) -> list[str]:
        opened.clear()

        def open_and_act(path: Path, **options: Any) -> Any:
            opened.append(path.name)
            if len(opened) == step + 1:
                with monkeypatch.context() as patch:
                    for module in READERS:
                        patch.setattr(f"{module}.open_regular", real)
                    act()
            return real(path, **options)

        for module in READERS:
            monkeypatch.setattr(f"{module}.open_regular", open_and_act)
        return opened

    return arrange


READERS = (
    "teach_once.runtime.safe.confined",
    "teach_once.runtime.safe.safe_read",
    "teach_once.store.place.chunks",
)


def changes(cache: Path) -> dict[str, tuple[Callable[[], object], Callable[[], object]]]:
    """Name -> what another process does, and what must be there before."""
    return {
        "trim": (lambda: trim_cache(cache, num_views=1), lambda: fill(cache, num_views=3)),
        "grow": (lambda: fill(cache, num_views=3), lambda: trim_cache(cache, num_views=2)),
    }


def read_of(cache: Path) -> int:
    """Open all of the cache and read it; how many views it has."""
    opened = TeacherCache.open(cache, taps=["logits"])
    assert (opened.read_view(0)["logits"] == records_of(0, slice(None))["logits"]).all()
    return opened.num_views


@pytest.mark.parametrize("change", ["trim", "grow"])
def test_a_reader_that_a_change_interrupts_at_any_step_finds_a_whole_cache(
    tmp_path: Path, change: str, at_step: Callable[[int, Callable[[], object]], list[str]]
) -> None:
    path = fill(tmp_path / "c")
    act, prepare = changes(path)[change]
    for step in range(100):
        prepare()
        opened = at_step(step, act)
        assert read_of(path) in ((1, 3) if change == "trim" else (2, 3))
        if len(opened) <= step:
            break
    assert step > 5  # manifest, journal, several zarr.json, labels


def test_a_reader_between_any_two_steps_of_a_change_finds_a_whole_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = fill(tmp_path / "c")
    found: list[int] = []

    def watched(change: Callable[..., object]) -> Callable[..., object]:
        def changed(*args: Any, **options: Any) -> object:
            opened = TeacherCache.open(path, num_views=1, taps=["logits"])
            found.append(opened.num_views)
            return change(*args, **options)

        return changed

    for name in ("rename", "unlink", "fsync"):
        monkeypatch.setattr(f"os.{name}", watched(getattr(inside.os, name)))
    with open_writer(path, num_views=3, taps=MORE):
        pass
    trim_cache(path, num_views=1)
    assert len(found) > 20


def test_metadata_that_another_zarr_spells_are_replaced_in_one_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = fill(tmp_path / "c")

    def respelled(manifest: Any) -> dict[str, bytes]:
        return {name: text + b"\n" for name, text in zarr_metadata(manifest).items()}

    with open_writer(path, taps=MORE):
        pass
    (path / "teacher.zarr" / "embedding" / "zarr.json").unlink()  # of a tap that nobody reads yet
    monkeypatch.setattr(store_content, "zarr_metadata", respelled)
    states: list[bool] = []
    write = store_content.write_inside

    def watched(*args: Any) -> None:
        states.append(TeacherCache.open(path, taps=["logits"]).num_views == 2)
        write(*args)

    monkeypatch.setattr(store_content, "write_inside", watched)
    with open_writer(path, taps=MORE):
        pass
    assert len(states) > 3
    assert TeacherCache.open(path, taps=["logits"]).faults() == []


def test_a_description_that_takes_its_place_between_two_looks_is_sound(tmp_path: Path) -> None:
    path = fill(tmp_path / "c")
    file = path / "teacher.zarr" / "logits" / "zarr.json"
    successor = file.with_name("zarr.json.next")
    file.rename(successor)
    file.write_text("{}")  # of the old manifest

    def read(name: str) -> bytes | None:
        if name.endswith("logits/zarr.json.next"):
            successor.rename(file)  # by the writer, at this moment
            return None
        return (path / name).read_bytes()

    assert metadata_faults(path, read_manifest(path), read) == []


def test_a_journal_that_changes_without_end_is_busy_and_not_damaged(
    small_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "teach_once.store.format.journal._file_names",
        lambda cache, others=None: ["000009-0000.jsonl"],
    )
    with pytest.raises(CacheBusy, match="another process keeps changing"):
        journal_of(small_cache)


def test_damage_that_stays_is_still_damage(tmp_path: Path) -> None:
    path = fill(tmp_path / "c")
    (path / "teacher.zarr" / "logits" / "zarr.json").write_text("{}")
    with pytest.raises(CacheDamaged, match="zarr metadata damaged"):
        TeacherCache.open(path)


# ---- store copy, to a bucket


def put_limit(server: Server, most: int) -> None:
    """The store refuses what comes after so many puts, as if the command had been killed there."""
    count = 0

    def spoil(method: str, path: str, before: int) -> int | None:
        nonlocal count
        count += method == "PUT"
        return 400 if method == "PUT" and count > most else None

    server.spoil = spoil


def kills_of_a_copy(server: Server, cache: Path) -> Iterator[None]:
    """A copy that is killed after each of its puts and begun again, until it ends."""
    for _ in range(60):
        put_limit(server, 2)  # the question whether the store has conditions, and one more
        try:
            copy_cache(TeacherCache.open(cache), CACHES)
        except CacheError:
            server.spoil = lambda method, path, before: None
            yield
            continue
        server.spoil = lambda method, path, before: None
        yield
        return
    pytest.fail("the copy comes to no end")


def test_a_copy_that_grows_another_is_killed_at_any_step_and_that_one_stays_readable(
    server: Server, tmp_path: Path
) -> None:
    path = fill(tmp_path / "t-e4812202", num_views=1, block_rows=8)
    target, _ = copy_cache(TeacherCache.open(path), CACHES)
    fill(path, num_views=2, block_rows=8)
    found = []
    for _ in kills_of_a_copy(server, path):
        opened = TeacherCache.open(target, num_views=1)
        assert opened.faults() == []
        found.append(opened.manifest.num_views)
        assert TeacherCache.open(target).num_views == found[-1]  # complete, as it is planned
    assert found == sorted(found)
    assert {1, 2} == set(found)
    assert len(found) > 10
    whole = TeacherCache.open(target)
    assert (whole.num_views, whole.faults()) == (2, [])


def test_a_reader_of_a_bucket_that_a_growing_copy_overtakes_opens_the_new_one(
    server: Server, tmp_path: Path
) -> None:
    path = fill(tmp_path / "t-e4812202", num_views=1)
    target, _ = copy_cache(TeacherCache.open(path), CACHES)
    before = {key: server.ask("GET", key) for key in server.all_keys()}
    fill(path, num_views=2)
    copy_cache(TeacherCache.open(path), CACHES)
    after = {key: server.ask("GET", key) for key in server.all_keys()}
    for key in after.keys() - before.keys():
        server.ask("DELETE", key)
    for key, content in before.items():
        server.ask("PUT", key, content)

    def overtake(method: str, path: str, num_before: int) -> None:
        if method == "GET" and path.endswith("teacher.zarr/zarr.json") and not num_before:
            for key, content in after.items():
                server.ask("PUT", key, content)

    server.requests.clear()
    server.spoil = overtake
    assert TeacherCache.open(target).num_views == 2
    assert read_manifest(path).num_views == 2
