"""Real image folders: subfolders, leftovers, other suffixes and names of splits."""

from __future__ import annotations

import io
import os
import shutil
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from teach_once.configs.load import load_teacher
from teach_once.configs.schema import ImageFolder, Normalization
from teach_once.nets.networks.zoo import build
from teach_once.nets.weights.files import save_atomically
from teach_once.precompute.command import cli as precompute
from teach_once.runtime.machine.torchvision_shim import import_torchvision
from teach_once.views.command import cli
from teach_once.views.datasets import Dataset, DatasetError, load_dataset
from teach_once.views.images.decode import FORMATS
from teach_once.views.images.listing import IMAGE_SUFFIXES
from tests.support.datasets.image_folders import write_image_folder
from tests.support.datasets.other_formats import pack_again, picture, write_config

RGB = Normalization(mean=(0.5,) * 3, std=(0.5,) * 3)


def opened(root: Path, kept_in: Path | None = None, **keys: object) -> Dataset:
    config = ImageFolder(type="imagefolder", root=str(root), normalization=RGB, **keys)
    return load_dataset(config, kept_in)


def names_of(data: Dataset, root: Path, split: str = "train") -> list[str]:
    paths = {"train": data.train.paths, "test": data.test.paths}[split]
    return [path.relative_to(root).as_posix() for path in paths or []]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_image_folder(tmp_path / "data")


def test_folder_takes_every_ending_of_the_formats_that_it_decodes(root: Path) -> None:
    registered = Image.registered_extensions()
    Image.init()
    known = {end for end, kind in registered.items() if kind in FORMATS} - {".pfm", ".mpo"}
    assert known <= set(IMAGE_SUFFIXES)
    for number, ending in enumerate(IMAGE_SUFFIXES):
        name = f"x{number:02d}{ending.upper() if number % 2 else ending}"
        (root / "train" / "cat" / name).write_bytes(picture(number))
    data = opened(root)
    assert len(data.train) == 6 + len(IMAGE_SUFFIXES)
    assert data.notes == ()
    assert len(data.train.images) == len(data.train)


def test_folder_of_several_pages_shows_the_first(root: Path) -> None:
    pages = [Image.new("RGB", (12, 12), (200 * page, 0, 0)) for page in (1, 0)]
    for ending in ("tif", "gif"):
        pages[0].save(root / f"train/cat/a.{ending}", save_all=True, append_images=pages[1:])
    data = opened(root)
    assert names_of(data, root)[3:5] == ["train/cat/a.gif", "train/cat/a.tif"]
    assert (data.train.images[3:5] == [200, 0, 0]).all()


def test_folder_walks_subfolders_in_the_order_of_torchvision(root: Path, tmp_path: Path) -> None:
    import_torchvision()
    from torchvision.datasets import ImageFolder as TheirFolder

    for number, name in enumerate(("b/2.png", "b/c/1.png", "b-a/1.png", "a.d/0.png", "zz.png")):
        file = root / "train" / "cat" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(picture(number))
    theirs = TheirFolder(str(root / "train"))
    for _ in range(2):
        data = opened(root, tmp_path / "caches")
        assert [str(path) for path in data.train.paths or []] == [
            path for path, _ in theirs.samples
        ]
        assert data.train.labels.tolist() == theirs.targets
        for folder, _, _ in os.walk(root):
            os.utime(folder, (1, 1))


def test_folder_packed_from_subfolders_is_the_same_dataset(root: Path, tmp_path: Path) -> None:
    (root / "train/cat/more").mkdir()
    (root / "train/cat/more/00.png").write_bytes(picture(7))
    config = write_config(tmp_path / "t.yaml", "imagefolder", root="data")
    text = config.read_text().replace("  packed: packed.json\n", "")
    config.write_text(text)
    assert cli(["pack", str(config), str(tmp_path / "p.h5"), "--encoded"]) == 0
    packed = text.replace("type: imagefolder", "type: packed").replace("root: data", "file: p.h5")
    config.write_text(packed)
    again, data = load_dataset(load_teacher(config).dataset), opened(root)
    assert (again.digest, again.tested_digest) == (data.digest, data.tested_digest)
    assert len(again.train) == 7


def test_folder_index_notices_a_file_in_a_subfolder(root: Path, tmp_path: Path) -> None:
    deep = root / "train/cat/a/b"
    deep.mkdir(parents=True)
    (deep / "0.png").write_bytes(picture(1))
    for folder, _, _ in os.walk(root):
        os.utime(folder, (1, 1))
    assert len(opened(root, tmp_path / "caches").train) == 7
    (deep / "1.png").write_bytes(picture(2))
    assert len(opened(root, tmp_path / "caches").train) == 8


def test_folder_link_to_a_folder_around_it_is_named_at_any_depth(root: Path) -> None:
    for here, there in (("cat", "dog"), ("dog", "cat")):
        (root / f"train/{here}/loop").symlink_to(root / f"train/{there}")
    with pytest.raises(DatasetError, match="is a symbolic link to a parent folder"):
        opened(root)


def leave_behind(folder: Path) -> None:
    (folder / ".ipynb_checkpoints").mkdir()
    (folder / ".ipynb_checkpoints" / "0-checkpoint.png").write_bytes(picture(0))
    (folder / "__MACOSX").mkdir()
    (folder / "__MACOSX" / "._0.png").write_bytes(b"\0\5\26\7")
    (folder / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
    (folder / "._0.png").write_bytes(b"\0\5\26\7")


def test_folder_skips_names_that_programs_leave_behind_and_counts_them(
    root: Path, tmp_path: Path
) -> None:
    before = opened(root)
    for folder in ("train", "train/cat", "test", "test/dog"):
        leave_behind(root / folder)
    for _ in range(2):  # listed, then from the index
        data = opened(root, tmp_path / "caches")
        assert data.class_names == ("cat", "dog")
        assert (data.digest, data.tested_digest) == (before.digest, before.tested_digest)
        assert data.notes == tuple(
            f"note: left out of {root / split}: 8 hidden (named .* or __MACOSX)"
            for split in ("train", "test")
        )
        for folder, _, _ in os.walk(root):
            os.utime(folder, (1, 1))


def test_folder_counts_files_that_are_no_images_by_their_endings(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a.heic", "b.HEIC", "c.txt", "README"):
        (root / "train/cat" / name).write_bytes(b"x")
    (root / "train/loose.png").write_bytes(picture(1))
    note = (
        "4 with non-image suffixes (2 .heic, 1 without a suffix, 1 .txt); 1 outside class folders"
    )
    assert opened(root).notes == (f"note: left out of {root / 'train'}: {note}",)
    config = write_config(root.parent / "t.yaml", "imagefolder", root="data")
    config.write_text(config.read_text().replace("  packed: packed.json\n", ""))
    assert cli(["pack", str(config), str(root / "p.h5")]) == 0
    assert note in capsys.readouterr().out.replace("\n", " ")


def test_tar_shards_skip_hidden_members_between_the_files_of_a_sample(tmp_path: Path) -> None:
    (tmp_path / "tars").mkdir()
    members = [
        *(("__MACOSX/0.png", b"?"), ("a/._0.png", b"?"), ("a/0.tiff", picture(0))),
        *(("a/._0.cls", b"?"), ("a/0.cls", b"0"), (".ipynb_checkpoints/1.png", picture(9))),
        *(("./1.jfif", picture(1)), ("./1.cls", b"1")),
    ]
    for split in ("train", "test"):
        with tarfile.open(tmp_path / f"tars/{split}.tar", "w") as tar:
            for name, content in members:
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
        (tmp_path / f"tars/._{split}.tar").write_bytes(b"\0\5\26\7")
    config = write_config(tmp_path / "t.yaml", "webdataset", root="tars")
    data = load_dataset(load_teacher(pack_again(config)).dataset)
    assert data.train.labels.tolist() == data.test.labels.tolist() == [0, 1]


# ---- splits


@pytest.mark.parametrize("name", ["val", "valid", "validation"])
def test_folder_of_test_images_may_have_any_usual_name(root: Path, name: str) -> None:
    (root / "test").rename(root / name)
    assert len(opened(root).test) == 6


def test_folder_of_test_images_is_chosen_by_name(root: Path) -> None:
    shutil.copytree(root / "test", root / "val")
    (root / "val/cat/00.png").unlink()
    assert (len(opened(root).test), len(opened(root, test="val").test)) == (6, 5)
    (root / "test").rename(root / "photos-of-may")
    assert len(opened(root, test="photos-of-may").test) == 6


def test_folder_of_test_images_without_labels_names_the_one_with_labels(root: Path) -> None:
    (root / "test").rename(root / "val")
    (root / "test").mkdir()
    (root / "test/0.png").write_bytes(picture(0))
    with pytest.raises(DatasetError, match=r"no labels\n  fix: set dataset\.test=val$"):
        opened(root)
    (root / "test/0.png").unlink()
    (root / "test").rmdir()
    (root / "val").rename(root / "exam")
    with pytest.raises(DatasetError, match=r"it has exam\n  fix: set dataset\.test=exam$"):
        opened(root)


@pytest.mark.parametrize("inside", ["train", "."])
def test_folder_without_test_images_holds_out_a_fraction_by_name(root: Path, inside: str) -> None:
    shutil.rmtree(root / "test")
    for number in range(40):
        (root / "train/cat" / f"x{number}.png").write_bytes(picture(number))
    if inside == ".":
        for name in ("cat", "dog"):
            (root / "train" / name).rename(root / name)
        (root / "train").rmdir()
    with pytest.raises(DatasetError, match=r"dataset\.test_fraction=0\.2"):
        opened(root)
    data = opened(root, test_fraction=0.3)
    train, test = names_of(data, root), names_of(data, root, "test")
    assert 5 < len(test) < 23
    assert len(set(train) | set(test)) == len(train) + len(test) == 46
    assert len(data.test.images) == len(test)
    assert names_of(opened(root, test_fraction=0.3, test_seed=1), root, "test") != test
    (root / inside / "dog/zz.png").write_bytes(picture(50))  # another file moves no other one
    grown = opened(root, test_fraction=0.3)
    assert set(train) <= set(names_of(grown, root))
    assert set(test) <= set(names_of(grown, root, "test"))
    assert grown.digest != data.digest or grown.tested_digest != data.tested_digest
    assert len({data.digest, data.tested_digest, opened(root, test_fraction=0.2).digest}) == 3


def test_folder_with_test_images_refuses_a_fraction(root: Path) -> None:
    with pytest.raises(
        DatasetError, match=r"the folder .*test exists\n  fix: set dataset\.test_frac"
    ):
        opened(root, test_fraction=0.2)


# ---- the order of classes


@pytest.fixture
def months(tmp_path: Path) -> Path:
    names = [str(month) for month in range(1, 13)]
    return write_image_folder(tmp_path / "data", per_class=1, classes=names)


def test_class_names_file_numbers_the_classes_of_a_folder(months: Path, tmp_path: Path) -> None:
    names = [str(month) for month in range(1, 13)]
    (months / "classes.txt").write_text("\n".join(names) + "\n")
    plain, ordered = opened(months), opened(months, class_names="classes.txt")
    assert plain.class_names == tuple(sorted(names))
    assert ordered.class_names == tuple(names)
    for data in (ordered, opened(months, tmp_path / "caches", class_names="classes.txt")):
        for split, labels in (("train", data.train.labels), ("test", data.test.labels)):
            folders = [name.split("/")[1] for name in names_of(data, months, split)]
            assert [names[label] for label in labels] == folders
        assert (data.train.images == plain.train.images).all()  # the same files in the same order
    assert ordered.digest != plain.digest
    (months / "sorted.txt").write_text("\n".join(sorted(names)))
    same = opened(months, class_names="sorted.txt")
    assert (same.digest, same.tested_digest) == (plain.digest, plain.tested_digest)
    assert opened(months, tmp_path / "caches").class_names == plain.class_names


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        ("1 2 3", r"it lacks 10, 11, 12, 4, 5 and 4 more"),
        ("1 2 3 4 5 6 7 8 9 10 11 13", "it lacks 12; folder 13 not found"),
        ("1 2 3 4 5 6 7 8 9 10 11 12 12", "duplicate name"),
    ],
)
def test_class_names_file_of_other_folders_is_refused(months: Path, lines: str, told: str) -> None:
    (months / "classes.txt").write_text(lines.replace(" ", "\n"))
    with pytest.raises(DatasetError, match=rf"classes\.txt does not list the 12 folders .*{told}"):
        opened(months, class_names="classes.txt")


def command_of(hint: str) -> str:
    return hint.partition("list its order: ")[2].partition(", and set ")[0]


def test_order_hint_names_both_orders_unless_a_file_decides(months: Path) -> None:
    hint = opened(months).order_hint
    assert "(1, 10, 11, 12, 2, ...); timm numbers them 1, 2, 3, 4, 5, ..." in hint
    assert os.system(command_of(hint)) == 0
    chosen = opened(months, class_names="classes.txt")
    assert chosen.order_hint == ""
    assert chosen.class_names == tuple(str(month) for month in range(1, 13))


def test_order_hint_disregards_case_as_timm_does(tmp_path: Path) -> None:
    root = write_image_folder(tmp_path / "data", per_class=1, classes=("Cat", "ant"))
    hint = opened(root).order_hint
    assert "(Cat, ant, ...); timm numbers them ant, Cat, ..." in hint
    assert os.system(command_of(hint)) == 0
    assert (root / "classes.txt").read_text() == "ant\nCat\n"


def test_pass_with_weights_from_elsewhere_prints_the_order_hint(
    months: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_atomically(build("resnet8", num_classes=12, seed=1).state_dict(), tmp_path / "w.pt")
    config = write_config(tmp_path / "t.yaml", "imagefolder", root="data")
    config.write_text(config.read_text().replace("  packed: packed.json\n", ""))
    call = [str(config), "--caches", str(tmp_path / "caches"), "--plan"]
    (months / "classes.txt").write_text("\n".join(map(str, range(1, 13))))
    assert precompute(call) == 0
    assert "hint: classes are numbered in alphabetical order" in capsys.readouterr().out
    assert precompute([*call, "dataset.class_names=classes.txt"]) == 0
    assert "hint: classes" not in capsys.readouterr().out
