"""Packed images at s3://bucket/prefix: copied into the mirror, verified, bounded."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from teach_once.configs.schema import Normalization, Packed
from teach_once.runtime.machine.urls import path_or_url
from teach_once.store.errors import CacheFull
from teach_once.store.place.mirror_folder import MirrorFolder, use_mirror, used_mirror
from teach_once.train.cli.commands import cli as train
from teach_once.views.command import cli as views
from teach_once.views.datasets import load_dataset
from teach_once.views.packed.format import shard_path
from teach_once.views.packed.read import packed
from teach_once.views.splits import DatasetError, ImageSource
from tests.support.caches.damage import flip
from tests.support.caches.object_store import Server, emptied
from tests.support.datasets.image_folders import write_image_folder

CONFIG = """
dataset: {{type: imagefolder, root: {root}, normalization: {{mean: [0, 0, 0], std: [1, 1, 1]}}}}
views: {{augment: {{type: random-resized-crop, size_px: 16}}, count: 2}}
teacher: {{arch: resnet8, weights: none.pt}}
training: {{epochs: 1, batch_size: 4, learning_rate: 0.01, schedule: {{type: onecycle}}}}
"""
INDEX, FILE = "s3://bucket/photos/s.json", "s3://bucket/photos/one.h5"
NUM_SHARDS = 8
PLENTY = 10**9


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with mine.yaml, its images in s.json and eight shards, and in one.h5."""
    folder = tmp_path_factory.mktemp("made")
    root = write_image_folder(folder / "data", per_class=8)
    (folder / "mine.yaml").write_text(CONFIG.format(root=root))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("teach_once.views.packed.write._rows_per_shard", lambda *given: 4)
        for name in ("s.json", "one.h5"):
            assert views(["pack", str(folder / "mine.yaml"), str(folder / name)]) == 0
    return folder


@pytest.fixture
def server(
    running_server: Server, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Server]:
    """The packed files at s3://bucket/photos; in a folder that holds nothing."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("teach_once.store.place.mirror_files._read_here", {})
    earlier = used_mirror()
    use_mirror(MirrorFolder(tmp_path / "mirror", PLENTY))
    with emptied(running_server):
        for file in (*made.glob("s*"), made / "one.h5"):
            running_server.ask("PUT", f"photos/{file.name}", file.read_bytes())
        running_server.requests.clear()
        yield running_server
    use_mirror(earlier)


def opened(url: str) -> ImageSource:
    return packed(path_or_url(url))


def every_image(source: ImageSource) -> list[bytes]:
    return [
        image.tobytes()
        for split in (source.train, source.test)
        for image, _ in split.read_each(np.arange(len(split)))
    ]


def asked(server: Server) -> list[str]:
    """The names of files of which bytes were asked for since the last call."""
    found = [path.rpartition("/")[2] for method, path in server.requests if method == "GET"]
    server.requests.clear()
    return found


def test_shards_at_a_url_are_the_dataset_and_are_fetched_once(server: Server, made: Path) -> None:
    expected = every_image(packed(made / "s.json"))
    assert every_image(opened(INDEX)) == expected
    names = {shard_path(made / "s.json", number).name for number in range(NUM_SHARDS)}
    found = asked(server)
    assert set(found) == {"s.json"} | names
    assert len(found) == 1 + NUM_SHARDS
    assert every_image(opened(INDEX)) == expected
    assert asked(server) == ["s.json"]
    config = Packed(
        type="packed", file=INDEX, normalization=Normalization(mean=(0.5,) * 3, std=(0.5,) * 3)
    )
    assert load_dataset(config).digest == packed(made / "s.json").digest_of(np.arange(16))


def test_one_file_at_a_url_is_compared_with_the_head_there(server: Server, made: Path) -> None:
    expected = every_image(packed(made / "one.h5"))
    assert every_image(opened(FILE)) == expected
    assert asked(server) == ["one.h5"] * 2
    assert every_image(opened(FILE)) == expected
    assert asked(server) == ["one.h5"]
    other = (made / "s-00000.h5").read_bytes()  # another dataset, by the same name
    server.ask("PUT", "photos/one.h5", other)
    assert len(opened(FILE).train) == 4


def test_a_large_file_is_fetched_in_parts(
    server: Server, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("teach_once.store.place.mirror_files._PART_BYTES", 1000)
    assert every_image(opened(FILE)) == every_image(packed(made / "one.h5"))
    size = (made / "one.h5").stat().st_size
    assert len(asked(server)) == 1 + -(-size // 1000)


@pytest.mark.parametrize("place", [-1, 40])  # the last sample's bytes; the head
def test_damage_there_is_found_on_arrival_and_named(
    server: Server, made: Path, place: int, tmp_path: Path
) -> None:
    content = bytearray((made / "s-00003.h5").read_bytes())
    stored = packed(made / "s.json").train.name_of(15)
    assert "s-00003" in stored
    content[place if place > 0 else _last_sample_byte(made / "s-00003.h5")] ^= 1
    server.ask("PUT", "photos/s-00003.h5", bytes(content))
    with pytest.raises(DatasetError, match=r"s3://bucket/photos/s-00003\.h5.*damaged") as error:
        opened(INDEX)
    assert "fix: copy the packed files there again" in str(error.value)
    assert not list((tmp_path / "mirror").rglob("*00003*"))


def _last_sample_byte(file: Path) -> int:
    from teach_once.views.packed.format import PackedFile

    place = PackedFile(file).header.splits["train"]["bytes"]
    return place.offset + place.num_bytes - 1


def test_another_shard_of_that_name_is_refused(server: Server, made: Path) -> None:
    server.ask("PUT", "photos/s-00002.h5", (made / "s-00001.h5").read_bytes())
    with pytest.raises(
        DatasetError, match=r"s-00002.h5 is damaged: it differs from the file in s3://"
    ):
        opened(INDEX)


def test_damage_in_the_mirror_is_named_with_what_mends_it(server: Server, tmp_path: Path) -> None:
    opened(INDEX)
    shard = tmp_path / "mirror/bucket/photos/s-00001.h5"
    flip(shard, _last_sample_byte(shard))
    with pytest.raises(DatasetError, match=r"s-00001\.h5 is damaged: train sample") as error:
        every_image(opened(INDEX))
    assert f"fix: rm {shard.parent}/*.h5; then run the same command again" in str(error.value)
    shard.unlink()
    asked(server)
    every_image(opened(INDEX))
    assert asked(server) == ["s.json", "s-00001.h5"]


def test_the_mirror_is_bounded_and_removes_what_is_older(
    server: Server, made: Path, tmp_path: Path
) -> None:
    files = [made / "s.json", *(shard_path(made / "s.json", n) for n in range(NUM_SHARDS))]
    size = sum(file.stat().st_size for file in files)
    use_mirror(MirrorFolder(tmp_path / "mirror", size - 1))
    with pytest.raises(DatasetError, match=r"packed images, .* need .*\n  fix: --mirror-gb"):
        opened(INDEX)
    use_mirror(MirrorFolder(tmp_path / "mirror", size + 10))
    older = tmp_path / "mirror/bucket/other/old.h5"
    older.parent.mkdir(parents=True)
    older.write_bytes(bytes(100))
    os.utime(older, (1, 1))
    assert len(every_image(opened(INDEX))) == 32
    assert not older.exists()
    with used_mirror().locked() as root, pytest.raises(CacheFull, match="packed images"):
        used_mirror().make_room(root, 50)  # as a view of teacher outputs would


def test_what_is_not_there_is_named(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(DatasetError, match=r"dataset.file: object s3://bucket/photos.* not found"):
        opened("s3://bucket/photos/absent.json")
    server.ask("PUT", "photos/no.h5", b"nothing of ours")
    with pytest.raises(
        DatasetError, match=r"s3://bucket/photos/no\.h5 does not contain packed images"
    ):
        opened("s3://bucket/photos/no.h5")


def test_a_teacher_trains_on_packed_images_at_a_url(
    server: Server, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    packed_config = "{type: packed, file: " + INDEX + ", "
    text = (made / "mine.yaml").read_text()
    _, _, rest = text.partition("normalization")
    (tmp_path / "mine.yaml").write_text(f"\ndataset: {packed_config}normalization{rest}")
    call = ["teacher", "mine.yaml", "--workers", "1", "--mirror", "held"]
    assert train(call) == 0, capsys.readouterr().err
    assert (tmp_path / "none.pt").is_file()
    assert len(list(Path("held/bucket/photos").glob("*.h5"))) == NUM_SHARDS
