"""Training on images without labels is refused with the reason, before anything runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from teach_once.configs.load import load_teacher
from teach_once.configs.schema import StudentConfig, TeacherConfig
from teach_once.train.errors import TrainError
from teach_once.train.runs.check_methods import check_without_cache
from teach_once.train.runs.study import open_study
from teach_once.train.runs.weights import load_teacher_data
from tests.support.datasets.other_formats import UNLABELED, picture

CONFIG = f"""{UNLABELED}training:
  epochs: 20
  batch_size: 64
  learning_rate: 0.1
  schedule: {{type: onecycle}}
  nesterov: true
  weight_decay: 5e-4
"""


@pytest.fixture
def teacher(tmp_path: Path) -> TeacherConfig:
    (tmp_path / "photos").mkdir()
    for number in range(6):
        (tmp_path / "photos" / f"{number}.png").write_bytes(picture(number))
    (tmp_path / "t.yaml").write_text(CONFIG)
    return load_teacher(tmp_path / "t.yaml")


def test_study_of_images_without_labels_is_refused(
    teacher: TeacherConfig, small_student: Callable[..., StudentConfig], tmp_path: Path
) -> None:
    student = small_student()
    with pytest.raises(TrainError, match="the images of t have no labels") as error:
        open_study(student, teacher, caches_dir=tmp_path / "caches", runs_dir=tmp_path / "runs")
    assert "DistillationDataset" in str(error.value)
    with pytest.raises(TrainError, match="the images of t have no labels"):
        check_without_cache(student, teacher, ["kd"], tmp_path / "caches")


def test_teacher_is_not_trained_on_images_without_labels(teacher: TeacherConfig) -> None:
    assert teacher.training is not None
    with pytest.raises(TrainError, match="the images of t have no labels"):
        load_teacher_data(teacher, teacher.training)
