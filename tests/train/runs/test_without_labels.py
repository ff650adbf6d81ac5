"""Students of images without labels: methods, metrics, exports, starts, and what is refused."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from teach_once.configs.load import load_student, load_teacher
from teach_once.nets.networks.zoo import build
from teach_once.nets.weights.files import save_atomically
from teach_once.precompute.command import cli as fill
from teach_once.store.move.hdf5 import export_cache
from teach_once.store.read.evaluation import evaluation_path
from teach_once.train.engine.comparison import disagreement, nearest_neighbors
from teach_once.train.errors import TrainError
from teach_once.train.recording.export import export_student
from teach_once.train.runs.check_methods import check_methods, check_without_cache
from teach_once.train.runs.study import Study, open_study
from teach_once.train.runs.weights import load_teacher_data
from teach_once.train.sessions.student import train_student
from tests.support.datasets.other_formats import UNLABELED, picture

TEACHER = f"""{UNLABELED}taps:
  logits: float32
  channel_means: float32
  embedding: float32
  attention: float32
  hint: {{stage: stage2}}
training:
  epochs: 20
  batch_size: 64
  learning_rate: 0.1
  schedule: {{type: onecycle}}
  nesterov: true
  weight_decay: 5e-4
"""
HALF = "dataset.holdout_fraction=0.5"
METHODS = {
    "embedding": "{loss: embedding}",
    "cd": "{loss: cd}",
    "kd": "{loss: kd}",
    "at": "{loss: at}",
    "fitnets": "{loss: fitnets}",
    "rkd": "{loss: rkd}",
    "residual": "{loss: residual}",
    "ce": "{loss: ce}",
    "gkd": "{loss: gkd}",
    "dkd": "{loss: embedding}, {loss: dkd}",
}
STUDENT = """teacher: t.yaml
student: {arch: resnet8, options: {width: 0.5}}
training:
  epochs: 3
  batch_size: 8
  learning_rate: 0.05
  schedule: {type: multistep, milestones: [2]}
methods:
""" + "".join(f"  {name}: [{terms}]\n" for name, terms in METHODS.items())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher's file, a student's file, images without labels, and their cache."""
    folder = tmp_path_factory.mktemp("unlabeled")
    for number in range(60):
        file = folder / "photos" / f"{number % 3}" / f"{number:03d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(picture(number))
    (folder / "t.yaml").write_text(TEACHER)
    (folder / "s.yaml").write_text(STUDENT)
    save_atomically(build("resnet8", num_classes=7, seed=1).state_dict(), folder / "w.pt")
    call = [str(folder / "t.yaml"), "--caches", str(folder / "caches"), "--device", "cpu"]
    assert fill([*call, HALF]) == 0
    return folder


def study_in(folder: Path, runs: Path, *overrides: str) -> Study:
    student = load_student(folder / "s.yaml", overrides)
    teacher = load_teacher(folder / "t.yaml", [HALF])
    return open_study(student, teacher, caches_dir=folder / "caches", runs_dir=runs)


@pytest.mark.parametrize("method", ["embedding", "cd", "kd", "at", "fitnets", "rkd", "residual"])
def test_student_is_trained_without_labels(folder: Path, tmp_path: Path, method: str) -> None:
    study = study_in(folder, tmp_path)
    run = study.run(method, 0)
    summary = train_student(run, device="cpu")
    reference = study.reference
    assert reference is not None
    expected = {"neighbor_disagreement"}
    expected |= {"embedding_cosine"} if method == "embedding" else set()
    expected |= {"top1_agreement", "teacher_kl"} if method == "kd" else set()
    assert set(summary["last"]) == expected
    assert 0 < summary["last"]["neighbor_disagreement"] < 100
    weights = torch.load(run.folder / "last.pt", weights_only=True)
    assert ("fc.weight" in weights) == (method == "kd")
    (card,) = export_student(run, ["last"], tmp_path / "out", device="cpu")
    assert card["metrics"]["neighbor_disagreement"] == pytest.approx(
        summary["last"]["neighbor_disagreement"], abs=5
    )
    program = torch.export.load(tmp_path / "out" / "student.pt2").module()
    output, size = ("logits", 7) if method == "kd" else ("embedding", card["output_size"])
    assert (card["output"], card["output_size"]) == (output, size)
    assert program(torch.zeros(3, 3, 12, 12)).shape == (3, size)


def test_metrics_are_those_of_both_networks_outputs(folder: Path, tmp_path: Path) -> None:
    study = study_in(folder, tmp_path)
    run = study.run("kd", 0)
    summary = train_student(run, device="cpu")
    network = build("resnet8", num_classes=7, options={"width": 0.5})
    network.load_state_dict(torch.load(run.folder / "last.pt", weights_only=True))
    network.eval()
    test = study.pixels(torch.device("cpu")).test
    (batch,) = test.batches([0], np.arange(len(test)), 1000)
    found: dict[str, torch.Tensor] = {}

    def keep(module: Any, inputs: tuple[torch.Tensor]) -> None:
        found["embedding"] = inputs[0].flatten(1)

    network.fc.register_forward_pre_hook(keep)
    with torch.no_grad():
        logits = network(batch.inputs)
    reference = study.reference
    assert reference is not None
    assert reference.logits is not None
    assert reference.embedding is not None
    assert len(reference.logits) == len(test)
    ours, theirs = logits.log_softmax(1), reference.logits.log_softmax(1)
    divergence = (theirs.exp() * (theirs - ours)).sum(1).mean()
    assert summary["last"]["teacher_kl"] == pytest.approx(divergence.item(), rel=1e-4)
    same = (logits.argmax(1) == reference.logits.argmax(1)).float().mean()
    assert summary["last"]["top1_agreement"] == pytest.approx(100 * same.item())
    number = (len(test) - 1) // 4
    networks = found["embedding"], reference.embedding
    nearest = [[_nearest(each, row, number) for each in networks] for row in range(len(test))]
    shared = [len({*ours} & {*theirs}) for ours, theirs in nearest]
    expected = 100 - 100 * np.mean(shared) / number
    assert summary["last"]["neighbor_disagreement"] == pytest.approx(expected, abs=1e-4)


def _nearest(points: torch.Tensor, row: int, number: int) -> list[int]:
    cosines = torch.nn.functional.cosine_similarity(points[row][None], points)
    cosines[row] = -2
    return cosines.topk(number).indices.tolist()


def test_neighbors_of_the_same_points_agree_and_those_of_others_do_not() -> None:
    generator = torch.Generator().manual_seed(0)
    points, others = torch.randn(2, 500, 8, generator=generator)
    own = nearest_neighbors(points)
    assert own.shape == (500, 20)
    assert not (own == torch.arange(500)[:, None]).any()
    assert disagreement(own, nearest_neighbors(3 * points)) == 0
    by_chance = 100 - 100 * 20 / 499
    assert disagreement(own, nearest_neighbors(others)) == pytest.approx(by_chance, abs=3)


@pytest.mark.parametrize(("method", "loss"), [("ce", "ce"), ("gkd", "gkd"), ("dkd", "dkd")])
def test_loss_that_needs_labels_is_refused_with_the_methods_that_work(
    folder: Path, tmp_path: Path, method: str, loss: str
) -> None:
    study = study_in(folder, tmp_path)
    told = rf"methods.{method}: the loss {loss} needs labels, which the images of t do not have"
    with pytest.raises(TrainError, match=told) as error:
        check_methods(study, [method])
    fitting = "one of the methods embedding, cd, kd, at, fitnets, rkd, residual;"
    assert fitting in str(error.value)
    with pytest.raises(TrainError, match=told):
        check_without_cache(study.config, study.teacher, [method], folder / "caches")


def test_student_without_labels_and_without_test_outputs_is_refused(
    folder: Path, tmp_path: Path
) -> None:
    study = study_in(folder, tmp_path)
    (name,) = (folder / "caches").glob("*/evaluation/*")
    hidden = name.with_name("other")
    name.rename(hidden)
    try:
        with pytest.raises(TrainError, match="has no embeddings or channel means of them") as error:
            train_student(study.run("cd", 0), device="cpu")
        assert "make cache-teacher TEACHER=" in str(error.value)
    finally:
        hidden.rename(evaluation_path(study.cache.path, name.name))


def test_student_starts_from_a_student_without_classifier(folder: Path, tmp_path: Path) -> None:
    first = study_in(folder, tmp_path / "first").run("embedding", 0)
    train_student(first, device="cpu")
    start = f"student.init={first.folder / 'last.pt'}"
    study = study_in(folder, tmp_path / "second", start)
    for method in ("kd", "embedding"):  # with a new classifier, and without one
        assert "last" in train_student(study.run(method, 0), device="cpu")


def test_student_of_an_exported_cache_is_compared_with_its_teacher(
    folder: Path, tmp_path: Path
) -> None:
    study = study_in(folder, tmp_path / "runs")
    export_cache(study.cache.path, tmp_path / "one.h5")
    exported = open_study(
        study.config,
        study.teacher,
        caches_dir=tmp_path,
        cache_path=tmp_path / "one.h5",
        runs_dir=tmp_path / "others",
    )
    found, expected = (
        train_student(each.run("kd", 0), device="cpu")["last"] for each in (exported, study)
    )
    assert found == expected
    assert "top1_agreement" in found


def test_student_with_one_test_image_is_refused(folder: Path, tmp_path: Path) -> None:
    few = ["dataset.holdout_fraction=0.04"]
    assert fill([str(folder / "t.yaml"), "--caches", str(tmp_path), "--device", "cpu", *few]) == 0
    student, teacher = load_student(folder / "s.yaml"), load_teacher(folder / "t.yaml", few)
    study = open_study(student, teacher, caches_dir=tmp_path, runs_dir=tmp_path)
    with pytest.raises(TrainError, match="found 1, expected at least 3"):
        train_student(study.run("cd", 0), device="cpu")


def test_a_method_without_logits_has_no_classifier_with_labels(
    make_study: Callable[..., Study],
) -> None:
    study = make_study(student=["methods.cd=[{loss: cd}]"])
    run = study.run("cd", 0)
    summary = train_student(run, device="cpu")
    assert set(summary["last"]) == {"neighbor_disagreement"}
    assert "fc.weight" not in torch.load(run.folder / "last.pt", weights_only=True)


def test_a_student_that_is_not_compared_is_announced_with_the_command(
    make_study: Callable[..., Study],
) -> None:
    study = make_study()
    shutil.rmtree(study.cache.path / "evaluation")
    console = Console(file=io.StringIO(), width=1000)
    summary = train_student(study.run("ce", 0), device="cpu", console=console)
    assert set(summary["last"]) == {"top1_error", "top5_error"}
    told = console.file.getvalue()
    assert (
        "so the student is not compared with its teacher; to add them: make cache-teacher" in told
    )


def test_teacher_is_not_trained_on_images_without_labels(folder: Path) -> None:
    teacher = load_teacher(folder / "t.yaml")
    assert teacher.training is not None
    with pytest.raises(TrainError, match="the images of t have no labels"):
        load_teacher_data(teacher, teacher.training)
