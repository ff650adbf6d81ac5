"""Whole runs with modern recipes: averaged weights, exact resumption, rejected settings."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR

from teach_once.configs.load import ConfigError, load_student, load_teacher, to_yaml
from teach_once.configs.schema import as_plain
from teach_once.configs.yaml_subset import parse_yaml
from teach_once.nets.networks.zoo import build
from teach_once.train.cli.commands import cli
from teach_once.train.engine.epoch_result import EpochResult
from teach_once.train.engine.evaluation import evaluate
from teach_once.train.errors import TrainError
from teach_once.train.recording.checkpoint import Partial
from teach_once.train.recording.export import export_student, weights_of
from teach_once.train.recording.recorder import Recorder
from teach_once.train.runs.study import Study, trained_by_any_number
from teach_once.train.runs.weights import TeacherRun, load_teacher_data
from teach_once.train.schedule import learning_rate_at
from teach_once.train.sessions.student import train_student
from tests.support.caches.teacher_cache import CPU
from tests.support.own_network import DROPPING
from tests.support.project import ROOT
from tests.support.training.training_runs import without_times

MakeStudy = Callable[..., Study]
EVERYTHING = (
    "training.optimizer={type: adamw}",
    "training.learning_rate=1e-3",
    "training.schedule={type: cosine, warmup_epochs: 1, final_learning_rate: 1e-5}",
    "training.weight_decay=0.05",
    "training.weight_decay_norm_bias=false",
    "training.max_grad_norm=1",
    "training.gradient_accumulation=2",
    "training.ema.decay=0.9",
    "training.precision=float16",
    "methods.x=[{loss: ce, label_smoothing: 0.1}, {loss: kd, temperature: 2}, {loss: cd}]",
)


class Killed(Exception):
    pass


# ---- averaged weights


def test_averaged_weights_are_tested_and_saved_beside_the_others(make_study: MakeStudy) -> None:
    study = make_study(student=EVERYTHING)
    epochs: list[EpochResult] = []
    summary = train_student(study.run("x", 0), device="cpu", on_epoch=epochs.append)
    folder = study.run("x", 0).folder
    averaged = [epoch.average.test["top1_error"] for epoch in epochs]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["ema_test"]["top1_error"] for line in lines] == averaged
    assert averaged != [epoch.tested.test["top1_error"] for epoch in epochs]
    assert summary["last-ema"] == epochs[-1].average.test
    assert summary["best-ema"]["metrics"]["top1_error"] == min(averaged)
    assert averaged[summary["best-ema"]["epoch"] - 1] == min(averaged)
    network = build("resnet8", num_classes=10, in_channels=1)
    network.load_state_dict(torch.load(folder / "last-ema.pt", weights_only=True))
    test = study.pixels(CPU).test
    assert evaluate(network, test, "float16", CPU)["top1_error"] == averaged[-1]


def test_averaged_weights_are_exported_beside_the_student(
    make_study: MakeStudy, tmp_path: Path
) -> None:
    study = make_study(student=[*EVERYTHING, "training.epochs=2", "training.precision=float32"])
    summary = train_student(study.run("x", 0), device="cpu")
    which = weights_of(study.run("x", 0), "last")
    assert which == ["last", "last-ema"]
    out = tmp_path / "out"
    cards = export_student(study.run("x", 0), which, out, device="cpu")
    assert [card["metrics"] for card in cards] == [summary[each] for each in which]
    names = {path.name for path in out.iterdir()}
    assert names == {
        f"student{kind}.{end}" for kind in ("", "-ema") for end in ("pt", "pt2", "json")
    }
    plain, averaged = (
        torch.load(out / f"student{kind}.pt", weights_only=True) for kind in ("", "-ema")
    )
    assert not torch.equal(plain["fc.weight"], averaged["fc.weight"])


def test_the_export_command_writes_both(
    cached: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    student = ["digits-resnet8", "--method", "ce", *cached, "training.ema.decay=0.9"]
    assert cli(["student", *student]) == 0
    assert "averaged weights" in capsys.readouterr().out
    assert cli(["export", student[0], str(tmp_path / "out"), *student[1:]]) == 0
    told = capsys.readouterr().out
    assert "out/student.pt" in told
    assert "out/student-ema.pt" in told
    assert (tmp_path / "out" / "student-ema.pt2").is_file()


def test_a_run_without_an_average_has_none(make_study: MakeStudy) -> None:
    study = make_study(student=["training.epochs=2"])
    summary = train_student(study.run("ce", 0), device="cpu")
    assert not [key for key in summary if "ema" in key]
    assert not list(study.run("ce", 0).folder.glob("*ema*"))
    assert weights_of(study.run("ce", 0), "best") == ["best"]


# ---- exact resume


@pytest.mark.parametrize("network", [(), DROPPING], ids=["resnet8", "dropout"])
def test_a_run_killed_at_random_steps_equals_an_uninterrupted_one_bit_for_bit(
    make_study: MakeStudy, monkeypatch: pytest.MonkeyPatch, network: tuple[str, ...]
) -> None:
    study = make_study(student=[*EVERYTHING, *network])
    run, keep, steps_left = study.run("x", 0), Recorder.save, [3]

    def kept_then_killed(self: Recorder, partial: Partial) -> None:
        keep(self, partial)
        steps_left[0] -= 1
        if steps_left[0] == 0:
            raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(Recorder, "save", kept_then_killed)
        for following in (2, 5, 10**9):
            with pytest.raises(Killed):
                train_student(run, device="cpu", checkpoint_minutes=0)
            steps_left[0] = following
        resumed = train_student(run, device="cpu", checkpoint_minutes=0)
    metrics = without_times(run.folder)
    weights = {path.name: torch.load(path, weights_only=True) for path in run.folder.glob("*.pt")}
    assert set(weights) == {"last.pt", "best.pt", "last-ema.pt", "best-ema.pt"}
    shutil.rmtree(run.folder)
    whole = train_student(study.run("x", 0), device="cpu")
    assert metrics == without_times(run.folder)
    assert resumed["files_sha256"] == whole["files_sha256"]


# ---- learning rates


@pytest.mark.parametrize(("warmup", "last"), [(0, 0.0), (2, 1e-3)])
def test_the_cosine_is_torch_s_behind_a_linear_warm_up(warmup: int, last: float) -> None:
    schedule = f"{{type: cosine, warmup_epochs: {warmup}, final_learning_rate: {last}}}"
    training = load_student(
        "digits-resnet8",
        ["training.epochs=10", "training.learning_rate=0.2", f"training.schedule={schedule}"],
    ).training
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.2)
    cosine = CosineAnnealingLR(optimizer, 70 - 7 * warmup, eta_min=last)
    theirs: torch.optim.lr_scheduler.LRScheduler = cosine
    if warmup:
        rising = LinearLR(optimizer, 1 / (7 * warmup + 1), total_iters=7 * warmup)
        theirs = SequentialLR(optimizer, [rising, cosine], [7 * warmup])
    rates = []
    for _ in range(70):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        theirs.step()
    assert [learning_rate_at(training, step, 7) for step in range(70)] == pytest.approx(rates)


# ---- what is refused, and what changes nothing


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["optimizer={type: adam}"], "training.optimizer.type: Input should be one of"),
        (["optimizer={type: sgd, momentum: 0.9}"], "optimizer.momentum is not a key of optimizer"),
        (["optimizer={type: adamw, weight_decay: 0.1}"], "training.weight_decay"),
        (["optimizer={type: adamw}", "nesterov=true"], "set nesterov=null for adamw"),
        (["optimizer={type: adamw, betas: [0.9, 1.0]}"], "optimizer.betas.1: Input should be less"),
        (["optimizer={type: adamw, eps: 0.0}"], "optimizer.eps: Input should be greater than 0"),
        (["ema={}"], "training.ema.decay: missing"),
        (["ema.decay=1.0"], "training.ema.decay: Input should be less than 1"),
        (["max_grad_norm=0.0"], "max_grad_norm: Input should be greater than 0"),
        (
            ["gradient_accumulation=0"],
            "training.gradient_accumulation: Input should be greater than or equal to 1",
        ),
        (
            ["gradient_accumulation=33"],
            "gradient_accumulation is 33, more than batch_size, 32",
        ),
        (["schedule={type: cosine, warmup_epochs: 40}"], "warmup_epochs is 40 of 40 epochs; use"),
        (["schedule={type: cosine, final_learning_rate: 1.0}"], "above the peak"),
        (["label_smoothing=0.1"], "training.label_smoothing: unknown key"),
    ],
)
def test_recipes_that_mean_nothing_are_refused(overrides: list[str], told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_student("digits-resnet8", [f"training.{override}" for override in overrides])
    assert told in str(caught.value)


def test_a_share_of_a_label_is_at_most_the_whole() -> None:
    with pytest.raises(ConfigError, match="label_smoothing: Input should be less than or equal"):
        load_student("digits-resnet8", ["methods.ce.0.label_smoothing=1.5"])


def test_a_part_of_a_batch_that_is_a_single_sample_is_refused(make_study: MakeStudy) -> None:
    own = ("student.arch=python:tests.support.own_network:OnePixel", "student.stages=[net.0]")
    study = make_study(
        student=[*own, "training.batch_size=20", "training.gradient_accumulation=12"]
    )
    told = "batch_size is 20 and training.gradient_accumulation 12, so .* is a single sample of 60"
    with pytest.raises(TrainError, match=f"{told}.*\n  fix: set training.batch_size=30"):
        train_student(study.run("ce", 0), device="cpu")


def test_an_optimizer_s_file_is_printed_as_it_loads(tmp_path: Path) -> None:
    config = load_student("digits-resnet8", EVERYTHING)
    path = tmp_path / "digits-resnet8.yaml"
    path.write_text(to_yaml(config))
    assert "momentum" not in path.read_text()
    assert load_student(path) == config


def test_settings_at_their_defaults_leave_a_run_the_run_it_was(make_study: MakeStudy) -> None:
    plain, training = make_study().run("ce", 0), "training"
    defaults = [
        "optimizer={type: sgd}",
        "ema=null",
        "gradient_accumulation=1",
        "weight_decay_norm_bias=true",
    ]
    same = make_study(student=[f"{training}.{each}" for each in defaults]).run("ce", 0)
    assert same.sha256 == plain.sha256
    for setting in ("ema.decay=0.9", "gradient_accumulation=2", "max_grad_norm=1.0"):
        assert make_study(student=[f"{training}.{setting}"]).run("ce", 0).sha256 != plain.sha256


def test_the_number_of_processes_makes_another_run_only_with_batch_norm_of_their_own(
    make_study: MakeStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sha256(batch_norm: str, ranks: int) -> str:
        started = {"WORLD_SIZE": ranks, "RANK": 0, "MASTER_ADDR": "localhost", "MASTER_PORT": 1}
        for name, value in started.items():
            monkeypatch.setenv(name, str(value))
        study = make_study(student=[f"training.batch_norm={batch_norm}"])
        return study.run("ce", 0).sha256

    plain = make_study().run("ce", 0)
    assert "batch_norm" not in plain.identity["training"]
    one, two, three = (sha256("local", ranks) for ranks in (1, 2, 3))
    assert {sha256("sync", 1), sha256("sync", 3), one} == {plain.sha256}
    assert len({plain.sha256, two, three}) == 3
    monkeypatch.delenv("MASTER_ADDR")  # of no group: other programs say WORLD_SIZE too
    assert make_study(student=["training.batch_norm=local"]).run("ce", 0).sha256 == one


def test_one_process_exports_what_several_trained_with_batch_norm_of_their_own(
    make_study: MakeStudy, tmp_path: Path
) -> None:
    study = make_study(student=["training.batch_norm=local"])
    run = study.run("ce", 0)
    assert trained_by_any_number(run) is run  # there is none
    two = replace(run, ranks=2)
    train_student(two, device="cpu")
    found = trained_by_any_number(run)
    assert found.folder == two.folder != run.folder
    (card,) = export_student(found, weights_of(found, "last"), tmp_path / "exported", device="cpu")
    assert card["metrics"] == found.summary["last"]
    assert trained_by_any_number(make_study().run("ce", 0)).summary is None  # another training
    train_student(replace(run, ranks=3), device="cpu")
    with pytest.raises(TrainError, match="trained with several numbers of processes") as refusal:
        trained_by_any_number(run)
    assert str(two.folder) in str(refusal.value)
    train_student(run, device="cpu")
    assert trained_by_any_number(run) is run


def test_a_teacher_is_trained_with_smoothed_labels_where_its_file_says_so() -> None:
    smoothed, plain = (
        load_teacher("digits-resnet20", [f"training.label_smoothing={share}"])
        for share in (0.1, 0.0)
    )
    runs = [TeacherRun(each, load_teacher_data(each, each.training)) for each in (smoothed, plain)]
    assert [run.terms[0].options for run in runs] == [{"label_smoothing": 0.1}, {}]
    assert runs[0].identity["training"]["label_smoothing"] == 0.1
    assert runs[1].identity["training"]["label_smoothing"] == 0.0


def test_the_blocks_of_the_recipes_page_are_those_of_a_file() -> None:
    page = (ROOT / "docs" / "how-to/recipe.md").read_text()
    fences = re.findall(r"^```(\w*)\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    blocks = [parse_yaml(text) for language, text in fences if not language]
    assert len(blocks) == 2
    for block in blocks:
        overrides = [
            f"{part}.{key}={json.dumps(value)}"
            for part in block
            for key, value in block[part].items()
        ]
        config = as_plain(load_student("digits-resnet8", overrides))
        for part, keys in block.items():
            for key, value in keys.items():
                assert config[part][key] == value or isinstance(value, (dict, str))
