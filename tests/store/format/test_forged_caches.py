"""A cache with forged documents and valid checksums is rejected with one error."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from teach_once.store import CacheDamaged, CacheError, CacheMismatch, TeacherCache
from teach_once.store.command import cli
from teach_once.store.errors import make_command
from tests.support.caches.forged_cache import SPECIAL, forge_manifest, forge_metadata, set_at
from tests.support.caches.random_cache import CANARY, LABELS, open_writer

IDENTITY = {"teacher": {"arch": "resnet20", "weights_sha256": "bb"}, "dataset": {"digest": "d"}}


@pytest.fixture
def cache(cache_to_forge: Path) -> Path:
    return cache_to_forge


FORGED: list[tuple[tuple[str | int, ...], Any]] = [
    (("num_samples",), 10**9),
    (("num_samples",), 11.0),
    (("num_samples",), True),
    (("num_samples",), "11"),
    (("num_views",), 10**7),
    (("num_views",), 0),
    (("num_views",), -3),
    (("num_views",), None),
    (("block_rows",), -256),
    (("block_rows",), 0),
    (("block_rows",), 3),
    (("block_rows",), 2**20),
    (("taps",), {}),
    (("taps",), []),
    (("taps", "logits"), None),
    (("taps", "logits", "shape"), [4]),
    (("taps", "logits", "shape"), [-3]),
    (("taps", "logits", "shape"), "3"),
    (("taps", "logits", "dtype"), "object"),
    (("taps", "logits", "scale"), "row"),
    (("taps", "stage1", "shape"), [2**31 - 1] * 6),
    (("taps", "stage1", "stage"), "x; touch y"),
    (("taps", "correct", "shape"), [1]),
    (("taps", "correct", "dtype"), "float32"),
    (("taps", "../../evil"), {"shape": [5], "dtype": "float32"}),
    (("taps", "a/b"), {"shape": [5], "dtype": "float32"}),
    (("taps", "labels"), {"shape": [5], "dtype": "float32"}),
    (("class_names",), ["a", "b"]),
    (("class_names",), ["a", "b", 3]),
    (("class_names",), "abc"),
    (("preview_shape",), [2, 4, 4, 10**9]),
    (("preview_shape",), [2, 4, 4]),
    (("whole_crc32c",), {"labels": "00000000"}),
    (("whole_crc32c", "labels"), 7),
    (("zarr_crc32c", "zarr.json"), "xyz"),
    (("zarr_crc32c", "../../zarr.json"), "00000000"),
    (("canary",), [1]),
    (("versions",), {"pillow": "1; touch x"}),
    (("measured",), {"views": 3}),
    (("measured",), {"test_top1_error": "low"}),
    (("measured",), {"train_agreement": -1}),
    (("measured",), {"kl_t1": -0.1}),
    (("measured",), {"means_largest_error": "none"}),
    (("measured",), {"certified_records": 4097}),
    (("measured",), {"certified_records": 3.5}),
    (("measured",), {"certified_steps": 2.0}),
    (("measured",), {"cd_change_trained": -1.5}),
    (("identity",), IDENTITY),
    (("identity_sha256",), "e" * 64),
    (("teacher",), "../../evil"),
    (("teacher",), "/tmp/evil"),
    (("teacher",), "x; touch y"),
    (("teacher",), "$(shell touch y)"),
    (("teacher",), "\x1b[31m"),
]


@pytest.mark.parametrize(
    ("keys", "value"), FORGED, ids=[f"{'.'.join(map(str, k))}={str(v)[:20]}" for k, v in FORGED]
)
def test_a_forged_field_is_named_with_what_was_found(
    cache: Path, keys: tuple[str | int, ...], value: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    forge_manifest(cache, set_at(*keys, to=value))
    for command in ("info", "check"):
        assert cli([command, str(cache)]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"error: {cache}/manifest.json: ")
        assert str(keys[:2][-1]) in error or keys[0] == "class_names"
        assert ": expected " in error
        assert ", found " in error
        assert "\x1b" not in error
        assert "touch" not in error.partition("fix:")[2]
    assert cli(["list", "--caches", str(cache.parent)]) == 0
    assert "unusable: " in capsys.readouterr().out


@pytest.mark.parametrize("change", ["format_version", "another key", "a missing key"])
def test_a_cache_of_another_version_is_refused_in_one_sentence_with_its_fix(
    cache: Path, change: str, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {
        "format_version": set_at("format_version", to=2),
        "another key": set_at("sample_crc32c", to=True),
        "a missing key": lambda content: content.pop("preview_shape"),
    }
    forge_manifest(cache, changes[change])
    assert cli(["check", str(cache)]) == 2
    problem, fix = capsys.readouterr().err.splitlines()
    assert "was written by another version of Teach Once" in problem
    assert fix == f"  fix: move {cache} away, then: make cache-teacher TEACHER=t"


METADATA: list[tuple[str, tuple[str | int, ...], Any]] = [
    ("logits", ("codecs", 1), {"name": "gzip", "configuration": {"level": 1}}),
    ("logits", ("codecs", 0, "configuration", "endian"), "big"),
    ("logits", ("codecs",), [{"name": "crc32c"}]),
    ("logits", ("shape",), [2, 11, 4]),
    ("logits", ("shape", 0), True),
    ("logits", ("data_type",), "int16"),
    ("logits", ("chunk_grid", "configuration", "chunk_shape"), [1, 8, 3]),
    ("logits", ("chunk_key_encoding", "configuration", "separator"), "/"),
    ("logits", ("fill_value",), 0),
    ("logits", ("attributes",), {"scale_factor": 2}),
    ("logits", ("dimension_names",), ["sample", "view", "channel"]),
    ("logits", ("storage_transformers",), [{"name": "x"}]),
    ("logits", ("zarr_format",), 2),
    ("correct", ("fill_value",), 0),
    ("labels", ("data_type",), "uint64"),
    ("preview", ("node_type",), "group"),
]


@pytest.mark.parametrize(("array", "keys", "value"), METADATA)
def test_zarr_metadata_that_say_something_else_are_refused(
    cache: Path, array: str, keys: tuple[str | int, ...], value: Any
) -> None:
    forge_metadata(cache, f"{array}/zarr.json", set_at(*keys, to=value))
    with pytest.raises(CacheDamaged, match=rf"zarr metadata: {keys[0]}: expected .*, found"):
        TeacherCache.open(cache)
    assert cli(["check", str(cache)]) == 1


def test_garbage_and_consolidated_metadata_are_refused_though_the_checksum_fits(
    cache: Path,
) -> None:
    consolidated = set_at("consolidated_metadata", to={"metadata": {}})
    forge_metadata(cache, "zarr.json", consolidated)
    with pytest.raises(CacheDamaged, match="consolidated_metadata"):
        TeacherCache.open(cache)


def test_a_name_that_zarr_cannot_list_is_refused_with_a_command_that_removes_it(
    cache: Path,
) -> None:
    foreign = os.fsencode(cache / "teacher.zarr") + b"/\xff'\xfe"
    os.mkdir(foreign)
    with pytest.raises(CacheDamaged, match=r"is a name that is not UTF-8") as caught:
        TeacherCache.open(cache)
    (command,) = re.findall("fix: (.*) && ", str(caught.value))
    subprocess.run(["bash", "-c", command], check=True)
    assert not os.path.lexists(foreign)
    TeacherCache.open(cache)


def test_other_spellings_of_the_same_metadata_are_read(cache: Path) -> None:
    def respelled(content: dict[str, Any]) -> None:
        content["codecs"][1] = {"name": "crc32c", "configuration": {}}
        content["data_type"] = {"name": content["data_type"]}
        content["fill_value"] = "0x7e00"
        del content["attributes"], content["storage_transformers"]

    forge_metadata(cache, "logits/zarr.json", respelled)
    assert TeacherCache.open(cache).faults() == []


def test_a_pass_writes_forged_metadata_anew(cache: Path) -> None:
    forge_metadata(cache, "logits/zarr.json", set_at("data_type", to="int16"))
    with open_writer(cache) as writer:
        assert writer.work == []
    assert TeacherCache.open(cache).faults() == []


@pytest.mark.parametrize("kind", SPECIAL)
@pytest.mark.parametrize("name", ["manifest.json", "teacher.zarr/logits/zarr.json"])
def test_a_special_file_in_place_of_a_document_is_one_error(
    cache: Path, name: str, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    sound = shutil.copytree(cache, cache.parent / "sound")
    (cache / name).unlink()
    SPECIAL[kind](cache / name)
    with pytest.raises(CacheError):
        TeacherCache.open(cache)
    assert cli(["list", "--caches", str(cache.parent)]) == 0
    if name == "manifest.json":
        assert "unusable" in capsys.readouterr().out
    assert cli(["check", "--caches", str(cache.parent)]) == 1
    assert f"{sound} is valid" in capsys.readouterr().out


@pytest.mark.parametrize("encoding", ["utf-16", "utf-8-sig"])
def test_a_manifest_in_another_encoding_is_refused(cache: Path, encoding: str) -> None:
    file = cache / "manifest.json"
    file.write_bytes(file.read_text().encode(encoding))
    with pytest.raises(CacheDamaged, match="not valid JSON"):
        TeacherCache.open(cache)


def test_an_identity_that_would_flood_the_terminal_is_refused(
    cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    many = {str(number): number for number in range(10_000)}
    forge_manifest(cache, set_at("identity", "dataset", to=many))
    assert cli(["info", str(cache)]) == 2
    assert "identity: expected at most 65,536 characters" in capsys.readouterr().err


def test_a_folder_named_for_another_identity_is_refused_with_the_right_name(cache: Path) -> None:
    other = cache.rename(cache.parent / "t-12345678")
    with pytest.raises(CacheMismatch, match="e4812202") as caught:
        TeacherCache.open(other)
    assert caught.value.fix == f"mv {other} {cache}"
    for free in ("t-e4812202.old", "my-copy", "t"):
        shutil.copytree(other, cache.parent / free)
        TeacherCache.open(cache.parent / free)


def test_a_forged_teacher_name_is_not_in_a_command_to_paste() -> None:
    assert make_command("$(shell touch x)") == "make cache-teacher TEACHER=NAME"
    assert make_command("my teacher") == "make cache-teacher TEACHER='my teacher'"


def test_what_no_reader_would_accept_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match="class_names"):
        open_writer(tmp_path / "c", class_names=["a"])
    with pytest.raises(CacheError, match="teacher: expected letters"):
        open_writer(tmp_path / "c", teacher="../evil")


def test_names_with_dollars_are_drawn_as_they_are_and_a_hostile_identity_is_cut(
    cache: Path, tmp_path: Path
) -> None:
    forge_manifest(cache, set_at("class_names", to=["$\\frac{", "$x$", "c" * 1000]))
    forge_manifest(cache, set_at("measured", to={"test_top1_error": 1.0}))
    assert cli(["info", str(cache), "--plot", str(tmp_path / "cache.png")]) == 0
    other = {str(number): number for number in range(50)} | {"teacher": {"weights_sha256": None}}
    opened = TeacherCache.open(cache)
    with pytest.raises(CacheMismatch, match=r"and 32 more") as caught:
        opened.refuse_unless(other, labels=LABELS, canary=CANARY)
    assert str(caught.value).count("\n") < 25


def test_memory_is_not_taken_for_records_that_are_not_there(cache: Path) -> None:
    opened = TeacherCache.open(cache)
    (cache / "teacher.zarr" / "stage1" / "c.1.2.0").write_bytes(b"short")
    with pytest.raises(CacheDamaged, match="stage1, view 1, block 2, chunk has 5 bytes"):
        opened.read_view(1)
