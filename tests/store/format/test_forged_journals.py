"""Journal files, chunks and values that no writer of a cache can produce."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest

from teach_once.runtime.safe.locks import Job
from teach_once.store import CacheDamaged, CacheError, CacheIncomplete, TeacherCache
from teach_once.store.command import cli
from teach_once.store.format.journal import read_journal
from teach_once.store.format.manifest import read_manifest
from teach_once.store.format.spec import crc_hex
from teach_once.store.identity import canonical_json
from tests.support.caches.forged_cache import SPECIAL, forge_manifest, set_at
from tests.support.caches.random_cache import open_writer
from tests.support.programs.work import few_calls

Line = dict[str, Any]


def forge_line(cache: Path, number: int, change: Callable[[Line], object]) -> None:
    """Change a line of the journal; its checksum fits."""
    file = cache / "journal" / "000001-0000.jsonl"
    lines = file.read_bytes().splitlines()
    content = json.loads(lines[number])
    del content["line_crc32c"]
    change(content)
    content["line_crc32c"] = crc_hex(google_crc32c.value(canonical_json(content).encode()))
    lines[number] = canonical_json(content).encode()
    file.write_bytes(b"\n".join([*lines, b""]))


LINES: list[tuple[str, Callable[[Line], object]]] = [
    ("view of words", set_at("view", to="1|2")),
    ("negative view", set_at("view", to=-1)),
    ("no view", lambda line: line.pop("view")),
    ("checksums in a list", set_at("crc32c", to=["00000000"])),
    ("checksum of a number", set_at("crc32c", "logits", to=0.5)),
    ("no checksums", set_at("crc32c", to={})),
    ("an array outside", set_at("crc32c", "../x", to="00000000")),
    ("another identity", set_at("identity", to="0" * 16)),
    ("other rows", set_at("rows", to=400)),
    ("other taps", set_at("taps", to=["hint"])),
    ("a key more", set_at("comment", to="x")),
    ("a huge number", set_at("block", to=10**4000)),
    ("a long line", set_at("comment", to="x" * 100_000)),
]


@pytest.mark.parametrize(("name", "change"), LINES, ids=[name for name, _ in LINES])
def test_a_forged_line_is_damage(
    cache_to_forge: Path, name: str, change: Callable[[Line], object]
) -> None:
    forge_line(cache_to_forge, 3, change)
    (damaged,) = read_journal(cache_to_forge, read_manifest(cache_to_forge)).damaged_lines
    assert "000001-0000.jsonl, line 4" in damaged
    with pytest.raises(CacheDamaged, match="journal damaged"):
        TeacherCache.open(cache_to_forge)


@pytest.mark.parametrize("text", [b" %s\n", b"%s \n", b"\xef\xbb\xbf%s\n", b"%s\r\n"])
def test_a_line_has_one_spelling(cache_to_forge: Path, text: bytes) -> None:
    file = cache_to_forge / "journal" / "000001-0000.jsonl"
    line = file.read_bytes().splitlines()[0]
    file.write_bytes(text % line)
    assert len(read_journal(cache_to_forge, read_manifest(cache_to_forge)).damaged_lines) == 1


@pytest.mark.parametrize(
    "content", [b"no journal", b"\0" * 100_000, b"\n" * 10**6, b"[" * 10**6, b"{}\n"]
)
def test_a_journal_that_is_none_is_named_beside_a_sound_one(
    cache_to_forge: Path, content: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    (cache_to_forge / "journal" / "000002-0000.jsonl").write_bytes(content)
    (cache_to_forge / "journal" / "3-x.jsonl").write_bytes(content)
    with few_calls():
        assert cli(["check", str(cache_to_forge)]) == 0  # every block is committed all the same
    printed = capsys.readouterr().out
    assert "unreadable line of the journal" in printed
    assert "000002-0000.jsonl, line 1" in printed
    assert "3-x.jsonl" in printed


def test_what_a_crash_cuts_off_is_no_damage(cache_to_forge: Path) -> None:
    file = cache_to_forge / "journal" / "000001-0000.jsonl"
    last = file.read_bytes().splitlines()[-1]
    for length in (1, 9, 30, len(last)):
        (cache_to_forge / "journal" / "000002-0000.jsonl").write_bytes(last[:length])
        assert read_journal(cache_to_forge, read_manifest(cache_to_forge)).damaged_lines == []


@pytest.mark.parametrize("kind", SPECIAL)
@pytest.mark.parametrize(
    "name",
    [
        "journal/000001-0000.jsonl",
        "journal/000002-0000.jsonl",
        "teacher.zarr/logits/c.0.0.0",
        "teacher.zarr/labels/c.0",
        "teacher.zarr/preview/c.0.0.0.0",
    ],
)
def test_a_special_file_is_one_error_and_hangs_nothing(
    cache_to_forge: Path, name: str, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = cache_to_forge / name
    path.unlink(missing_ok=True)
    SPECIAL[kind](path)
    assert cli(["check", str(cache_to_forge)]) in (1, 2)
    assert path.name.split(".")[0] in "".join(capsys.readouterr())
    assert cli(["list", "--caches", str(cache_to_forge.parent)]) == 0


def test_a_million_planned_views_of_which_nothing_is_there_take_no_time(
    cache_to_forge: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    forge_manifest(cache_to_forge, set_at("num_views", to=10**6))
    with few_calls():
        for command in ("info", "check"):
            cli([command, str(cache_to_forge)])
        assert cli(["list", "--caches", str(cache_to_forge.parent)]) == 0
        with pytest.raises(CacheIncomplete, match="6 of 3,000,000 blocks"):
            TeacherCache.open(cache_to_forge)
    assert "11,999,9" in capsys.readouterr().out  # faults


# ---- values


def write_chunk(cache: Path, array: str, name: str, values: np.ndarray) -> None:
    """Replace values of a chunk, from its start; all checksums fit."""
    file = cache / "teacher.zarr" / array / name
    payload = bytearray(file.read_bytes()[:-4])
    payload[: values.nbytes] = values.tobytes()
    checksum = google_crc32c.value(bytes(payload))
    file.write_bytes(bytes(payload) + checksum.to_bytes(4, "little"))
    if array == "labels":
        change = set_at("whole_crc32c", "labels", to=crc_hex(checksum))
        return forge_manifest(cache, change)
    view, block = map(int, name.split(".")[1:3])
    return forge_line(cache, 3 * view + block, set_at("crc32c", array, to=crc_hex(checksum)))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, -np.nan])
@pytest.mark.parametrize(("array", "dtype"), [("logits", "<f2"), ("stage1", "<f4")])
def test_floats_that_are_not_finite_are_damage(
    cache_to_forge: Path, array: str, dtype: str, value: float
) -> None:
    write_chunk(cache_to_forge, array, "c.1.1.0", np.array([0, value], dtype))
    opened = TeacherCache.open(cache_to_forge)
    opened.read_view(0)
    with pytest.raises(CacheDamaged, match=f"tap {array}, view 1, block 1, holds NaN or infinity"):
        opened.read_view(1)
    assert [fault.what for fault in opened.faults()] == ["holds NaN or infinity"]


def test_the_largest_finite_numbers_are_sound(cache_to_forge: Path) -> None:
    for array, dtype in (("logits", np.float16), ("stage1", np.float32)):
        extremes = np.array([np.finfo(dtype).max, np.finfo(dtype).min, -0.0], dtype)
        write_chunk(cache_to_forge, array, "c.1.2.0", extremes)
    assert TeacherCache.open(cache_to_forge).faults() == []


def test_correct_is_a_bit(cache_to_forge: Path) -> None:
    write_chunk(cache_to_forge, "correct", "c.0.0", np.array([7], np.uint8))
    with pytest.raises(CacheDamaged, match="tap correct, view 0, block 0, holds something else"):
        TeacherCache.open(cache_to_forge).read_view(0)


@pytest.mark.parametrize("label", [-1, 3, 2**62])
def test_a_label_of_no_class_is_damage(cache_to_forge: Path, label: int) -> None:
    write_chunk(cache_to_forge, "labels", "c.0", np.array([0, label]))
    with pytest.raises(CacheDamaged, match=f"labels: holds the label {label}, expected 0 to 2"):
        TeacherCache.open(cache_to_forge)
    assert cli(["check", str(cache_to_forge)]) == 1


# ---- the list of a job's work


@pytest.mark.parametrize(
    "pending",
    [
        [[10**9, 0, ["logits"]]],
        [[0, 10**9, ["logits"]]],
        [[0, -1, ["logits"]]],
        [[0, 0, ["../x"]]],
        [[0, 0]],
        [[0.0, 0, ["logits"]]],
        "all",
        None,
    ],
)
def test_a_work_list_that_does_not_fit_the_cache_is_refused(
    tmp_path: Path, pending: object
) -> None:
    with open_writer(tmp_path / "c", job=Job("one", 0, 2)):
        file = tmp_path / "c" / "journal" / "job.json"
        file.write_text(json.dumps({"job": "one", "pending": pending}))
        with pytest.raises(CacheError, match="is not the work list of this job"):
            open_writer(tmp_path / "c", job=Job("one", 1, 2))


def test_one_bad_cache_stops_neither_list_nor_check(
    cache_to_forge: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = shutil.copytree(cache_to_forge, cache_to_forge.parent / "bad")
    shutil.rmtree(bad / "journal")
    os.mkfifo(bad / "journal")
    assert cli(["list", "--caches", str(bad.parent)]) == 0
    assert "unusable" in capsys.readouterr().out
    assert cli(["check", "--caches", str(bad.parent)]) == 1
    assert f"{cache_to_forge} is valid" in capsys.readouterr().out
