"""Untrusted packed images: damage detected, forgery rejected, no other file read."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import google_crc32c
import h5py
import numpy as np
import pytest

from teach_once.views.command import cli
from teach_once.views.images.folders import image_folder, unlabeled_images
from teach_once.views.packed.format import FORMAT_NAME, HEAD_BYTES, PackedFile
from teach_once.views.packed.read import packed
from teach_once.views.packed.write import pack_pixels
from teach_once.views.splits import DatasetError, ImageSource
from tests.support.datasets.image_folders import pack_folder, write_image_folder
from tests.support.programs.work import few_calls
from tests.support.project import ROOT

KINDS = {"pixels": pack_pixels, "encoded": pack_folder}


@pytest.fixture(scope="module", params=list(KINDS))
def original(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed")
    KINDS[request.param](image_folder(write_image_folder(folder / "data")), folder / "data.h5")
    return folder / "data.h5"


def everything_in(source: ImageSource) -> tuple[Any, ...]:
    """All that a program can learn from a dataset."""
    found: list[Any] = [source.class_names, source.type, source.test_digest()]
    found.append(source.digest_of(np.arange(len(source.train))))
    for split in (source.train, source.test):
        images, checksums = split.loaded
        found += [split.label_values.tolist(), images.tolist(), checksums.tolist()]
        found.append(split.read_digests(np.arange(len(split))).tolist())
    return tuple(found)


def refusal(call: Callable[[], object]) -> str:
    with few_calls(), pytest.raises(DatasetError) as caught:
        call()
    return str(caught.value)


def with_header(original: Path, target: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """A copy whose header has been changed, with its checksum computed again."""
    content = original.read_bytes()
    length = int(content[23:35])
    header = json.loads(content[HEAD_BYTES : HEAD_BYTES + length])
    header = change(header) or header
    body = (header if isinstance(header, str) else json.dumps(header)).encode("utf-8", "replace")
    head = f"{FORMAT_NAME} 0001 {len(body):012d} {hashlib.sha256(body).hexdigest()}\n".encode()
    start = head + body
    target.write_bytes(start + content[len(start) :])
    return target


def test_any_program_that_knows_hdf5_reads_the_same_arrays(original: Path) -> None:
    ours = PackedFile(original)
    with h5py.File(original) as theirs:
        assert [name.decode() for name in theirs["class_names"][()]] == ours.header.class_names
        for split, arrays in ours.header.splits.items():
            assert set(theirs[split]) == set(arrays)
            for name, place in arrays.items():
                dataset = theirs[split][name]
                assert dataset.id.get_offset() == place.offset
                content = ours.part(split, name, 0, place.num_bytes).tobytes()
                assert content == dataset[()].tobytes()
                assert dataset.dtype == place.dtype
                assert list(dataset.shape) == place.shape


def other_classes(header: dict[str, Any]) -> None:
    header["class_names"].reverse()


def other_shape(header: dict[str, Any]) -> None:
    for arrays in header["splits"].values():
        for name in {"images", "bytes"} & set(arrays):
            shape = arrays[name]["shape"]
            arrays[name]["shape"] = [*shape[:-1], shape[-1] - 1]


@pytest.fixture(scope="module", params=["pixels", "encoded"])
def unlabeled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unlabeled")
    source = unlabeled_images(write_image_folder(folder / "data"))
    KINDS[request.param](source, folder / "data.h5")
    return folder / "data.h5"


def without_the_key(header: dict[str, Any]) -> None:
    del header["class_names"]


def with_classes(header: dict[str, Any]) -> None:
    header["class_names"] = ["cat", "dog"]


def with_labels(header: dict[str, Any]) -> None:
    for arrays in header["splits"].values():
        arrays["labels"] = {**arrays["crc32c"], "dtype": "<i8"}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (without_the_key, "header, class_names"),
        (with_classes, "expected labels, crc32c"),
        (with_labels, "header, splits.train: expected crc32c"),
    ],
)
def test_packed_images_without_labels_get_none_from_a_forged_header(
    change: Callable[[dict[str, Any]], None], told: str, unlabeled: Path, tmp_path: Path
) -> None:
    assert b'"class_names":null' in unlabeled.read_bytes()
    assert packed(unlabeled).train.labels is None
    forged = with_header(unlabeled, tmp_path / "data.h5", change)
    assert told in refusal(lambda: packed(forged))


def test_labels_are_not_dropped_by_a_forged_header(original: Path, tmp_path: Path) -> None:
    def without_classes(header: dict[str, Any]) -> None:
        header["class_names"] = None
        for arrays in header["splits"].values():
            del arrays["labels"]

    forged = with_header(original, tmp_path / "data.h5", without_classes)
    assert "its HDF5 structure does not match its header" in refusal(lambda: packed(forged))


def test_a_flipped_bit_of_packed_images_without_labels_is_noticed_or_harmless(
    unlabeled: Path, tmp_path: Path
) -> None:
    content, target = unlabeled.read_bytes(), tmp_path / "data.h5"
    sound, noticed = everything_in(packed(unlabeled)), 0
    for bit in bits_to_flip(content, 20):
        target.write_bytes(flipped(content, bit))
        try:
            assert everything_in(packed(target)) == sound, bit
        except DatasetError:
            noticed += 1
    assert noticed >= 15


def exchanged_splits(header: dict[str, Any]) -> None:
    splits = header["splits"]
    splits["train"], splits["test"] = splits["test"], splits["train"]


@pytest.mark.parametrize("change", [other_classes, other_shape, exchanged_splits])
def test_packed_file_of_two_meanings_is_refused(
    change: Callable[[dict[str, Any]], None], original: Path, tmp_path: Path
) -> None:
    forged = with_header(original, tmp_path / "data.h5", change)
    assert "its HDF5 structure does not match its header" in refusal(lambda: packed(forged))


def test_packed_file_with_a_hidden_group_is_refused(original: Path, tmp_path: Path) -> None:
    forged = shutil.copy(original, tmp_path / "data.h5")
    with h5py.File(forged, "r+") as file:
        file.move("train", "hidden")
        file["train"] = h5py.SoftLink("/test")
    assert "its HDF5 structure does not match" in refusal(lambda: packed(Path(forged)))


def flipped(content: bytes, bit: int) -> bytes:
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def bits_to_flip(content: bytes, count: int) -> Iterator[int]:
    """Some of the header's and some of all others."""
    rng = np.random.default_rng(0)
    length = HEAD_BYTES + int(content[23:35])
    yield from rng.integers(0, 8 * length, count).tolist()
    yield from rng.integers(8 * length, 8 * len(content), count).tolist()


def test_every_flipped_bit_is_noticed_or_harmless(original: Path, tmp_path: Path) -> None:
    content, target = original.read_bytes(), tmp_path / "data.h5"
    sound, noticed = everything_in(packed(original)), 0
    for bit in bits_to_flip(content, int(os.environ.get("FLIPS", "150"))):
        target.write_bytes(flipped(content, bit))
        try:
            assert everything_in(packed(target)) == sound, bit
        except DatasetError:
            noticed += 1
    assert noticed > 140


def test_every_flipped_bit_of_a_label_is_noticed(original: Path, tmp_path: Path) -> None:
    content, target = original.read_bytes(), tmp_path / "data.h5"
    place = PackedFile(original).header.splits["train"]["labels"]
    for bit in range(8 * place.offset, 8 * (place.offset + place.num_bytes)):
        target.write_bytes(flipped(content, bit))
        assert "train/labels does not match its checksum" in refusal(lambda: packed(target))


def set_at(*path: str, value: object) -> Callable[[dict[str, Any]], None]:
    def change(header: dict[str, Any]) -> None:
        *parents, last = path
        for part in parents:
            header = header[part]
        header[last] = value

    return change


ODD_VALUES = [None, True, -1, 0.5, "x", [], {}, 2**62, 10**30, [1], [[1]], [-1], [2**47, 2**47]]
FIELDS = [
    *(("kind",), ("type",), ("class_names",), ("digests",), ("splits",), ("splits", "train")),
    *(("splits", "train", "labels"), ("splits", "train", "crc32c")),
    *(("splits", "test", "labels", key) for key in ("offset", "dtype", "shape", "crc32c")),
    *(("splits", "train", "crc32c", key) for key in ("offset", "dtype", "shape", "crc32c")),
]


@pytest.mark.parametrize("field", FIELDS, ids=".".join)
def test_a_forged_field_of_the_header_is_refused(
    field: tuple[str, ...], original: Path, tmp_path: Path
) -> None:
    sound = everything_in(packed(original))
    for number, value in enumerate(ODD_VALUES):
        file = with_header(original, tmp_path / f"{number}.h5", set_at(*field, value=value))
        try:
            found = everything_in(packed(file))
        except DatasetError:
            continue
        # Only what is free may be anything: the type is a word, digests of pixels are as stated.
        assert field in (("type",), ("digests",)), (field, value)
        assert found[3:] == sound[3:] or field == ("digests",)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (set_at("class_names", value=["cat", "cat"]), "duplicate name"),
        (set_at("class_names", value=["cat", "a\x1b[31m"]), "a class name must be"),
        (set_at("class_names", value=["cat"]), "class_names are not 1 names"),
        (set_at("more", value=1), "header, more: "),
        (lambda header: "[" * 100_000, "nested too deeply"),
        (lambda header: "\ufeff{}", "is not valid JSON"),
        (lambda header: json.dumps(header)[:-1] + ', "kind": "pixels"}', "duplicate key"),
        (set_at("splits", "train", "names", value=None), "splits.train.names"),
    ],
)
def test_what_a_header_must_not_say(
    change: Callable[[dict[str, Any]], object], told: str, original: Path, tmp_path: Path
) -> None:
    file = with_header(original, tmp_path / "forged.h5", change)
    assert told in refusal(lambda: packed(file))


def test_packed_labels_beyond_the_classes_are_refused(original: Path, tmp_path: Path) -> None:
    labels = np.full(PackedFile(original).num_samples("train"), 2, dtype="<i8").tobytes()
    checksum = google_crc32c.value(labels)
    change = set_at("splits", "train", "labels", "crc32c", value=checksum)
    file = with_header(original, tmp_path / "forged.h5", change)
    with file.open("r+b") as out:
        out.seek(PackedFile(file).header.splits["train"]["labels"].offset)
        out.write(labels)
    assert "train/labels: not all labels are classes" in refusal(lambda: packed(file))


def test_arrays_of_another_files_size_are_not_allocated(original: Path, tmp_path: Path) -> None:
    def grow(header: dict[str, Any]) -> None:
        for place in header["splits"]["train"].values():
            place["shape"][0] += 10**9

    file = with_header(original, tmp_path / "large.h5", grow)
    assert "it does not match the other arrays or" in refusal(lambda: packed(file))


def test_every_array_has_a_row_of_each_sample(original: Path, tmp_path: Path) -> None:
    content = original.read_bytes()

    def shorten(header: dict[str, Any]) -> None:
        place = header["splits"]["train"]["crc32c"]
        place["shape"][0] -= 1
        kept = content[place["offset"] :][: 4 * place["shape"][0]]
        place["crc32c"] = google_crc32c.value(kept)

    file = with_header(original, tmp_path / "short.h5", shorten)
    assert "splits.train.crc32c: it does not match the other" in refusal(lambda: packed(file))


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (os.mkfifo, "is a FIFO, expected a regular file"),
        (Path.mkdir, "is a folder, expected a regular file"),
        (lambda path: path.symlink_to("/dev/zero"), "is a device, expected a regular file"),
        (lambda path: path.symlink_to(path), "is a loop of symbolic links"),
        (lambda path: path.write_bytes(b""), "does not contain packed images"),
        (lambda path: (path.touch(), os.truncate(path, 2**30)), "does not contain packed images"),
    ],
)
def test_what_is_no_regular_file_of_packed_images_is_refused(
    make: Callable[[Path], object], told: str, tmp_path: Path
) -> None:
    make(tmp_path / "odd.h5")
    assert told in refusal(lambda: packed(tmp_path / "odd.h5"))


def test_a_file_that_is_cut_off_is_refused(original: Path, tmp_path: Path) -> None:
    content = original.read_bytes()
    for length in range(0, len(content), len(content) // 50):
        (tmp_path / "cut.h5").write_bytes(content[:length])
        refusal(lambda: everything_in(packed(tmp_path / "cut.h5")))


def test_hdf5_without_the_header_is_refused_with_the_command_that_packs(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(bytes(range(80)))
    with h5py.File(tmp_path / "old.h5", "w") as file:
        file.attrs["format"] = FORMAT_NAME
        file.create_dataset("train/labels", (10,), "<i8", external=[(str(secret), 0, 80)])
    told = refusal(lambda: packed(tmp_path / "old.h5"))
    assert "is an HDF5 file, but does not contain packed images" in told
    assert f"python -m views pack NAME|PATH {tmp_path}/old.h5" in told


def test_a_forger_cannot_make_images_larger_than_allowed(tmp_path: Path) -> None:
    pack_pixels(image_folder(write_image_folder(tmp_path / "data")), tmp_path / "data.h5")
    assert "12 x 12 pixels, more than dataset.max_pixels (100)" in refusal(
        lambda: packed(tmp_path / "data.h5", max_pixels=100)
    )


def test_what_a_killed_pack_left_is_removed_and_a_running_one_is_left_alone(tmp_path: Path) -> None:
    source = image_folder(write_image_folder(tmp_path / "data"))
    dead, running = tmp_path / ".data.h5.1.tmp", tmp_path / ".data.h5.2.tmp"
    other = tmp_path / ".other.h5.1.tmp"
    for file in (dead, running, other):
        file.write_bytes(b"half")
    with running.open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        pack_pixels(source, tmp_path / "data.h5")
    assert sorted(path.name for path in tmp_path.glob(".*")) == [running.name, other.name]


KILLED = """
import os, sys
from pathlib import Path
from teach_once.views.packed import write as new_packed
from teach_once.views.packed import write as pack
from teach_once.views.images.folders import image_folder
from tests.support.programs.work import few_calls
finish = new_packed.NewPackedFile.put_header
new_packed.NewPackedFile.put_header = lambda *given: os.kill(os.getpid(), 9)
pack.pack_pixels(image_folder(Path(sys.argv[1])), Path(sys.argv[2]))
"""


def test_a_killed_pack_leaves_the_file_that_was_there(tmp_path: Path) -> None:
    root, file = write_image_folder(tmp_path / "data"), tmp_path / "data.h5"
    pack_pixels(image_folder(root), file)
    before = file.read_bytes()
    ended = subprocess.run([sys.executable, "-c", KILLED, root, file], cwd=ROOT, check=False)
    assert ended.returncode == -9
    assert file.read_bytes() == before
    assert list(tmp_path.glob(".*.tmp"))
    pack_pixels(image_folder(root), file)
    assert not list(tmp_path.glob(".*.tmp"))


def test_a_disk_that_is_full_is_one_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = write_image_folder(tmp_path / "data", per_class=20, size=64)
    (tmp_path / "mine.yaml").write_text(
        f"dataset: {{type: imagefolder, root: {root}, "
        "normalization: {mean: [0, 0, 0], std: [1, 1, 1]}}\n"
        "views: {augment: {type: pad-crop-flip}}\nteacher: {arch: resnet8, weights: none.pt}\n"
    )
    command = ["pack", str(tmp_path / "mine.yaml"), str(tmp_path / "data.h5")]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    for room in (0, 3000, 100_000):
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
        try:
            statuses = [cli(command), cli([*command, "--encoded"])]
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        told = capsys.readouterr().err
        assert statuses == [2, 2]
        assert told.count("error: ") == told.count("fix: make room") == 2, told
        assert "data.h5" in told
        assert not list(tmp_path.glob("*.h5")) + list(tmp_path.glob(".*.tmp"))
    assert cli(command) == 0


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_a_link_to_another_file_of_the_users_is_not_copied(
    link: Callable[[Path, Path], None], tmp_path: Path
) -> None:
    root, secret = write_image_folder(tmp_path / "data"), tmp_path / "secret"
    secret.write_bytes(b"user:password\n")
    (root / "train" / "cat" / "00.png").unlink()
    link(secret, root / "train" / "cat" / "00.png")
    told = refusal(lambda: pack_folder(image_folder(root), tmp_path / "data.h5"))
    assert "cat/00.png: its format is not one of BMP" in told
    assert not list(tmp_path.glob("*.h5"))


def test_a_name_that_is_not_utf_8_is_refused_before_packing(tmp_path: Path) -> None:
    root = write_image_folder(tmp_path / "data")
    first = os.fsencode(root / "train" / "cat")
    os.rename(first + b"/00.png", first + b"/caf\xe9.png")
    with pytest.raises(DatasetError, match=r"UTF-8"):
        pack_folder(image_folder(root), tmp_path / "data.h5")
    assert not list(tmp_path.glob("*.h5"))
