"""A pass over images without labels: plan, interruption, verification, copies, HDF5."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from teach_once.configs.load import load_teacher
from teach_once.nets.networks.zoo import build
from teach_once.nets.weights.files import save_atomically
from teach_once.precompute.command import cli
from teach_once.precompute.verify import cli as verify
from teach_once.store import TeacherCache
from teach_once.store.command import cli as store
from teach_once.train.dataset import DistillationDataset, EvaluationDataset
from tests.support.datasets.other_formats import (
    UNLABELED,
    pack_again,
    picture,
    write_unlabeled,
)

CONFIG = f"""{UNLABELED}taps: {{logits: float32, channel_means: float32}}
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    photos = tmp_path / "photos"
    for number in range(40):
        file = photos / f"{number % 3}" / f"{number:03d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(picture(number))
    file = tmp_path / "t.yaml"
    file.write_text(CONFIG)
    save_atomically(build("resnet8", num_classes=7, seed=1).state_dict(), tmp_path / "w.pt")
    return file


def call(config: Path, *more: str) -> list[str]:
    folder = config.parent / "caches"
    return [str(config), "--caches", str(folder), "--device", "cpu", "--block-rows", "8", *more]


def cache_of(config: Path) -> Path:
    (path,) = (config.parent / "caches").glob("t-*")
    return path


def test_pass_stores_logits_without_labels(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli(call(config, "--plan")) == 0
    # Each with 7 logits, 16 + 32 + 64 channel means, in float32.
    assert f"then     3 test images, {3 * (7 + 112) * 4 / 1000:.1f} kB" in capsys.readouterr().out
    assert cli(call(config)) == 0
    told = capsys.readouterr().out
    assert "The images have no labels, so no error was measured." in told
    assert "exact copies" not in told
    cache = TeacherCache.open(cache_of(config))
    assert set(cache.taps) == {"logits", "stage1", "stage2", "stage3"}
    assert cache.taps["logits"].shape == (7,)
    assert cache.labels is None
    assert cache.class_names is None
    assert "train_agreement" not in cache.measured
    assert "test_top1_error" not in cache.measured
    (held_out,) = (cache.path / "evaluation").iterdir()
    assert TeacherCache.open(held_out).read_view(0)["logits"].shape == (40 - cache.num_samples, 7)
    assert cli(call(config)) == 0
    assert "images/s on" not in capsys.readouterr().out  # nothing was computed again


def test_cache_is_verified_checked_copied_and_exported(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli(call(config)) == 0
    caches = ["--caches", str(tmp_path / "caches"), "--device", "cpu"]
    assert verify([str(config), *caches, "--records", "20", "--seed", "1"]) == 0
    told = capsys.readouterr().out
    assert "identity and the pixel canary agree" in told
    assert "valid: 20 records" in told
    assert verify([str(config), *caches, "--check-images"]) == 0
    path = cache_of(config)
    for command in ("info", "check"):
        assert store([command, str(path)]) == 0
    assert store(["copy", str(path), str(tmp_path / "copies")]) == 0
    assert store(["export", str(path), str(tmp_path / "one.h5")]) == 0
    first = TeacherCache.open(path).read_view(1)
    for other in (tmp_path / "copies" / path.name, tmp_path / "one.h5"):
        found = TeacherCache.open(other).read_view(1)
        assert all((found[tap] == first[tap]).all() for tap in first)


def test_growth_computes_only_new_views(config: Path) -> None:
    assert cli(call(config)) == 0
    before = TeacherCache.open(cache_of(config)).read_view(0)
    assert cli(call(config, "views.count=3")) == 0
    after = TeacherCache.open(cache_of(config))
    assert after.num_views == 3
    assert all((after.read_view(0)[tap] == before[tap]).all() for tap in before)


def test_records_are_reused_after_an_image_was_appended(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = "dataset.holdout_fraction=0.0001"  # so that the same images are held out
    assert cli(call(config, whole)) == 0
    old = cache_of(config)
    (config.parent / "photos" / "3.png").write_bytes(picture(99))  # the last of all
    assert cli(call(config, whole, "--plan")) == 0
    assert "the dataset has changed since" in capsys.readouterr().out
    assert cli(call(config, whole, "--reuse-from", str(old))) == 0
    assert "copied" in capsys.readouterr().out


def test_exact_copies_are_counted(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photos = config.parent / "photos"
    for number in range(5):
        shutil.copy(photos / "0" / "000.png", photos / f"copy-{number}.png")
    assert cli(call(config, "dataset.holdout_fraction=0.0001")) == 0
    assert "images are exact copies of other images" in capsys.readouterr().out


def test_classes_of_the_teacher_are_required_and_checked(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli(call(config, "teacher.num_classes=null")) == 2
    error = capsys.readouterr().err
    assert "the images have no labels" in error
    assert "set teacher.num_classes" in error
    assert cli(call(config, "teacher.num_classes=9")) == 2
    error = capsys.readouterr().err
    assert "The weights have 7 classes, but teacher.num_classes is 9" in error
    assert "fix: set teacher.num_classes=7" in error
    bare = call(config, "teacher.num_classes=null", "taps.logits=null", "taps.embedding=float16")
    assert cli(bare) == 0


@pytest.mark.parametrize("dataset_type", ["webdataset", "huggingface"])
def test_pass_over_a_packed_dataset_without_labels(
    dataset_type: str, config: Path, tmp_path: Path
) -> None:
    write_unlabeled(tmp_path / "data", dataset_type, {"train": range(30)})  # writes t.yaml
    text = config.read_text().replace("weights: w.pt", "weights: w.pt, num_classes: 7")
    config.write_text(text + "taps: {logits: float32}\n")
    pack_again(config)
    assert cli(call(config)) == 0
    cache = TeacherCache.open(cache_of(config))
    assert cache.labels is None
    assert cache.class_names is None
    assert cache.taps["logits"].shape == (7,)
    teacher = load_teacher(config)
    data = DistillationDataset(teacher, cache_of(config))
    data.set_epoch(1)
    assert data.labels is None
    assert int(data[0][1]) == -1
    assert len(data) + len(EvaluationDataset(teacher)) == 30


def test_own_loop_gets_labels_that_a_cross_entropy_rejects(config: Path) -> None:
    assert cli(call(config)) == 0
    teacher = load_teacher(config)
    data = DistillationDataset(teacher, cache_of(config))
    data.set_epoch(1)
    assert data.labels is None
    assert data.class_names is None
    assert data.taps == ("logits", "stage1", "stage2", "stage3")
    inputs, label, rows = data[0]
    assert int(label) == -1
    expected = TeacherCache.open(cache_of(config)).read_view(0)["logits"][0]
    assert np.array_equal(rows["logits"].numpy(), expected)
    with pytest.raises((IndexError, RuntimeError), match="-1"):
        torch.nn.functional.cross_entropy(rows["logits"][None], label[None])
    held_out = EvaluationDataset(teacher)
    assert len(held_out) + len(data) == 40
    assert int(held_out[0][1]) == -1
    assert inputs.shape == held_out[0][0].shape
