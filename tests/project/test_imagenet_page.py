"""docs/tutorials/imagenet.md: its program creates the folders of the teacher's config."""

from __future__ import annotations

import io
import runpy
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from teach_once.configs.load import load_teacher
from teach_once.runtime.machine.torchvision_shim import import_torchvision
from teach_once.runtime.safe.safe_read import read_bounded
from teach_once.views.datasets import load_dataset
from tests.support.documents import code_blocks

DEVKIT = "ILSVRC2012_devkit_t12"
WNIDS = ("n01", "n02")
VAL_LABELS = (2, 1, 2)  # the kit counts from 1


def picture(shade: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (20, 16), (shade, shade, shade)).save(buffer, "JPEG")
    return buffer.getvalue()


def tar_of(files: dict[str, bytes], mode: str = "w") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as tar:  # type: ignore[call-overload]
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


def devkit() -> bytes:
    """The kit's two files: which number is which class, and the labels of the validation images."""
    from scipy.io import savemat

    names = ("ILSVRC2012_ID", "WNID", "words", "gloss", "num_children")
    rows = [(number, wnid, wnid, wnid, 0) for number, wnid in enumerate(WNIDS, start=1)]
    rows.append((3, "n00", "parent", "parent", 2))
    meta = io.BytesIO()
    savemat(meta, {"synsets": np.array(rows, dtype=[(name, object) for name in names])})
    labels = "".join(f"{label}\n" for label in VAL_LABELS)
    files = {
        f"{DEVKIT}/data/meta.mat": meta.getvalue(),
        f"{DEVKIT}/data/ILSVRC2012_validation_ground_truth.txt": labels.encode(),
    }
    return tar_of(files, "w:gz")


def test_the_archives_become_the_folders_that_the_config_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import_torchvision()
    from torchvision.datasets import imagenet

    classes = {f"{wnid}.tar": tar_of({f"{wnid}_1.JPEG": picture(9)}) for wnid in WNIDS}
    val = {f"ILSVRC2012_val_{n:08d}.JPEG": picture(60 * n) for n in range(len(VAL_LABELS))}
    folder = tmp_path / "data/imagenet"
    folder.mkdir(parents=True)
    for name, content in {
        f"{DEVKIT}.tar.gz": devkit(),
        "ILSVRC2012_img_train.tar": tar_of(classes),
        "ILSVRC2012_img_val.tar": tar_of(val),
    }.items():
        (folder / name).write_bytes(content)
    monkeypatch.setattr(imagenet, "_verify_archive", lambda *_: None)  # these are not the real ones
    monkeypatch.chdir(tmp_path)
    (tmp_path / "unpack.py").write_text(code_blocks("python")["unpack_imagenet.py"])
    runpy.run_path("unpack.py")
    assert capsys.readouterr().out == "2 images in train\n3 images in val\n"

    config = load_teacher("imagenet-resnet34", [f"dataset.root={folder}"])
    dataset = load_dataset(config.dataset)
    assert dataset.class_names == WNIDS
    assert dataset.test.labels.tolist() == [0, 1, 1]
    assert [Path(dataset.test.name_of(n)).name[-6] for n in range(3)] == ["1", "0", "2"]
    assert read_bounded(folder / "train/n02/n02_1.JPEG", 10_000) == picture(9)
