"""Shrunken images and shards: the same dataset for every packer, resumed after a stop."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from teach_once.configs.schema import Normalization, Packed
from teach_once.views.command import cli
from teach_once.views.datasets import load_dataset
from teach_once.views.images.folders import image_folder
from teach_once.views.packed.format import shard_path
from teach_once.views.packed.read import packed
from teach_once.views.packed.recode import Recode
from teach_once.views.splits import DatasetError, ImageSource
from tests.support.datasets.image_folders import write_image_folder
from tests.support.project import ROOT

CONFIG = """
dataset: {{type: imagefolder, root: {root}, normalization: {{mean: [0, 0, 0], std: [1, 1, 1]}}}}
views: {{augment: {{type: random-resized-crop, size_px: 16}}}}
teacher: {{arch: resnet8, weights: none.pt}}
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """Of a folder whose images have 12 pixels; two of them are larger."""
    root = write_image_folder(tmp_path / "data", per_class=8)
    for name, size in (("cat/00.png", (300, 200)), ("dog/07.png", (40, 160))):
        Image.effect_noise(size, 50).convert("RGB").save(root / "train" / name)
    (tmp_path / "mine.yaml").write_text(CONFIG.format(root=root))
    return tmp_path / "mine.yaml"


def pack(config: Path, file: Path, *options: str) -> ImageSource:
    assert cli(["pack", str(config), str(file), *options]) == 0
    return packed(file)


def same(first: ImageSource, second: ImageSource) -> bool:
    ids = np.arange(len(first.train))
    assert first.class_names == second.class_names
    assert first.digest_of(ids) == second.digest_of(ids)
    assert first.test_digest() == second.test_digest()
    for ours, theirs in ((first.train, second.train), (first.test, second.test)):
        every = np.arange(len(ours))
        assert ours.labels.tolist() == theirs.labels.tolist()
        assert ours.read_digests(every).tolist() == theirs.read_digests(every).tolist()
        for (a, _), (b, _) in zip(ours.read_each(every), theirs.read_each(every), strict=True):
            assert np.array_equal(a, b)
    return True


@pytest.mark.parametrize(
    ("recode", "size"),
    [
        (Recode(short_side_px=100), (150, 100)),
        (Recode(max_side_px=100), (100, 67)),
        (Recode(short_side_px=100, max_side_px=120), (120, 80)),
        (Recode(short_side_px=200), None),
        (Recode(quality=50), (300, 200)),
    ],
)
def test_the_smallest_of_the_limits_decides(recode: Recode, size: tuple[int, int] | None) -> None:
    assert recode.size_of(300, 200) == size


def test_larger_images_are_shrunk_and_others_keep_their_bytes(config: Path) -> None:
    folder = image_folder(config.parent / "data")
    small = pack(config, config.with_name("small.h5"), "--short-side", "20")
    shapes = [image.shape for image, _ in small.train.read_each(np.arange(16))]
    assert shapes == [(20, 30, 3), *[(12, 12, 3)] * 14, (80, 20, 3)]
    ids = np.arange(1, 15)
    assert (small.train.load(ids)[0] == folder.train.load(ids)[0]).all()
    assert (small.train.read_digests(ids) == folder.train.read_digests(ids)).all()
    assert (small.type, folder.type) == ("packed", "imagefolder")
    assert small.digest_of(np.arange(16)) != folder.digest_of(np.arange(16))
    first, _ = next(iter(small.train.read_each(np.arange(1))))
    large, _ = next(iter(folder.train.read_each(np.arange(1))))
    reduced = Image.fromarray(large).resize((30, 20), Image.Resampling.BOX)
    assert np.abs(first.astype(int) - np.asarray(reduced)).mean() < 12  # the picture, not noise


def test_the_bytes_do_not_depend_on_workers_or_shards(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("teach_once.views.packed.recode._FILES_AT_ONCE", 3)
    options = ("--max-side", "30", "--quality", "80")
    alone = pack(config, config.with_name("a.h5"), *options, "--workers", "0")
    together = pack(config, config.with_name("b.h5"), *options, "--workers", "2")
    shards = pack(config, config.with_name("c.json"), *options, "--shard-mb", "1")
    other = pack(config, config.with_name("d.h5"), "--max-side", "30", "--quality", "81")
    assert config.with_name("a.h5").read_bytes() == config.with_name("b.h5").read_bytes()
    assert same(alone, together)
    assert same(alone, shards)
    assert alone.digest_of(np.arange(16)) != other.digest_of(np.arange(16))


@pytest.fixture
def shards(config: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An index of nine shards of four images, or fewer."""
    monkeypatch.setattr("teach_once.views.packed.write._rows_per_shard", lambda *given: 4)
    assert cli(["pack", str(config), str(config.with_name("s.json"))]) == 0
    return config.with_name("s.json")


def test_shards_of_the_files_own_bytes_are_the_folder(shards: Path) -> None:
    assert sorted(path.name for path in shards.parent.glob("s-*")) == [
        f"s-{number:05d}.h5" for number in range(8)
    ]
    whole, folder = packed(shards), image_folder(shards.parent / "data")
    assert whole.type == "imagefolder"
    assert same(whole, folder)
    ids = np.array([15, 3, 4, 5, 0, 7, 8, 9, 10, 1])  # neighbors in two shards, and none
    for (a, _), (b, _) in zip(whole.train.read_each(ids), folder.train.read_each(ids), strict=True):
        assert np.array_equal(a, b)
    assert whole.train.name_of(5) == f"train sample 5 of {shard_path(shards, 1)}"
    dataset = load_dataset(
        Packed(
            type="packed",
            file=str(shards),
            max_per_class=3,
            normalization=Normalization(mean=(0.5,) * 3, std=(0.5,) * 3),
        )
    )
    assert dataset.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert dataset.digest == folder.digest_of(np.array([0, 1, 2, 8, 9, 10]))


def test_shards_that_are_packed_are_not_packed_again(
    config: Path, shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    numbers = [shard_path(shards, number).stat().st_ino for number in range(8)]
    shard_path(shards, 2).unlink()
    shard_path(shards, 5).write_bytes(b"damaged")
    assert cli(["pack", str(config), str(shards)]) == 0
    told = capsys.readouterr().out
    assert "6 of 8 shards are already packed" in told
    assert "8 images in " in told
    again = [shard_path(shards, number).stat().st_ino for number in range(8)]
    assert [a == b for a, b in zip(numbers, again, strict=True)].count(True) in (6, 7)
    assert same(packed(shards), image_folder(config.parent / "data"))
    assert cli(["pack", str(config), str(shards), "--short-side", "8"]) == 0
    assert "are already packed" not in capsys.readouterr().out
    Image.new("RGB", (9, 9)).save(config.parent / "data" / "train" / "cat" / "01.png")
    assert cli(["pack", str(config), str(shards), "--short-side", "8"]) == 0
    assert "are already packed" not in capsys.readouterr().out


KILLED = """
import os, sys
from teach_once.views.packed import write as pack_shards
from teach_once.views.command import cli
pack_shards._rows_per_shard = lambda *given: 4
pack, packed = pack_shards.pack_encoded, []
def pack_three(*args, **options):
    if len(packed) == 3:
        advance, options["advance"] = options["advance"], lambda n: os.kill(os.getpid(), 9)
    packed.append(pack(*args, **options))
pack_shards.pack_encoded = pack_three
cli(sys.argv[1:])
"""


def test_a_killed_pack_resumes_with_the_first_missing_shard(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    index = config.with_name("s.json")
    command = ["pack", str(config), str(index), "--short-side", "20", "--workers", "2"]
    ended = subprocess.run([sys.executable, "-c", KILLED, *command], cwd=ROOT, check=False)
    assert ended.returncode == -signal.SIGKILL
    assert len(list(config.parent.glob("s-*.h5"))) == 3
    with pytest.raises(DatasetError, match=r"file .*s\.json not found"):
        packed(index)
    monkeypatch.setattr("teach_once.views.packed.write._rows_per_shard", lambda *given: 4)
    resumed = pack(config, index, *command[3:])
    assert "3 of 8 shards are already packed" in capsys.readouterr().out
    assert same(resumed, pack(config, config.with_name("whole.h5"), *command[3:]))
    assert not list(config.parent.glob(".*.tmp"))


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda index: shard_path(index, 3).unlink(), r"file .*s-00003\.h5 not found"),
        (
            lambda index: shard_path(index, 3).write_bytes(b"x" * 99),
            "does not contain packed images",
        ),
        (
            lambda index: shard_path(index, 1).rename(shard_path(index, 3)),
            r"file .*s-00001\.h5 not found",
        ),
        (
            lambda index: shard_path(index, 2).write_bytes(shard_path(index, 1).read_bytes()),
            r"s-00002\.h5 is not the shard in .*s\.json",
        ),
        (lambda index: index.write_text("{}"), "is not an index of shards: format: Field required"),
        (lambda index: index.write_bytes(b"\xff"), "is not valid JSON"),
        (
            lambda index: index.write_text(
                index.read_text().replace('"samples": 4', '"samples": 3')
            ),
            "it does not match its checksum",
        ),
        (lambda index: (index.unlink(), index.mkdir()), "is a folder, expected a regular file"),
    ],
)
def test_an_index_whose_shards_do_not_fit_is_refused(
    damage: Callable[[Path], object], told: str, shards: Path
) -> None:
    damage(shards)
    with pytest.raises(DatasetError, match=told):
        packed(shards)


def test_every_flipped_bit_of_an_index_is_noticed_or_harmless(shards: Path) -> None:
    content, sound = shards.read_bytes(), image_folder(shards.parent / "data")
    for bit in np.random.default_rng(0).integers(0, 8 * len(content), 60).tolist():
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        shards.write_bytes(bytes(flipped))
        try:
            found = packed(shards)
        except DatasetError:
            continue
        assert json.loads(flipped) == json.loads(content)
        assert same(found, sound)


def test_an_image_that_cannot_be_read_is_named_whoever_reads_it(config: Path) -> None:
    bad = config.parent / "data" / "train" / "dog" / "05.png"
    bad.write_bytes(b"no image")
    for workers in ("0", "2"):
        command = ["pack", str(config), str(config.with_name("x.json"))]
        found = subprocess.run(
            [sys.executable, "-m", "views", *command, "--short-side", "8", "--workers", workers],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        assert found.returncode == 2
        assert f"cannot read the image {bad}: its format is not one of" in found.stderr
        assert "Traceback" not in found.stderr
    assert not config.with_name("x.json").exists()
