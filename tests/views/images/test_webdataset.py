"""Tar shards: ordered samples, packed once; untrusted archives are read strictly."""

from __future__ import annotations

import io
import json
import re
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from teach_once.configs.load import ConfigError, check_data_exists, load_teacher
from teach_once.nets.networks.zoo import build
from teach_once.nets.weights.files import save_atomically
from teach_once.views.command import cli
from teach_once.views.datasets import load_dataset
from teach_once.views.images.webdataset import Tar
from teach_once.views.splits import DatasetError
from tests.support.caches.teacher_cache import make_cache
from tests.support.datasets.other_formats import (
    LABELS,
    pack_again,
    picture,
    shows_pictures,
    write_config,
)


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def write_tar(file: Path, members: Sequence[tuple[str, bytes]], format: int) -> None:
    with tarfile.open(file, "w", format=format) as tar:
        folder = tarfile.TarInfo("some")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for name, content in members:
            add(tar, name, content)


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Three shards of each kind of header, and a config beside them."""
    root = tmp_path / "shards"
    root.mkdir()
    formats = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
    for shard, start in enumerate((0, 3, 5)):
        members = []
        for number in range(start, (3, 5, 7)[shard]):
            key = f"{'long/' * 25 if shard else ''}{number:06d}"
            members += [(f"{key}.png", picture(number)), (f"{key}.cls", b"%d\n" % LABELS[number])]
        write_tar(root / f"photos-train-{shard}.tar", members, formats[shard])
    tests = [
        ("a.json", b'{"label": "x"}'),
        ("a.CLS", b"1"),
        ("a.PNG", picture(99)),
        (".hidden", b""),
    ]
    write_tar(root / "photos-val-0.tar", tests, tarfile.PAX_FORMAT)
    return write_config(tmp_path / "mine.yaml", "webdataset", root="shards")


def test_samples_are_numbered_through_the_shards_in_their_order(shards: Path) -> None:
    config = load_teacher(pack_again(shards))
    dataset = load_dataset(config.dataset)
    assert dataset.train.labels.tolist() == LABELS
    assert dataset.test.labels.tolist() == [1]
    assert dataset.class_names == ("0", "1")
    assert dataset.type == "webdataset"
    assert shows_pictures(dataset.train)


def test_shards_of_other_content_or_order_are_another_dataset(shards: Path) -> None:
    root = shards.parent / "shards"
    digests = [load_dataset(load_teacher(pack_again(shards)).dataset).digest]
    (root / "photos-train-1.tar").rename(root / "photos-train-9.tar")
    digests.append(load_dataset(load_teacher(pack_again(shards)).dataset).digest)
    members = [("1.png", picture(50)), ("1.cls", b"1"), ("2.png", picture(51)), ("2.cls", b"0")]
    write_tar(root / "photos-train-0.tar", members, tarfile.PAX_FORMAT)
    digests.append(load_dataset(load_teacher(pack_again(shards)).dataset).digest)
    assert len(set(digests)) == 3


def test_a_cache_is_made_and_read_from_packed_tar_shards(shards: Path, tmp_path: Path) -> None:
    pack_again(shards, "--short-side", "10")
    save_atomically(build("resnet8", num_classes=2, seed=1).state_dict(), tmp_path / "w.pt")
    cache = make_cache(load_teacher(shards), tmp_path / "caches")
    assert cache.labels.tolist() == LABELS


def test_labels_may_be_names_or_a_key_of_a_json_file(shards: Path) -> None:
    root = shards.parent / "shards"
    for file in root.iterdir():
        file.unlink()
    for split, names in (("train", "dog cat dog"), ("test", "cat")):
        members = []
        for number, name in enumerate(names.split()):
            described = json.dumps({"kind": name, "more": [1]}).encode()
            members += [(f"{number}.jpg", picture(number)), (f"{number}.json", described)]
        write_tar(root / f"{split}.tar", members, tarfile.PAX_FORMAT)
    write_config(shards, "webdataset", root="shards", label="json.kind")
    dataset = load_dataset(load_teacher(pack_again(shards)).dataset)
    assert dataset.class_names == ("cat", "dog")
    assert dataset.train.labels.tolist() == [1, 0, 1]


def test_numbers_may_be_named_by_a_file(shards: Path) -> None:
    (shards.parent / "shards" / "names.txt").write_text("cat\ndog\nemu\n")
    write_config(shards, "webdataset", root="shards", class_names="names.txt")
    dataset = load_dataset(load_teacher(pack_again(shards)).dataset)
    assert dataset.class_names == ("cat", "dog", "emu")


def test_what_has_not_been_packed_is_an_error_that_names_the_command(shards: Path) -> None:
    config = load_teacher(shards)
    with pytest.raises(ConfigError) as caught:
        check_data_exists(config)
    assert f"fix: python -m views pack {shards}" in str(caught.value)
    pack_again(shards)
    for file in (shards.parent / "shards").iterdir():
        file.unlink()
    (shards.parent / "shards").rmdir()
    check_data_exists(load_teacher(shards))  # the packed form suffices


@pytest.mark.parametrize(
    ("members", "told"),
    [
        ([("1.png", b""), ("1.jpg", b""), ("1.cls", b"0")], "sample 1 of .* has 2 images"),
        ([("1.cls", b"0")], "sample 1 of .* has 0 images"),
        ([("1.png", b"x")], r"sample 1 of .* has no \.cls file"),
        ([("1.png", b"x"), ("1.cls", b"\xff")], r"\.cls has no label"),
        ([("1.png", b"x"), ("1.cls", b"7")], "the label 7 is not among the 2 classes"),
        ([("\x1b[31m.png", b"x")], r"sample \\x1b\[31m of"),
        ([("1.png", b"x"), ("1.cls", b"-1")], r"1\.png of .*: the label -1 is negative"),
        ([("1.png", b"x"), ("1.cls", b"cat")], r"1\.png of .*: the label cat is a name"),
    ],
)
def test_samples_that_are_none_are_named(
    members: list[tuple[str, bytes]], told: str, shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tar(shards.parent / "shards" / "photos-val-0.tar", members, tarfile.PAX_FORMAT)
    assert cli(["pack", str(shards)]) == 2
    error = capsys.readouterr().err
    assert "\x1b" not in error
    assert re.search(told, error), error


# ---- tar archives from strangers


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_those_that_pythons_tarfile_finds(format: int, tmp_path: Path) -> None:
    names = ["a", "b/c.png", "d" * 90 + "/" + "e" * 60, "é/ü.png"]
    if format != tarfile.USTAR_FORMAT:
        names += ["f" * 300, "g/" * 200 + "h"]
    write_tar(tmp_path / "x.tar", [(name, name.encode() * 9) for name in names], format)
    ours = Tar(tmp_path / "x.tar")
    with tarfile.open(tmp_path / "x.tar") as theirs:
        expected = [(m.name, m.offset_data, m.size) for m in theirs if m.isfile()]
    assert list(ours.members()) == expected
    assert [ours.read(member) for member in ours.members()] == [n.encode() * 9 for n in names]


def special(kind: bytes) -> Callable[[tarfile.TarFile], None]:
    def write(tar: tarfile.TarFile) -> None:
        member = tarfile.TarInfo("x.png")
        member.type, member.linkname = kind, "/etc/passwd"
        tar.addfile(member)

    return write


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, b"S", b"Z"]
)
def test_links_and_special_members_are_refused(kind: bytes, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        special(kind)(tar)
    with pytest.raises(DatasetError, match=r"x\.png is a link or another special file, at byte 0"):
        list(Tar(tmp_path / "x.tar").members())


def with_field(content: bytes, start: int, value: bytes) -> bytes:
    """Header 0 with another field, its checksum computed again."""
    header = bytearray(content[:512])
    header[start : start + len(value)] = value
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + content[512:]


@pytest.mark.parametrize(
    ("start", "value", "told"),
    [
        (124, b"77777777777\0", "it is truncated"),
        (124, b"\x80" + b"\xff" * 11, "it is truncated"),
        (124, b"-0000000001\0", "an invalid number"),
        (124, b"99999999999\0", "an invalid number"),
        (0, b"caf\xe9.png\0", "is not UTF-8"),
        (0, b"\0", "an empty or too long name"),
        (156, b"x", "an invalid pax header"),
    ],
)
def test_headers_that_lie_are_refused(start: int, value: bytes, told: str, tmp_path: Path) -> None:
    write_one(tmp_path / "x.tar")
    content = (tmp_path / "x.tar").read_bytes()
    (tmp_path / "x.tar").write_bytes(with_field(content, start, value))
    with pytest.raises(DatasetError, match=told):
        list(Tar(tmp_path / "x.tar").members())


def write_one(file: Path) -> None:
    with tarfile.open(file, "w", format=tarfile.USTAR_FORMAT) as tar:
        add(tar, "a.png", b"content" * 100)


def test_every_flipped_bit_of_a_header_is_noticed_or_harmless(tmp_path: Path) -> None:
    write_one(tmp_path / "x.tar")
    content = (tmp_path / "x.tar").read_bytes()
    sound = list(Tar(tmp_path / "x.tar").members())
    noticed = 0
    for bit in range(0, 8 * 512, 3):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        (tmp_path / "x.tar").write_bytes(bytes(flipped))
        try:
            assert list(Tar(tmp_path / "x.tar").members()) == sound
        except DatasetError:
            noticed += 1
    assert noticed > 1300


def test_an_archive_that_is_cut_off_compressed_or_damaged_is_refused(tmp_path: Path) -> None:
    write_one(tmp_path / "x.tar")
    content = (tmp_path / "x.tar").read_bytes()
    for damaged in (content[:700], content[:100], b"\x1f\x8b" + content[2:], b"\0" * 511):
        (tmp_path / "x.tar").write_bytes(damaged)
        with pytest.raises(DatasetError, match="is not a tar archive of regular files"):
            list(Tar(tmp_path / "x.tar").members())
    (tmp_path / "x.tar").unlink()
    (tmp_path / "x.tar").symlink_to("/dev/zero")
    with pytest.raises(DatasetError, match="is a device"):
        list(Tar(tmp_path / "x.tar").members())


@pytest.mark.parametrize(
    "record",
    [
        b"0 path=x\n",
        b"9 path=xy",
        b"1 path=x\n",
        b"2 path=x\n",
        b"6 path=x\n",
        b"99 path=x\n",
        b"-9 path=x\n",
        b"00000000000000000009 path=x\n",
    ],
)
def test_tar_pax_record_of_a_wrong_length_is_refused(record: bytes, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        header = tarfile.TarInfo("pax")
        header.type, header.size = tarfile.XHDTYPE, len(record)
        tar.addfile(header, io.BytesIO(record))
        add(tar, "a.png", b"content")
    with pytest.raises(DatasetError, match="an invalid pax header"):
        list(Tar(tmp_path / "x.tar").members())
