"""All bad images are found: by `python -m views check`, and by headers before a pass."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from teach_once.nets.networks.zoo import build
from teach_once.nets.weights.files import save_atomically
from teach_once.precompute.command import cli as precompute
from teach_once.views.command import cli
from tests.support.datasets.image_folders import write_image_folder
from tests.support.datasets.other_formats import pack_again, picture, write_config


@pytest.fixture
def config(tmp_path: Path) -> Path:
    write_image_folder(tmp_path / "data")
    file = write_config(tmp_path / "t.yaml", "imagefolder", root="data")
    file.write_text(file.read_text().replace("  packed: packed.json\n", ""))
    save_atomically(build("resnet8", num_classes=2, seed=1).state_dict(), tmp_path / "w.pt")
    return file


def test_check_finds_every_sound_image(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pages = [Image.new("RGB", (12, 12), (page, 0, 0)) for page in (1, 2)]
    pages[0].save(config.parent / "data/test/cat/a.tif", save_all=True, append_images=pages[1:])
    assert cli(["check", str(config), "--workers", "0"]) == 0
    told = capsys.readouterr().out
    assert "checked 6 training images and 7 test images; 1 have several pages" in told
    assert "every image can be read" in told


@pytest.mark.parametrize("workers", ["0", "2"])
def test_check_lists_all_bad_images_of_both_splits(
    config: Path, workers: str, capsys: pytest.CaptureFixture[str]
) -> None:
    data = config.parent / "data"
    (data / "train/cat/00.png").write_bytes(picture(1)[:100])  # only its pixels are damaged
    (data / "train/dog/02.png").write_bytes(b"<!DOCTYPE html>")
    (data / "test/dog/01.png").write_bytes(b"")
    assert cli(["check", str(config), "--workers", workers]) == 2
    told = capsys.readouterr()
    lines = [line for line in told.out.splitlines() if line.startswith("  ")]
    assert len(lines) == 3
    assert "train/cat/00.png" in lines[0]
    assert "train/dog/02.png: it is an HTML page" in lines[1]
    assert "test/dog/01.png: it is empty" in lines[2]
    assert "error: 3 images cannot be read" in told.err


def test_pass_with_weights_of_other_classes_lists_those_of_the_dataset(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_atomically(build("resnet8", num_classes=3, seed=1).state_dict(), config.parent / "w.pt")
    call = [str(config), "--caches", str(config.parent / "caches"), "--device", "cpu"]
    assert precompute(call) == 2
    error = capsys.readouterr().err
    assert "The weights have 3 classes, the dataset data has 2: cat, dog" in error
    assert "fix: remove folders that are not classes" in error


def test_pass_over_another_dataset_is_not_called_a_change(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = config.parent
    call = [str(config), "--caches", str(root / "caches"), "--device", "cpu"]
    assert precompute(call) == 0
    (root / "data/train/cat/new.png").write_bytes(picture(3))
    assert precompute([*call, "--plan"]) == 0
    assert "the dataset has changed since" in capsys.readouterr().out
    (root / "data/train/cat/new.png").unlink()
    write_image_folder(root / "other", classes=["ant", "bee"], size=13)
    assert precompute([*call, "--plan", f"dataset.root={root / 'other'}"]) == 0
    assert "has changed" not in capsys.readouterr().out


def test_check_reads_tar_shards_before_and_after_they_are_packed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import io
    import tarfile

    for split in ("train", "test"):
        with tarfile.open(tmp_path / f"{split}.tar", "w") as tar:
            for name, content in (("0.png", picture(0)), ("0.cls", b"0"), ("1.png", picture(1))):
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
            entry = tarfile.TarInfo("1.cls")
            entry.size = 1
            tar.addfile(entry, io.BytesIO(b"1"))
    file = write_config(tmp_path / "t.yaml", "webdataset", root=".")
    for _ in range(2):
        assert cli(["check", str(file), "--workers", "0"]) == 0
        assert "checked 2 training images and 2 test images" in capsys.readouterr().out
        pack_again(file)
        capsys.readouterr()


def test_pass_refuses_bad_headers_of_both_splits_before_it_begins(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, caches = config.parent / "data", config.parent / "caches"
    sound = (data / "test/dog/01.png").read_bytes()
    (data / "train/dog/02.png").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    (data / "test/dog/01.png").write_bytes(b"")
    call = [str(config), "--caches", str(caches), "--device", "cpu"]
    assert precompute(call) == 2
    error = capsys.readouterr().err
    assert "2 images cannot be read" in error
    assert "02.png: it is a Git LFS pointer" in error
    assert "01.png: it is empty" in error
    assert not list(caches.glob("*/teacher.zarr"))
    for name in ("train/dog/02.png", "test/dog/01.png"):
        (data / name).write_bytes(sound)
    assert precompute(call) == 0, capsys.readouterr().err
