"""Images of different sizes through both stages, with all augmentations."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from teach_once.nets.networks.zoo import build
from teach_once.nets.weights.files import save_atomically
from teach_once.precompute.compute.teacher_pass import PassOptions, TeacherPass
from teach_once.precompute.verify import compare_records
from teach_once.store import TeacherCache
from teach_once.train.engine.epoch_result import EpochResult
from teach_once.train.runs.study import Study
from teach_once.train.sessions.student import train_student
from tests.support.caches.teacher_cache import CPU, setup_of
from tests.support.datasets.photograph_study import PLAIN, configs_of, study_of
from tests.support.training.training_runs import largest_relative

MIXED = {
    **PLAIN,
    "trivial_augment": {},
    "color_jitter": {"brightness": 0.4, "hue": 0.1},
    "random_erasing": {"probability": 0.5},
    "mix": {"type": "cutmix"},
}


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    network = build("resnet8", num_classes=2, seed=1)
    save_atomically(network.state_dict(), tmp_path / "teacher.pt")
    return tmp_path / "teacher.pt"


def step_losses(study: Study, *, live: bool, num_workers: int) -> list[float]:
    epochs: list[EpochResult] = []
    run = study.run("cd+gkd", 0, live)
    train_student(run, num_workers=num_workers, on_epoch=epochs.append)
    return [loss for epoch in epochs for loss in epoch.step_losses]


@pytest.mark.parametrize("augment", [PLAIN, MIXED], ids=["plain", "mixed"])
def test_a_cached_run_equals_a_live_one_whatever_reads_the_images(
    augment: dict, photographs: Path, weights: Path, tmp_path: Path
) -> None:
    student, teacher = configs_of(photographs, weights, augment)
    study = study_of(student, teacher, tmp_path, num_workers=2)
    cached = step_losses(study, live=False, num_workers=2)
    live = step_losses(study, live=True, num_workers=0)
    assert len(cached) == 4 * 4
    assert largest_relative(live, cached) < 1e-5


def test_a_pass_reads_an_image_once_for_all_its_views(
    photographs: Path, weights: Path, tmp_path: Path, monkeypatch
) -> None:
    asked: list[list[int]] = []
    readings = TeacherPass.readings

    def noted(self, numbers, ids, outputs):
        asked.append(list(numbers))
        return readings(self, numbers, ids, outputs)

    monkeypatch.setattr(TeacherPass, "readings", noted)
    student, teacher = configs_of(photographs, weights, PLAIN)
    together = study_of(student, teacher, tmp_path / "a", num_workers=0).cache
    assert asked == [[0, 1, 2]] * 3  # 20 samples in blocks of 8
    monkeypatch.setattr(TeacherPass, "views_per_reading", 1)
    alone = study_of(student, teacher, tmp_path / "b", num_workers=0).cache
    for view in range(3):
        ours, theirs = together.read_view(view), alone.read_view(view)
        assert all(np.array_equal(ours[tap], theirs[tap]) for tap in ours)


def test_correct_is_about_the_label_of_the_larger_share(
    photographs: Path, weights: Path, tmp_path: Path
) -> None:
    augment = {**PLAIN, "mix": {"type": "mixup"}}
    student, teacher = configs_of(photographs, weights, augment)
    cache = study_of(student, teacher, tmp_path, num_workers=0).cache
    teacher_pass = TeacherPass(
        setup_of(teacher, tmp_path / "caches"), PassOptions(CPU, num_workers=0)
    )
    (batch,) = teacher_pass.pixels.batches([1], np.arange(20), 20)
    found = cache.read_view(1, ["logits", "correct"])
    expected = found["logits"].argmax(axis=1) == batch.labels.numpy()
    assert (found["correct"] == expected).all()
    assert (batch.labels.numpy() != cache.labels).any()


def test_verification_finds_such_a_cache_sound_and_a_changed_one_not(
    photographs: Path, weights: Path, tmp_path: Path
) -> None:
    student, teacher = configs_of(photographs, weights, MIXED)
    cache = study_of(student, teacher, tmp_path, num_workers=0).cache
    setup = setup_of(teacher, tmp_path / "caches")
    teacher_pass = TeacherPass(setup, PassOptions(CPU, num_workers=0))
    assert not any(r.num_wrong for r in compare_records(setup, cache, teacher_pass, 40, 0))
    with torch.no_grad():
        teacher_pass.teacher.network.fc.bias += 0.1
    assert any(r.num_wrong for r in compare_records(setup, cache, teacher_pass, 40, 0))
    assert isinstance(cache, TeacherCache)
