"""Forged HDF5 files, and import into the given folder only."""

from __future__ import annotations

import multiprocessing
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest

from teach_once.store import CacheDamaged, CacheError, CacheFull, TeacherCache
from teach_once.store.command import cli
from teach_once.store.format.spec import crc32c
from teach_once.store.move.hdf5 import export_cache, import_cache
from tests.support.caches.forged_cache import SPECIAL, forged_manifest, set_at
from tests.support.project import ROOT

Forge = Callable[[h5py.File], object]


@pytest.fixture(scope="module")
def sound(small_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("exported") / "cache.h5"
    export_cache(small_cache, file)
    return file


@pytest.fixture
def exported(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(sound, tmp_path / "cache.h5"))


def replaced(name: str, **how: object) -> Forge:
    """Write a dataset anew in another way, with the same values and checksums."""

    def forge(file: h5py.File) -> None:
        values, attributes = file[name][()], dict(file[name].attrs)
        del file[name]
        data = file.create_dataset(name, data=values, **how)
        data.attrs.update(attributes)

    return forge


def external(file: h5py.File) -> None:
    values, attributes = file["stage1"][()], dict(file["stage1"].attrs)
    folder = Path(file.filename).parent
    (folder / "foreign").write_bytes(values.tobytes())
    del file["stage1"]
    data = file.create_dataset(
        "stage1", values.shape, values.dtype, external=[(folder / "foreign", 0, values.nbytes)]
    )
    data.attrs.update(attributes)


def virtual(file: h5py.File) -> None:
    attributes, shape = dict(file["stage1"].attrs), file["stage1"].shape
    file.move("stage1", "hidden")
    layout = h5py.VirtualLayout(shape, "<f4")
    layout[...] = h5py.VirtualSource(file["hidden"])
    file.create_virtual_dataset("stage1", layout).attrs.update(attributes)


def linked(link: object) -> Forge:
    def forge(file: h5py.File) -> None:
        file.move("stage1", "hidden")
        file["stage1"] = link

    return forge


def another_kind(make: Forge) -> Forge:
    def forge(file: h5py.File) -> None:
        del file["stage1"]
        make(file)

    return forge


def checksums_of(shape: tuple[int, ...], dtype: str) -> Forge:
    def forge(file: h5py.File) -> None:
        file["stage1"].attrs["block_crc32c"] = np.zeros(shape, dtype)

    return forge


FORGED: dict[str, Forge] = {
    "external": external,
    "virtual": virtual,
    "soft link": linked(h5py.SoftLink("/hidden")),
    "external link": linked(h5py.ExternalLink("other.h5", "/stage1")),
    "dangling link": linked(h5py.SoftLink("/nowhere")),
    "compressed": replaced("stage1", compression="gzip"),
    "chunked": replaced("stage1", chunks=(1, 4, 5)),
    "checksummed by HDF5": replaced("stage1", fletcher32=True),
    "big endian": replaced("stage1", dtype=">f4"),
    "of doubles": replaced("stage1", dtype="<f8"),
    "a group": another_kind(lambda file: file.create_group("stage1")),
    "a named type": another_kind(lambda file: file.__setitem__("stage1", np.dtype("<f4"))),
    "strings": another_kind(lambda file: file.create_dataset("stage1", data=["a", "b"])),
    "unwritten": another_kind(lambda file: file.create_dataset("stage1", (2, 11, 5), "<f4")),
    "155 GB": another_kind(lambda file: file.create_dataset("stage1", (2, 11, 10**10), "<f4")),
    "checksums of another shape": checksums_of((2, 4), "<u4"),
    "checksums of another type": checksums_of((2, 3), "<i8"),
    "no checksums": lambda file: file["stage1"].attrs.__delitem__("block_crc32c"),
    "missing": lambda file: file.__delitem__("stage1"),
}


@pytest.mark.parametrize("kind", FORGED)
def test_only_plain_datasets_whose_bytes_are_in_the_file_are_read(
    exported: Path, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with h5py.File(exported, "r+") as file:
        FORGED[kind](file)
    with pytest.raises(CacheDamaged, match="stage1"):
        TeacherCache.open(exported)
    assert cli(["import", str(exported), str(tmp_path / "imported")]) == 2
    assert cli(["check", str(exported)]) == 1
    assert "stage1" in capsys.readouterr().out
    assert not (tmp_path / "imported").exists()


@pytest.mark.parametrize(
    ("field", "value"),
    [("teacher", "../../evil"), ("teacher", "/tmp/evil"), ("num_samples", 10**8), ("taps", {})],
)
def test_a_forged_manifest_writes_nothing(
    exported: Path, tmp_path: Path, field: str, value: object
) -> None:
    with h5py.File(exported, "r+") as file:
        text = forged_manifest(bytes(file["manifest"][()]), set_at(field, to=value))
        del file["manifest"]
        file["manifest"] = np.bytes_(text)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(CacheError) as caught:
        import_cache(exported, tmp_path / "caches")
    assert caught.value.fix is not None
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("values", ["text of any length", np.zeros(3), [b"a", b"b"]])
def test_a_manifest_that_is_no_string_of_fixed_length_is_refused(
    exported: Path, values: object
) -> None:
    with h5py.File(exported, "r+") as file:
        del file["manifest"]
        file["manifest"] = values
    with pytest.raises(CacheError, match="manifest"):
        TeacherCache.open(exported)


@pytest.mark.parametrize("array", ["labels", "preview"])
def test_check_reads_labels_and_preview(
    exported: Path, array: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with h5py.File(exported) as file:
        offset, size = file[array].id.get_offset(), file[array].id.get_storage_size()
    whole = exported.read_bytes()
    for position in range(offset, offset + size, 3):
        content = bytearray(whole)
        content[position] ^= 1
        exported.write_bytes(content)
        assert cli(["check", str(exported)]) in (1, 2)
        assert f"{array} damaged" in "".join(capsys.readouterr())


def test_values_are_looked_at_though_the_checksum_fits(exported: Path) -> None:
    with h5py.File(exported, "r+") as file:
        data = file["logits"]
        data[1, 4, 0] = np.nan
        checksums = data.attrs["block_crc32c"]
        checksums[1, 1] = crc32c(data[1, 4:8])
        data.attrs["block_crc32c"] = checksums
    opened = TeacherCache.open(exported)
    with pytest.raises(CacheDamaged, match="tap logits, view 1, block 1, holds NaN"):
        opened.read_view(1)


@pytest.mark.parametrize("kind", SPECIAL)
def test_a_special_file_in_place_of_an_exported_one(tmp_path: Path, kind: str) -> None:
    SPECIAL[kind](tmp_path / "x.h5")
    for command in (["check"], ["info"], ["import"]):
        assert cli([*command, str(tmp_path / "x.h5")]) == 2
    assert cli(["list", "--caches", str(tmp_path)]) == 0


def test_an_import_does_not_follow_a_link_in_place_of_its_folder(
    exported: Path, tmp_path: Path
) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "caches").mkdir()
    (tmp_path / "caches" / "t-e4812202").symlink_to(tmp_path / "outside")
    with pytest.raises(CacheError, match="symbolic link"):
        import_cache(exported, tmp_path / "caches")
    assert list((tmp_path / "outside").iterdir()) == []


def test_an_import_that_the_disk_cannot_hold_writes_nothing(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=500))
    with pytest.raises(CacheFull, match="are needed"):
        import_cache(exported, tmp_path / "caches")
    assert list((tmp_path / "caches").iterdir()) == []


LIMITED = """
import resource, sys
from teach_once.store.command import cli
limit = 4096 if sys.argv[1] == "export" else 512
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
sys.exit(cli(sys.argv[1:]))
"""


@pytest.mark.parametrize("command", ["export", "import"])
def test_a_disk_that_fills_up_is_one_message_and_leaves_nothing(
    small_cache: Path, exported: Path, tmp_path: Path, command: str
) -> None:
    source = small_cache if command == "export" else exported
    target = tmp_path / ("new.h5" if command == "export" else "caches")
    call = [sys.executable, "-c", LIMITED, command, str(source), str(target)]
    done = subprocess.run(call, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert "too full" in done.stderr
    assert "fix: make room" in done.stderr
    assert not target.is_file()
    assert not list(tmp_path.rglob("manifest.json"))
    assert not list(tmp_path.rglob("*.tmp"))


def die_after(file: Path, caches: Path, writes: int) -> None:
    """An import that is killed before its write of that number."""
    import teach_once.runtime.safe.confined

    real, left = os.rename, [writes]

    def rename(*arguments: object, **options: object) -> None:
        if left[0] == 0:
            os._exit(9)
        left[0] -= 1
        real(*arguments, **options)  # type: ignore[arg-type]

    teach_once.runtime.safe.confined.os.rename = rename  # type: ignore[attr-defined]
    import_cache(file, caches)


def test_an_import_that_was_killed_is_no_cache_and_the_next_one_completes_it(
    exported: Path, small_cache: Path, tmp_path: Path
) -> None:
    processes = multiprocessing.get_context("forkserver")
    for writes in (0, 7, 12, 20, 26):
        caches = tmp_path / f"caches-{writes}"
        child = processes.Process(target=die_after, args=(exported, caches, writes))
        child.start()
        child.join()
        assert child.exitcode == 9
        with pytest.raises(CacheError, match="is not a cache"):
            TeacherCache.open(caches / small_cache.name)
        imported = import_cache(exported, caches)
        assert TeacherCache.open(imported).faults() == []
        for view in range(2):
            records = TeacherCache.open(imported).read_view(view)
            for tap, values in TeacherCache.open(small_cache).read_view(view).items():
                assert (records[tap] == values).all()


def test_reading_takes_no_memory_for_what_is_not_there(exported: Path) -> None:
    with h5py.File(exported, "r+") as file:
        FORGED["155 GB"](file)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert cli(["check", str(exported)]) == 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # kB
