"""Records of unfinished blocks: killing a pass over decoded images loses a batch, not a block."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from teach_once.nets.networks.zoo import build
from teach_once.nets.weights.files import save_atomically
from teach_once.precompute.compute.spool import Spool, SpoolLayout
from teach_once.precompute.compute.teacher_pass import PassOptions, TeacherPass
from teach_once.precompute.run_pass import fill_cache
from teach_once.store import TeacherCache
from tests.support.caches.small_files import files_of_at_most
from tests.support.caches.teacher_cache import CPU, setup_of
from tests.support.datasets.photograph_study import PLAIN, configs_of

TAPS = (("logits", "float16", (3,)), ("correct", "uint8", ()))
LAYOUT = SpoolLayout("0" * 64, 8, 6, (1, 4), TAPS)


def parts_of(rows: slice) -> dict[int, dict[str, np.ndarray]]:
    """The records of views 1 and 4 of some of the six samples."""
    rng = np.random.default_rng(0)
    whole = {
        view: {
            "logits": rng.normal(size=(6, 3)).astype(np.float16),
            "correct": rng.integers(0, 2, 6).astype(np.uint8),
        }
        for view in (1, 4)
    }
    return {view: {tap: v[rows] for tap, v in taps.items()} for view, taps in whole.items()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "journal").mkdir()
    return tmp_path


def spooled(folder: Path, layout: SpoolLayout = LAYOUT) -> Spool:
    spool = Spool(folder, 0, layout)
    for rows in (slice(0, 4), slice(4, 6)):
        spool.add(parts_of(rows))
    spool.close()
    return spool


def assert_whole(spool: Spool) -> None:
    assert spool.rows_done == 6
    for view, taps in parts_of(slice(0, 6)).items():
        found = spool.records(view, ["logits", "correct"])
        assert all((found[tap] == values).all() for tap, values in taps.items())
        assert found["logits"].dtype == np.float16


def test_records_come_back_in_this_process_and_in_the_next(folder: Path) -> None:
    assert_whole(spooled(folder))
    assert_whole(Spool(folder, 0, LAYOUT))
    assert Spool(folder, 1, LAYOUT).rows_done == 0  # another rank's


def test_a_spool_that_is_cut_off_or_damaged_anywhere_counts_up_to_there(folder: Path) -> None:
    path = spooled(folder).path
    whole = path.read_bytes()
    header = whole.index(b"\n") + 1
    second = header + 8 + 4 * LAYOUT.bytes_per_sample
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        assert Spool(folder, 0, LAYOUT).rows_done == (4 if length >= second else 0)
    for position in range(header, len(whole)):
        flipped = bytearray(whole)
        flipped[position] ^= 1
        path.write_bytes(flipped)
        resumed = Spool(folder, 0, LAYOUT)
        assert resumed.rows_done == (4 if position >= second else 0)
        if resumed.rows_done:
            resumed.add(parts_of(slice(4, 6)))
            resumed.close()
            assert_whole(Spool(folder, 0, LAYOUT))


@pytest.mark.parametrize(
    "other",
    [
        SpoolLayout("1" * 64, 8, 6, (1, 4), TAPS),
        SpoolLayout("0" * 64, 0, 6, (1, 4), TAPS),
        SpoolLayout("0" * 64, 8, 6, (1, 4, 5), TAPS),
        SpoolLayout("0" * 64, 8, 6, (1, 4), (("logits", "float32", (3,)),)),
    ],
)
def test_records_of_anything_else_are_not_taken(folder: Path, other: SpoolLayout) -> None:
    spooled(folder)
    assert Spool(folder, 0, other).rows_done == 0


def test_the_blocks_that_a_kill_left_uncommitted_are_taken_from_a_finished_spool(
    folder: Path,
) -> None:
    spooled(folder)
    rest = SpoolLayout("0" * 64, 8, 6, (4,), TAPS)
    found = Spool(folder, 0, rest).records(4, ["logits"])["logits"]
    assert (found == parts_of(slice(0, 6))[4]["logits"]).all()


@pytest.mark.parametrize("content", [b"", b"{}\n", b"[1]\n", b'{"taps": 3}\n', b"\xff\n", b"\n"])
def test_a_file_that_is_no_spool_is_replaced(folder: Path, content: bytes) -> None:
    (folder / "journal/0000.spool").write_bytes(content)
    assert_whole(spooled(folder))


def test_a_link_in_place_of_a_spool_is_not_written_through(folder: Path) -> None:
    victim = folder / "victim"
    victim.write_bytes(b"mine")
    (folder / "journal/0000.spool").symlink_to(victim)
    with pytest.raises(ValueError, match="is a symbolic link"):
        Spool(folder, 0, LAYOUT).add(parts_of(slice(0, 4)))
    assert victim.read_bytes() == b"mine"


# ---- in a pass


class Killed(BaseException):
    """What a kill looks like from inside."""


@pytest.mark.parametrize("mix", [None, {"type": "cutmix"}])
def test_a_killed_pass_continues_with_the_next_sample_and_decodes_each_image_once(
    photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mix: dict | None
) -> None:
    save_atomically(build("resnet8", num_classes=2, seed=1).state_dict(), tmp_path / "teacher.pt")
    augment = {**PLAIN, **({"mix": mix} if mix else {})}
    _, teacher = configs_of(photographs, tmp_path / "teacher.pt", augment)
    options = PassOptions(CPU, batch_size=4, block_rows=16, num_workers=0)
    quiet = Console(file=io.StringIO())
    whole = fill_cache(setup_of(teacher, tmp_path / "whole"), options, quiet)

    readings, shown = TeacherPass.readings, []

    def dying(self, views, ids, taps):
        for number, reading in enumerate(readings(self, views, ids, taps)):
            if number == 2 and len(shown) == 8:
                raise Killed
            shown.extend(ids[4 * number : 4 * number + 4].tolist())
            yield reading

    monkeypatch.setattr(TeacherPass, "readings", dying)
    killed = setup_of(teacher, tmp_path / "killed")
    with pytest.raises(Killed):
        fill_cache(killed, options, quiet)
    assert (killed.path / "journal/0000.spool").is_file()
    assert not list((killed.path / "journal").glob("*.jsonl"))
    resumed = fill_cache(killed, options, quiet)
    assert shown == list(range(20))
    assert not list((killed.path / "journal").glob("*.spool"))
    assert isinstance(whole, TeacherCache)
    assert isinstance(resumed, TeacherCache)
    for view in range(3):
        ours, theirs = resumed.read_view(view), whole.read_view(view)
        assert all(np.array_equal(ours[tap], theirs[tap]) for tap in ours)
    assert resumed.faults() == []
    assert os.listdir(killed.path / "journal")


def test_a_reading_of_a_slow_teacher_is_small_so_that_a_kill_loses_seconds(
    photographs: Path, tmp_path: Path
) -> None:
    save_atomically(build("resnet8", num_classes=2, seed=1).state_dict(), tmp_path / "teacher.pt")
    _, teacher = configs_of(photographs, tmp_path / "teacher.pt", PLAIN)
    options = PassOptions(CPU, batch_size=4, num_workers=0)
    slow = TeacherPass(setup_of(teacher, tmp_path / "caches"), options)

    def sizes(images_per_second: float) -> list[int]:
        slow.images_per_second = images_per_second
        readings = slow.readings([0, 1, 2], np.arange(20), slow.setup.taps)
        return [len(reading[0]["correct"]) for reading in readings]

    assert sizes(0.0) == sizes(1e6) == [4] * 5
    assert sizes(2.0) == [2] * 10  # 8 images, of 3 views each, in four seconds
    assert sizes(0.01) == [1] * 20


def test_records_that_the_disk_refuses_leave_no_trace_and_no_second_error(folder: Path) -> None:
    spool = Spool(folder, 0, LAYOUT)
    spool.add(parts_of(slice(0, 4)))
    before = spool.path.read_bytes()
    with files_of_at_most(len(before) + 10), pytest.raises(OSError, match="too large"):
        spool.add(parts_of(slice(4, 6)))
    with files_of_at_most(len(before) + 10):
        spool.close()
    assert spool.path.read_bytes() == before
    spool.add(parts_of(slice(4, 6)))
    assert_whole(spool)
    spool.close()
    assert_whole(Spool(folder, 0, LAYOUT))
