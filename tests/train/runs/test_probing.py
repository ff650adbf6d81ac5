"""Probes: what labeled images say of the embeddings of teacher and student."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import cosine_similarity

from teach_once.configs.load import ConfigError, load_teacher
from teach_once.nets.networks.zoo import build
from teach_once.nets.weights.files import save_atomically
from teach_once.precompute.command import cli as fill
from teach_once.report.command import cli as report
from teach_once.store import TeacherCache
from teach_once.store.command import cli as store
from teach_once.train.cli.commands import cli as train
from teach_once.train.engine.probe import linear_classes, nearest_classes, probe_accuracies
from tests.support.datasets.other_formats import UNLABELED, picture

STUDENT = """teacher: t.yaml
student: {arch: resnet8}
training:
  epochs: 2
  batch_size: 8
  learning_rate: 0.05
  schedule: {type: multistep, milestones: [2]}
methods:
  embedding: [{loss: embedding}]
  cd: [{loss: cd}]
"""
TEACHER = f"""{UNLABELED}taps: {{logits: null, channel_means: float32, embedding: float32}}
"""
PROBE = "probe: {train: probe/train, test: probe/test}\n"
HELD = "dataset.holdout_fraction=0.3"


def labeled(folder: Path, per_class: int, seed: int) -> None:
    """Write images of three classes, each of one brightness with some noise."""
    rng = np.random.default_rng(seed)
    for name, level in (("dark", 20), ("gray", 120), ("light", 220)):
        (folder / name).mkdir(parents=True)
        for number in range(per_class):
            pixels = (level + rng.integers(-15, 15, (12, 12, 3))).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.png")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with images, a probe, configs and weights; the current folder."""
    for number in range(40):
        file = tmp_path / "photos" / f"{number:03d}.png"
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(picture(number))
    labeled(tmp_path / "probe" / "train", 10, 0)
    labeled(tmp_path / "probe" / "test", 5, 1)
    (tmp_path / "t.yaml").write_text(TEACHER)
    (tmp_path / "s.yaml").write_text(STUDENT)
    save_atomically(build("resnet8", num_classes=7, seed=1).state_dict(), tmp_path / "w.pt")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def cache_teacher(*more: str) -> int:
    return fill(["t.yaml", "--device", "cpu", HELD, *more])


def train_student() -> int:
    return train(
        ["student", "s.yaml", "--method", "embedding", "--device", "cpu", f"teacher.{HELD}"]
    )


def test_a_probe_is_measured_once_and_may_be_added_to_a_finished_run(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cache_teacher() == 0
    assert train_student() == 0
    assert "probe" not in capsys.readouterr().out
    (folder / "t.yaml").write_text(TEACHER + PROBE)
    assert train_student() == 2
    told = capsys.readouterr().err
    assert (
        "has no teacher outputs of the probe's images\n  fix: teach-once precompute t.yaml" in told
    )
    assert cache_teacher() == 0  # adds the probe's records alone
    told = capsys.readouterr().out
    assert "lacks some of the teacher's outputs of the probe's images" in told
    assert train_student() == 0
    told = capsys.readouterr().out
    assert "probe, 30 and 15 images" in told
    starts = ("student, random weights", "student, trained", "teacher ")
    rows = [line.split() for line in told.splitlines() if line.strip().startswith(starts)]
    assert len(rows) == 3
    assert all(0 <= float(value) <= 100 for row in rows for value in row[-2:])
    assert float(rows[-1][-1]) > 60  # brightness alone separates the classes
    (file,) = (folder / "runs").rglob("probe.json")
    written = file.stat().st_mtime_ns
    assert train_student() == 0
    assert "probe, 30 and 15 images" in capsys.readouterr().out
    assert file.stat().st_mtime_ns == written
    labeled(folder / "probe" / "more", 1, 9)
    shutil.move(folder / "probe" / "more" / "dark" / "0.png", folder / "probe/test/dark/new.png")
    assert cache_teacher() == 0
    assert train_student() == 0
    assert "probe, 30 and 16 images" in capsys.readouterr().out


def test_the_study_and_its_report_have_the_probes_of_all_runs(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "t.yaml").write_text(TEACHER + PROBE)
    assert cache_teacher() == 0
    study = ["ablation", "s.yaml", "--seeds", "0 1", "--device", "cpu", f"teacher.{HELD}"]
    assert train(study) == 0
    assert len(list((folder / "runs").rglob("probe.json"))) == 4
    (runs,) = (folder / "runs").iterdir()
    assert report([str(runs)]) == 0
    page, html = (runs / "ablation.md").read_text(), (runs / "report.html").read_text()
    assert "| network | seeds | k-NN accuracy (%) | linear accuracy (%) |" in page
    assert "| teacher |  | " in page
    assert "| student before training, random weights | 2 | " in page
    assert "| embedding | 2 | " in page
    assert "![accuracy of the probe per method](ablation-probe.png)" in page
    assert (runs / "ablation-probe.png").read_bytes().startswith(b"\x89PNG")
    assert "<h2>Probe</h2>" in html
    assert html.count('src="data:image/svg+xml;base64,') == 1
    next((folder / "runs").rglob("probe.json")).write_text("{}")
    assert report([str(runs)]) == 2
    assert "probe.json" in capsys.readouterr().err


def test_records_of_a_probe_are_checked_and_copied_with_the_cache(folder: Path) -> None:
    (folder / "t.yaml").write_text(TEACHER + PROBE)
    assert cache_teacher() == 0
    (path,) = (folder / "caches").glob("t-*")
    names = sorted(each.name.rpartition("-")[0] for each in (path / "evaluation").iterdir())
    assert names == ["probe-test", "probe-train", "test"]
    (probe,) = (path / "evaluation").glob("probe-train-*")
    cache = TeacherCache.open(probe)
    assert list(cache.taps) == ["embedding"]
    assert cache.class_names == ["dark", "gray", "light"]
    assert cache.labels is not None
    assert cache.labels.tolist() == [0] * 10 + [1] * 10 + [2] * 10
    assert store(["check", str(path)]) == 0
    assert store(["copy", str(path), "copies"]) == 0
    copied = (Path("copies") / path.name / "evaluation").iterdir()
    assert {each.name for each in copied} == {each.name for each in path.glob("evaluation/*")}


def test_the_probe_may_be_the_datasets_own_labels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    labeled(tmp_path / "own" / "train", 10, 0)
    labeled(tmp_path / "own" / "test", 5, 1)
    text = TEACHER.replace("type: images", "type: imagefolder").replace("photos", "own")
    (tmp_path / "t.yaml").write_text(text.replace(", num_classes: 7", "") + "probe: {}\n")
    (tmp_path / "s.yaml").write_text(STUDENT)
    save_atomically(build("resnet8", num_classes=3, seed=1).state_dict(), tmp_path / "w.pt")
    monkeypatch.chdir(tmp_path)
    assert fill(["t.yaml", "--device", "cpu"]) == 0
    assert train(["student", "s.yaml", "--method", "embedding", "--device", "cpu"]) == 0
    assert "probe, 30 and 15 images" in capsys.readouterr().out


def test_a_probe_whose_parts_share_an_image_is_refused(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "t.yaml").write_text(TEACHER + PROBE)
    shutil.copy("probe/train/gray/3.png", "probe/test/gray/again.png")
    assert cache_teacher() == 0
    assert train_student() == 2
    told = capsys.readouterr().err
    assert "probe/train/gray/3.png and " in told
    assert "probe/test/gray/again.png are the same image" in told


@pytest.mark.parametrize(
    ("remove", "told"),
    [
        (["probe/train/gray", "probe/train/light"], "needs class folders for at least two classes"),
        (["probe/train/dark"], "has classes that train/ lacks: dark"),
        (["probe/test"], "probe.test"),
    ],
)
def test_unusable_images_of_a_probe_are_an_error(
    folder: Path, capsys: pytest.CaptureFixture[str], remove: list[str], told: str
) -> None:
    (folder / "t.yaml").write_text(TEACHER + PROBE)
    for each in remove:
        shutil.rmtree(each)
    assert cache_teacher() == 2
    assert told in capsys.readouterr().err
    assert not list(folder.glob("caches/t-*"))


def test_a_probe_with_fewer_images_than_neighbors_is_an_error(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "t.yaml").write_text(TEACHER + PROBE)
    for number in range(4):
        for name in ("dark", "gray", "light"):
            Path(f"probe/train/{name}/{number}.png").unlink()
    assert cache_teacher() == 2
    assert "18 training images are too few for 20 nearest neighbors" in capsys.readouterr().err


def test_a_probe_without_labels_or_with_one_part_is_an_error(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "t.yaml").write_text(TEACHER + "probe: {train: probe/train}\n")
    with pytest.raises(ConfigError, match="set both train and test, or neither"):
        load_teacher("t.yaml")
    (folder / "t.yaml").write_text(TEACHER + "probe: {}\n")
    assert cache_teacher() == 2
    assert "probe: the dataset's own images have no labels" in capsys.readouterr().err


def test_neighbors_vote_by_cosine() -> None:
    generator = torch.Generator().manual_seed(0)
    train = torch.randn(60, 4, generator=generator)
    labels = torch.randint(3, (60,), generator=generator)
    test = torch.randn(25, 4, generator=generator)
    expected = []
    for point in test:
        cosines = cosine_similarity(point[None], train).tolist()
        votes = [0.0, 0.0, 0.0]
        for number in sorted(range(60), key=lambda n: -cosines[n])[:20]:
            votes[int(labels[number])] += math.exp(cosines[number] / 0.07)
        expected.append(votes.index(max(votes)))
    assert nearest_classes(train, labels, test).tolist() == expected


def test_a_linear_probe_ignores_the_scale_of_a_feature() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(200) % 2
    signal = 0.01 * (2 * labels - 1)[:, None] + 0.001 * torch.randn(200, 1, generator=generator)
    points = torch.cat([1000 * torch.randn(200, 3, generator=generator), signal], dim=1)
    parts = points[:150], labels[:150], points[150:]
    assert (linear_classes(*parts) == labels[150:]).all()
    found = probe_accuracies(*parts, labels[150:])
    assert found["linear_accuracy"] == 100
    assert found["knn_accuracy"] < 80  # the nearest by cosine differ in noise
