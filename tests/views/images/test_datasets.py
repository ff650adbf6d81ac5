"""Datasets: digits equal scikit-learn's; folders are read in a fixed order or rejected by name."""

from __future__ import annotations

import dataclasses
import hashlib
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from teach_once.configs.schema import Cifar, Digits, ImageFolder, Normalization
from teach_once.precompute.command import cli as precompute
from teach_once.runtime.machine.torchvision_shim import import_torchvision
from teach_once.train.cli.commands import cli as train
from teach_once.views.datasets import Dataset, DatasetError, load_dataset
from tests.support.datasets.image_folders import write_image_folder

GRAY = Normalization(mean=(0.5,), std=(0.5,))
RGB = Normalization(mean=(0.5,) * 3, std=(0.5,) * 3)


def folder(root: Path, limit: int | None = None) -> ImageFolder:
    return ImageFolder(type="imagefolder", root=str(root), normalization=RGB, max_per_class=limit)


@pytest.mark.usefixtures("all_digits")
def test_digits_are_scikit_learns_own() -> None:
    from sklearn.datasets import load_digits  # takes seconds, which every worker would spend

    ours = load_dataset(Digits(type="digits", normalization=GRAY))
    theirs = load_digits()
    images = np.concatenate([ours.train.images, ours.test.images])[..., 0]
    assert (images == theirs.images * 15).all()
    assert (np.concatenate([ours.train.labels, ours.test.labels]) == theirs.target).all()
    assert (len(ours.train), len(ours.test), ours.num_classes) == (1000, 797, 10)


def test_a_limit_keeps_the_first_of_each_class_and_changes_the_digest() -> None:
    whole = load_dataset(Digits(type="digits", normalization=GRAY))
    few = load_dataset(Digits(type="digits", normalization=GRAY, max_per_class=3))
    assert np.bincount(few.train.labels).tolist() == [3] * 10
    labels = whole.train.labels.tolist()
    first = [i for i, label in enumerate(labels) if labels[:i].count(label) < 3]
    assert (few.train.images == whole.train.images[first]).all()  # in the order of the whole
    assert (few.train.images[0] == whole.train.images[0]).all()
    assert few.digest != whole.digest
    assert len(few.test) == len(whole.test)


def test_held_out_samples_are_chosen_by_their_number_and_taken_from_training() -> None:
    def digits(**options: object) -> Dataset:
        return load_dataset(Digits(type="digits", normalization=GRAY, **options))

    whole, split = digits(), digits(validation_fraction=0.2)
    assert whole.validation is None
    assert split.validation is not None
    assert 150 < len(split.validation) < 250
    assert len(split.train) + len(split.validation) == 1000
    together = np.concatenate([split.train.images, split.validation.images])
    assert sorted(map(bytes, together)) == sorted(map(bytes, whole.train.images))
    assert split.digest != whole.digest
    few = digits(validation_fraction=0.2, max_per_class=3)
    assert few.validation is not None
    assert (few.validation.labels == split.validation.labels).all()
    assert np.bincount(few.train.labels).tolist() == [3] * 10
    more = digits(validation_fraction=0.4)
    assert more.validation is not None
    assert set(map(bytes, split.validation.images)) <= set(map(bytes, more.validation.images))


# ---- CIFAR, in the form in which it is published


def write_cifar(root: Path, monkeypatch: pytest.MonkeyPatch, *, classes: int) -> np.ndarray:
    """Small files in CIFAR's own format, whose MD5s torchvision is told to expect."""
    import_torchvision()
    from torchvision import datasets

    kind = datasets.CIFAR10 if classes == 10 else datasets.CIFAR100
    folder = root / kind.base_folder
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    key = "labels" if classes == 10 else "fine_labels"
    lists, images = {}, []
    for which in ("train_list", "test_list"):
        entries = []
        for name, _ in getattr(kind, which):
            rows = rng.integers(0, 256, (4, 3072), dtype=np.uint8)
            images.append(rows)
            content = pickle.dumps({"data": rows, key: [0, 1, 2, 3]})
            (folder / name).write_bytes(content)
            entries.append([name, hashlib.md5(content).hexdigest()])
        lists[which] = entries
    names = [f"class {i}" for i in range(classes)]
    content = pickle.dumps({kind.meta["key"]: names})
    (folder / kind.meta["filename"]).write_bytes(content)
    monkeypatch.setattr(kind, "train_list", lists["train_list"])
    monkeypatch.setattr(kind, "test_list", lists["test_list"])
    monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": hashlib.md5(content).hexdigest()})
    return np.concatenate(images)


@pytest.mark.parametrize(("kind", "classes"), [("cifar10", 10), ("cifar100", 100)])
def test_cifar_is_read_from_its_published_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, classes: int
) -> None:
    rows = write_cifar(tmp_path, monkeypatch, classes=classes)
    data = load_dataset(Cifar(type=kind, root=str(tmp_path), normalization=RGB))
    assert data.num_classes == classes
    images = np.concatenate([data.train.images, data.test.images])
    assert (images == rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)).all()
    assert data.train.labels.tolist() == [0, 1, 2, 3] * (len(data.train) // 4)


def test_damaged_or_missing_cifar_is_refused_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_cifar(tmp_path, monkeypatch, classes=10)
    config = Cifar(type="cifar10", root=str(tmp_path), normalization=RGB, download=False)
    file = tmp_path / "cifar-10-batches-py" / "test_batch"
    file.write_bytes(file.read_bytes() + b"x")
    with pytest.raises(DatasetError, match=r"put cifar-10-python\.tar\.gz there"):
        load_dataset(config)
    config = dataclasses.replace(config, download=True, root=str(tmp_path / "elsewhere"))
    monkeypatch.setattr("torchvision.datasets.CIFAR10.url", "http://127.0.0.1:9/none.tar.gz")
    with pytest.raises(DatasetError, match=r"(?s)cannot be downloaded from .* fix: put"):
        load_dataset(config)


def test_a_folder_is_read_in_the_order_of_its_names(tmp_path: Path) -> None:
    write_image_folder(tmp_path)
    data = load_dataset(folder(tmp_path))
    assert data.class_names == ("cat", "dog")
    assert data.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    expected = np.asarray(Image.open(tmp_path / "train" / "dog" / "01.png"))
    assert (data.train.images[4] == expected).all()
    assert (data.train.read_some(np.array([4]))[0] == expected).all()


def test_val_may_stand_for_test(tmp_path: Path) -> None:
    write_image_folder(tmp_path)
    (tmp_path / "test").rename(tmp_path / "val")
    assert len(load_dataset(folder(tmp_path)).test) == 6


def test_the_digest_notices_a_renamed_a_moved_and_a_changed_file(tmp_path: Path) -> None:
    write_image_folder(tmp_path)
    digests = [load_dataset(folder(tmp_path)).digest]
    file = tmp_path / "train" / "cat" / "00.png"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    digests.append(load_dataset(folder(tmp_path)).digest)
    file.rename(file.with_name("03.png"))
    digests.append(load_dataset(folder(tmp_path)).digest)
    file.with_name("03.png").rename(tmp_path / "train" / "dog" / "03.png")
    digests.append(load_dataset(folder(tmp_path)).digest)
    assert len(set(digests)) == 4


def test_the_digest_notices_another_size_of_a_file_that_it_does_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("teach_once.views.images.folders.HASHED_FILES", 1)
    write_image_folder(tmp_path)
    digests = [load_dataset(folder(tmp_path)).digest]
    for file in sorted((tmp_path / "train").glob("*/*.png")):
        file.write_bytes(file.read_bytes() + b"\0")
        digests.append(load_dataset(folder(tmp_path)).digest)
    assert len(set(digests)) == 7


def test_gray_and_palette_images_become_rgb_and_exif_orientation_is_obeyed(tmp_path: Path) -> None:
    write_image_folder(tmp_path)
    gray = Image.fromarray(np.arange(144, dtype=np.uint8).reshape(12, 12))
    gray.save(tmp_path / "train" / "cat" / "00.png")
    turned = Image.Exif()
    turned[0x0112] = 3  # upside down
    gray.save(tmp_path / "train" / "cat" / "01.png", exif=turned)
    images = load_dataset(folder(tmp_path)).train.images
    assert images.shape == (6, 12, 12, 3)
    assert (images[0, ..., 0] == images[0, ..., 2]).all()
    assert (images[1] == images[0, ::-1, ::-1]).all()


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [
        ("L", "png"),
        ("LA", "png"),
        ("RGBA", "png"),
        ("P", "png"),
        ("1", "png"),
        ("I;16", "png"),
        ("CMYK", "jpg"),
        ("L", "jpg"),
        ("RGB", "webp"),
        ("RGBA", "webp"),
        ("RGB", "bmp"),
    ],
)
def test_images_of_any_mode_and_format_become_rgb_without_a_warning(
    tmp_path: Path, mode: str, suffix: str
) -> None:
    write_image_folder(tmp_path)
    image = Image.new("RGB", (12, 12), (200, 30, 90))
    options: dict[str, object] = {"lossless": True} if suffix == "webp" else {}
    if mode == "P":
        image, options = image.quantize(4), {"transparency": b"\x00\x80"}
    elif mode == "I;16":
        image = Image.new("I;16", (12, 12), 50)
    else:
        image = image.convert(mode)
    image.save(tmp_path / "train" / "cat" / f"zz.{suffix}", **options)
    pixels = load_dataset(folder(tmp_path)).train.images[3]
    assert pixels.shape == (12, 12, 3)
    if mode in ("RGB", "RGBA", "P"):
        assert np.abs(pixels.astype(int) - [200, 30, 90]).max() <= 2
    elif mode in ("L", "LA", "1", "I;16"):
        assert (pixels[..., 0] == pixels[..., 1]).all()


GRADIENT = np.linspace(0, 2**16 - 1, 12 * 12).astype(np.uint16).reshape(12, 12)


def pgm_of_16_bits(path: Path) -> None:
    path.write_bytes(b"P5 12 12 65535\n" + GRADIENT.astype(">u2").tobytes())


@pytest.mark.parametrize("is_turned", [False, True])
@pytest.mark.parametrize("suffix", [".png", ".pgm", ".tif.png"])
def test_gray_of_16_bits_keeps_its_upper_8(tmp_path: Path, suffix: str, is_turned: bool) -> None:
    root = write_image_folder(tmp_path / "data")
    path = root / "train" / "cat" / f"00{suffix}"
    expected = (GRADIENT >> 8).astype(np.uint8)
    if suffix == ".pgm":
        pgm_of_16_bits(path)
        (root / "train" / "cat" / "00.png").unlink()
    else:
        exif = Image.Exif()
        exif[0x0112] = 3 if is_turned else 1
        image = Image.fromarray(GRADIENT)
        image.save(path, format="TIFF" if "tif" in suffix else "PNG", exif=exif)
        expected = expected[::-1, ::-1] if is_turned else expected
    images = load_dataset(folder(root)).train.images
    sample = 1 if "tif" in suffix else 0
    assert (images[sample] == expected[:, :, None]).all()


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_an_image_without_a_known_white_is_refused_by_name(tmp_path: Path, dtype: type) -> None:
    root = write_image_folder(tmp_path / "data")
    path = root / "train" / "cat" / "00.png"
    Image.fromarray(GRADIENT.astype(dtype)).save(path, format="TIFF")
    with pytest.raises(DatasetError, match=r"00\.png has 32-bit pixels .*\n  fix: convert"):
        load_dataset(folder(root)).train.images.sum()


def broken(root: Path, mistake: str) -> None:
    write_image_folder(root)
    train = root / "train"
    if mistake == "no root":
        root.rename(root.with_name("elsewhere"))
    elif mistake == "no train":
        train.rename(root / "training")
    elif mistake == "no test":
        (root / "test").rename(root / "testing")
    elif mistake == "one class":
        for file in (train / "dog").iterdir():
            file.unlink()
        (train / "dog").rmdir()
    elif mistake == "empty class":
        for file in (train / "dog").iterdir():
            file.unlink()
    elif mistake == "unknown test class":
        (root / "test" / "dog").rename(root / "test" / "bird")
    elif mistake == "sizes":
        Image.new("RGB", (9, 12)).save(train / "dog" / "01.png")
    elif mistake == "unreadable":
        (train / "dog" / "01.png").write_bytes(b"\x89PNG but no more")


@pytest.mark.parametrize(
    ("mistake", "told"),
    [
        ("no root", r"folder .* not found"),
        ("no train", "has no folder train/"),
        (
            "no test",
            "has no folder test/, val/, valid/ or validation/ of test images; it has testing",
        ),
        ("one class", "at least two classes, found only 'cat'"),
        ("empty class", "dog has no images"),
        ("unknown test class", "classes that train/ lacks: bird"),
        ("sizes", r"is 12x12, .*01\.png is 9x12"),
        ("unreadable", r"cannot read the image .*dog/01\.png"),
    ],
)
def test_a_folder_that_cannot_be_used_is_refused_by_name(
    tmp_path: Path, mistake: str, told: str
) -> None:
    root = tmp_path / "data"
    broken(root, mistake)
    with pytest.raises(DatasetError, match=told):
        _ = load_dataset(folder(root)).train.images


def test_classes_that_no_test_image_shows_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = write_image_folder(tmp_path / "data", classes=["ant", "bee", "cat"])
    assert load_dataset(folder(root)).untested_hint == ""
    shutil.rmtree(root / "test" / "bee")
    for image in (root / "test" / "cat").iterdir():
        image.unlink()
    hint = "hint: no test image belongs to bee, cat, so test errors do not cover them"
    assert load_dataset(folder(root)).untested_hint == hint
    (tmp_path / "t.yaml").write_text(
        f"dataset: {{type: imagefolder, root: {root}, normalization: {{mean: [0, 0, 0], "
        "std: [1, 1, 1]}}\nviews: {augment: {type: center-crop}, count: 1}\n"
        f"teacher: {{arch: resnet8, weights: {tmp_path / 'w.pt'}}}\n"
        "training: {epochs: 1, batch_size: 3, learning_rate: 0.1, schedule: {type: onecycle}}\n"
    )
    (tmp_path / "s.yaml").write_text(
        f"teacher: {tmp_path / 't.yaml'}\nstudent: {{arch: resnet8}}\n"
        "training: {epochs: 1, batch_size: 3, learning_rate: 0.1, schedule: {type: onecycle}}\n"
        "methods: {ce: [{loss: ce}]}\n"
    )
    caches = ["--caches", str(tmp_path / "caches")]
    runs = ["--method", "ce", "--runs", str(tmp_path / "runs")]
    for program, call in (
        (train, ["plan", str(tmp_path / "s.yaml"), *caches, *runs, "--no-trial"]),
        (train, ["teacher", str(tmp_path / "t.yaml")]),
        (precompute, [str(tmp_path / "t.yaml"), *caches]),
        (train, ["student", str(tmp_path / "s.yaml"), *caches, *runs]),
    ):
        assert program(call) == 0, capsys.readouterr().err
        assert capsys.readouterr().out.count(hint) == 1, call
