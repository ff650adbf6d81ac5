"""Students of several teachers: their inputs, from caches and from live teachers."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from rich.console import Console

from teach_once.__main__ import main as teach_once
from teach_once.configs.load import load_student, load_teacher
from teach_once.configs.schema import Normalization
from teach_once.nets.networks.zoo import build
from teach_once.nets.weights.files import save_atomically
from teach_once.precompute.command import cli as precompute
from teach_once.runtime.errors import UserError
from teach_once.train.cli.commands import cli as train
from teach_once.train.engine.epoch_result import EpochResult
from teach_once.train.method.connector_ends import mean_squares
from teach_once.train.method.ensemble_taps import number_stages
from teach_once.train.outputs.ensemble import TeacherEnsemble, mean_log_probabilities
from teach_once.train.outputs.teacher_outputs import NoTeacher
from teach_once.train.runs.check_methods import check_without_cache
from teach_once.train.runs.study import Study, open_study
from teach_once.train.sessions.student import train_student
from tests.support.training.printed_report import write_printed_report
from tests.support.training.training_runs import largest_relative

TEACHER = {
    "dataset": {"type": "digits", "max_per_class": 6},
    "views": {"augment": {"type": "pad-crop-flip", "pad_px": 1, "flip": False}, "count": 2},
    "taps": {"logits": "float32", "channel_means": "float32"},
}
STUDENT = {
    "student": {"arch": "resnet8"},
    "training": {
        "epochs": 2,
        "batch_size": 16,
        "learning_rate": 0.02,
        "schedule": {"type": "onecycle"},
    },
    "methods": {
        "ce": [{"loss": "ce"}],
        "kd": [{"loss": "kd"}],
        "cd+gkd": [{"loss": "ce"}, {"loss": "gkd"}, {"loss": "cd", "weight": 6}],
        "rkd": [{"loss": "rkd"}],
    },
}


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """Two teachers, of other architectures and normalizations, and a student of both."""
    for name, arch, mean in (("a", "resnet20", 0.3), ("b", "resnet8", 0.5)):
        weights = tmp_path / f"{name}.pt"
        network = build(arch, num_classes=10, in_channels=1, seed=1)
        save_atomically(network.state_dict(), weights)
        dataset = {**TEACHER["dataset"], "normalization": {"mean": [mean], "std": [0.4]}}
        net = {"arch": arch, "weights": str(weights)}
        content = {**TEACHER, "dataset": dataset, "teacher": net}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(content))
    write_student(tmp_path)
    return tmp_path


def write_student(folder: Path, **changes: object) -> Path:
    content = {"teachers": ["a.yaml", "b.yaml"], "teacher_weights": [3, 1], **STUDENT, **changes}
    (folder / "s.yaml").write_text(yaml.safe_dump(content))
    return folder / "s.yaml"


def study_of(files: Path) -> Study:
    assert precompute([str(files / "s.yaml"), "--of-student", "--caches", str(files / "c")]) == 0
    config = load_student(files / "s.yaml")
    first = load_teacher(config.teacher)
    return open_study(config, first, caches_dir=files / "c", runs_dir=files / "r")


def step_losses(study: Study, method: str, *, live: bool) -> list[float]:
    epochs: list[EpochResult] = []
    train_student(study.run(method, 0, live), device="cpu", on_epoch=epochs.append)
    return [loss for epoch in epochs for loss in epoch.step_losses]


@pytest.mark.parametrize("method", ["kd", "cd+gkd"])
def test_a_cached_run_of_two_teachers_equals_a_live_one(files: Path, method: str) -> None:
    study = study_of(files)
    cached = step_losses(study, method, live=False)
    assert len(cached) == 2 * 4
    assert largest_relative(step_losses(study, method, live=True), cached) < 1e-5


@pytest.mark.parametrize("mean", [0.5, 0.3], ids=["own inputs", "shared inputs"])
def test_two_caches_that_a_student_fills_equal_those_of_a_pass(
    files: Path, mean: float, capsys: pytest.CaptureFixture[str]
) -> None:
    other = yaml.safe_load((files / "b.yaml").read_text())
    other["dataset"]["normalization"]["mean"] = [mean]
    (files / "b.yaml").write_text(yaml.safe_dump(other))
    for name, more in (("passed", []), ("filled", ["--fill-cache"])):
        place = ["--caches", str(files / name), "--runs", str(files / f"{name}-runs")]
        call = ["train-student", str(files / "s.yaml"), "--method", "cd+gkd", *place, *more]
        assert teach_once([*call, "--device", "cpu"]) == 0
    passed, filled = (
        {path.relative_to(files / name): path.read_bytes() for path in chunks_in(files / name)}
        for name in ("passed", "filled")
    )
    assert len(passed) > 20
    assert filled == passed
    ours, theirs = (
        torch.load(next((files / f"{name}-runs").glob("*/*/last.pt")), weights_only=True)
        for name in ("filled", "passed")
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def chunks_in(caches: Path) -> list[Path]:
    return [each for each in caches.glob("*/teacher.zarr/**/*") if each.is_file()]


def test_the_first_step_is_the_loss_by_hand(files: Path) -> None:
    study = study_of(files)
    losses = step_losses(study, "kd", live=False)
    from teach_once.train.engine.step import start_epoch
    from teach_once.train.losses import kd
    from teach_once.train.sessions.student import open_context

    context = open_context(study.run("kd", 0), torch.device("cpu"))
    order = start_epoch(context, 1)
    (batch,) = list(context.data.train.batches([0], order[:16], 16))
    context.teacher.close()
    probabilities = 0
    for cache, weight in ((study.cache, 0.75), (study.caches[1], 0.25)):
        logits = torch.from_numpy(cache.read(order[:16], 0, ["logits"])["logits"])
        probabilities = probabilities + weight * logits.softmax(dim=1)
    context.train_state.network.train()
    expected = kd(context.train_state.network(batch.inputs), torch.log(probabilities)).item()
    assert losses[0] == pytest.approx(expected, rel=1e-5)


def test_the_mean_is_of_probabilities_and_by_weight() -> None:
    one, other = torch.tensor([[5.0, 0.0, -300.0]]), torch.tensor([[0.0, 1.0, 2.0]])
    found = mean_log_probabilities([one, other], [3, 1])
    expected = 0.75 * one.softmax(1) + 0.25 * other.softmax(1)
    assert torch.allclose(found.exp(), expected)
    assert found.exp().sum().item() == pytest.approx(1)


def test_each_teacher_counts_in_cd_by_its_weight(files: Path) -> None:
    study = study_of(files)
    from teach_once.train.engine.step import start_epoch
    from teach_once.train.losses import cd
    from teach_once.train.sessions.student import open_context

    context = open_context(study.run("cd+gkd", 0), torch.device("cpu"))
    order = start_epoch(context, 1)
    (batch,) = list(context.data.train.batches([0], order[:16], 16))
    outputs = context.teacher.rows(batch)
    context.teacher.close()
    assert [name for name in outputs if name.startswith("stage")] == [
        f"stage{n}" for n in range(1, 7)
    ]
    zeros = {n: torch.zeros_like(outputs[f"stage{n}"]) for n in range(1, 7)}
    for teacher, (cache, weight) in enumerate(((study.cache, 3.0), (study.caches[1], 1.0))):
        stages = [f"stage{n}" for n in range(1, 4)]
        alone = cache.read(order[:16], 0, stages)
        theirs = [torch.from_numpy(alone[stage]) for stage in stages]
        numbers = range(3 * teacher + 1, 3 * teacher + 4)
        ours = cd([zeros[n] for n in numbers], [outputs[f"stage{n}"] for n in numbers])
        plain = cd([torch.zeros_like(t) for t in theirs], theirs)
        assert ours.item() == pytest.approx(weight * plain.item(), rel=1e-5)


def test_each_connector_counts_by_its_teachers_weight_as_the_means_do(files: Path) -> None:
    study = study_of(files)
    from teach_once.train.sessions.student import open_context

    context = open_context(study.run("cd+gkd", 0), torch.device("cpu"))
    context.teacher.close()
    connectors = context.train_state.connectors
    assert connectors is not None
    connectors.eval()
    channels = (16, 32, 64)
    maps = {f"stage{n}": torch.rand(4, size, 2, 2) for n, size in enumerate(channels, start=1)}
    found = connectors(maps)
    for number, (stage, connect) in enumerate(connectors.stages.items()):
        teacher, own = divmod(number, 3)
        plain = connect(maps[f"stage{own + 1}"]).mean(dim=(2, 3))
        assert torch.allclose(found[number], plain * (3.0, 1.0)[teacher] ** 0.5), stage


def test_correct_is_that_of_the_mean_where_two_teachers_disagree() -> None:
    # The first one is right of sample 0, the second one of sample 1, neither of sample 2.
    logits = [
        torch.tensor([[4.0, 0.0], [4.0, 0.0], [4.0, 0.0]]),
        torch.tensor([[0.0, 1.0], [0.0, 9.0], [0.0, 1.0]]),
    ]
    sources = [_Fixed({"logits": each, "correct": torch.ones(3)}) for each in logits]
    batch = SimpleNamespace(labels=torch.tensor([0, 1, 1]))
    for weights, expected in (
        ([2.0, 1.0], [1, 0, 0]),
        ([1.0, 1.0], [1, 1, 0]),
        ([1, 3], [0, 1, 1]),
    ):
        ensemble = TeacherEnsemble(sources, weights, [0, 0])
        assert ensemble.rows(batch)["correct"].tolist() == expected


def test_normalizations_of_live_teachers_are_copied_to_the_device_once() -> None:
    normalizations = [Normalization(mean=(mean,), std=(0.4,)) for mean in (0.3, 0.5)]
    ensemble = TeacherEnsemble([_Fixed({}), _Fixed({})], [1, 1], [0, 0], normalizations)
    first, again = (ensemble._rescaling(1, torch.device("cpu")) for _ in range(2))
    assert first is again
    assert [each.flatten().tolist() for each in first] == [
        pytest.approx([value]) for value in (0.3, 0.4, 0.5, 0.4)
    ]


class _Fixed(NoTeacher):
    """The same outputs for each batch."""

    def __init__(self, outputs: dict[str, torch.Tensor]) -> None:
        self._outputs = outputs

    def rows(self, batch: object) -> dict[str, torch.Tensor]:
        return self._outputs


def test_connectors_and_mean_squares_are_of_each_teachers_own_stages(files: Path) -> None:
    study = study_of(files)
    signed = dataclasses.replace(study.config.student, connector="conv-bn")
    study = dataclasses.replace(study, config=dataclasses.replace(study.config, student=signed))
    stages = [f"stage{n}" for n in range(1, 4)]
    assert study.run("cd+gkd", 0).linear_connectors == tuple(f"stage{n}" for n in range(1, 7))
    records = [cache.read_first_block(stages) for cache in study.caches]
    expected = [np.square(of_one[stage]).mean() for of_one in records for stage in stages]
    assert mean_squares(study) == pytest.approx(expected, rel=1e-5)


def test_stages_are_numbered_on() -> None:
    assert number_stages([2, 1]) == [{"stage1": "stage1", "stage2": "stage2"}, {"stage1": "stage3"}]


def test_the_commands_know_all_teachers(
    files: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(files)
    assert train(["plan", "s.yaml", "--method", "kd", "--no-trial"]) == 0
    planned = capsys.readouterr().out
    assert planned.count("cache    to build: 60 samples x 2 views") == 2
    assert train(["teacher", "s.yaml", "--of-student"]) == 0
    found = capsys.readouterr().out
    assert "a.pt" in found
    assert "b.pt" in found
    assert precompute(["s.yaml", "--of-student"]) == 0
    assert capsys.readouterr().out.count(" is complete. ") == 2
    assert train(["ablation", "s.yaml", "--methods", "ce kd", "--seeds", "0 1"]) == 0
    assert write_printed_report(capsys.readouterr().out) == 0
    (page,) = files.rglob("report.html")
    text = page.read_text()
    assert " pass, once</dt><dd>240 images" in text
    assert "with the teacher in the loop, 2 distilled runs</dt><dd>480 images<" in text


def test_another_weight_or_another_second_teacher_is_another_run(files: Path) -> None:
    study = study_of(files)
    first = study.run("kd", 0).sha256
    write_student(files, teacher_weights=[1, 1])
    assert study_of(files).run("kd", 0).sha256 != first
    write_student(files, teacher_weights=[3, 1])
    assert study_of(files).run("kd", 0).sha256 == first


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"teacher": "a.yaml"}, None),
        ({"teacher": "b.yaml"}, "give either teacher or teachers"),
        ({"teachers": ["a.yaml"]}, "teachers"),
        ({"teachers": ["a.yaml", "a.yaml"]}, "duplicate teacher"),
        ({"teacher_weights": [1]}, "1 weights for 2 teachers"),
        ({"teacher_weights": [1, 0]}, "teacher_weights"),
        ({"teachers": ["a.yaml", "nowhere.yaml"]}, "teachers.1: file "),
    ],
)
def test_mistakes_in_the_file_are_named(files: Path, changes: dict, told: str | None) -> None:
    path = write_student(files, **changes)
    if told is None:
        assert load_student(path).teachers == (str(files / "a.yaml"), str(files / "b.yaml"))
        return
    with pytest.raises(UserError, match=told):
        load_student(path)


@pytest.mark.parametrize(
    ("key", "value", "field"),
    [
        ("dataset.max_per_class", 5, "dataset.max_per_class"),
        ("views.seed", 7, "views.seed"),
        ("views.augment.pad_px", 2, "views.augment.pad_px"),
    ],
)
def test_teachers_that_see_other_views_are_refused_by_field(
    files: Path, key: str, value: object, field: str
) -> None:
    content = yaml.safe_load((files / "b.yaml").read_text())
    block = content
    *parents, last = key.split(".")
    for parent in parents:
        block = block.setdefault(parent, {})
    block[last] = value
    (files / "b.yaml").write_text(yaml.safe_dump(content))
    config = load_student(files / "s.yaml")
    with pytest.raises(UserError, match=f"do not use the same views(.|\n)*{field}"):
        check_without_cache(config, load_teacher(config.teacher), ["kd"])


def test_a_method_of_one_teacher_is_refused_before_the_pass(files: Path) -> None:
    config = load_student(files / "s.yaml")
    with pytest.raises(
        UserError, match=r"methods\.rkd needs embedding, last_stage, which several teachers"
    ):
        check_without_cache(config, load_teacher(config.teacher), ["kd", "rkd"])
    study = study_of(files)
    with pytest.raises(UserError, match=r"methods\.rkd needs embedding"):
        train_student(study.run("rkd", 0), device="cpu", console=Console(file=io.StringIO()))


def test_a_missing_cache_of_the_second_teacher_is_an_error_with_its_command(files: Path) -> None:
    assert precompute([str(files / "a.yaml"), "--caches", str(files / "c")]) == 0
    config = load_student(files / "s.yaml")
    with pytest.raises(UserError, match="no cache of the teacher 'b'") as caught:
        open_study(
            config, load_teacher(config.teacher), caches_dir=files / "c", runs_dir=files / "r"
        )
    assert f"TEACHER={files}/b.yaml" in str(caught.value)
