"""Stage 2: cached equals live, runs resume exactly, and errors are reported."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import shutil
import signal
from collections.abc import Callable, Generator
from pathlib import Path

import pytest
import torch

from teach_once.configs.schema import StudentNet
from teach_once.nets.networks.names import stage_modules
from teach_once.nets.networks.zoo import build
from teach_once.nets.student import describe_student
from teach_once.nets.teacher.taps import as_is, read_stages
from teach_once.nets.weights.files import load_weights
from teach_once.report.runs import results_in
from teach_once.runtime.command.options import Compute
from teach_once.runtime.command.signals import Stopped as StoppedBySignal
from teach_once.runtime.errors import Busy
from teach_once.runtime.safe.locks import Job, WriterLock
from teach_once.store import CacheMismatch, CacheMissing
from teach_once.store.read.reader import TeacherCache
from teach_once.train.engine.epoch_result import EpochResult
from teach_once.train.errors import TrainError
from teach_once.train.method.connectors import (
    Connectors,
    StageMismatch,
    build_connectors,
)
from teach_once.train.outputs.cached_teacher import CachedTeacher
from teach_once.train.recording.checkpoint import Partial
from teach_once.train.recording.options import Recording
from teach_once.train.recording.recorder import Recorder
from teach_once.train.runs.study import Study, open_study
from teach_once.train.schedule import learning_rate_at
from teach_once.train.sessions.student import train_student
from teach_once.train.sessions.teacher import train_teacher
from teach_once.views.pixels.batches import ViewBatch
from teach_once.views.seeds import permutation
from tests.support.caches.teacher_cache import make_cache
from tests.support.training.training_runs import largest_relative, without_times

MakeStudy = Callable[..., Study]
FLOAT32 = ("taps.logits=float32", "taps.channel_means=float32")


def losses_and_weights(
    study: Study, method: str, *, live: bool
) -> tuple[list[float], dict[str, torch.Tensor]]:
    epochs: list[EpochResult] = []
    train_student(study.run(method, 0, live_teacher=live), device="cpu", on_epoch=epochs.append)
    folder = study.run(method, 0, live_teacher=live).folder
    weights = torch.load(folder / "last.pt", weights_only=True)
    return [loss for epoch in epochs for loss in epoch.step_losses], weights


# ---- cached equals live


@pytest.mark.parametrize(
    ("method", "bn"), [("kd", "eval"), ("cd+gkd+edt", "eval"), ("cd+gkd", "recalibrated")]
)
def test_a_cached_run_equals_a_live_one_step_by_step(
    make_study: MakeStudy, method: str, bn: str
) -> None:
    study = make_study(teacher=(*FLOAT32, f"teacher.bn={bn}"))
    cached, cached_weights = losses_and_weights(study, method, live=False)
    live, live_weights = losses_and_weights(study, method, live=True)
    assert len(cached) == 4 * 4
    assert largest_relative(live, cached) < 1e-5
    for name, weight in live_weights.items():
        assert torch.allclose(weight, cached_weights[name], rtol=1e-4, atol=1e-4), name


def test_with_float16_taps_a_cached_run_stays_within_a_thousandth(make_study: MakeStudy) -> None:
    # A gentle learning rate: training multiplies any difference, be it one of rounding.
    study = make_study(student=["training.learning_rate=1e-3"])
    cached, _ = losses_and_weights(study, "cd+gkd", live=False)
    live, _ = losses_and_weights(study, "cd+gkd", live=True)
    assert 0 < largest_relative(live, cached) < 1e-3


def test_one_view_off_is_noticed(make_study: MakeStudy, monkeypatch: pytest.MonkeyPatch) -> None:
    study = make_study(teacher=FLOAT32, student=["training.learning_rate=1e-3"])
    live, _ = losses_and_weights(study, "cd+gkd", live=True)
    read_view = TeacherCache.read_view

    def read_next(cache: TeacherCache, view: int, *taps: object, **options: object) -> dict:
        return read_view(cache, (view + 1) % cache.num_views, *taps, **options)

    monkeypatch.setattr(TeacherCache, "read_view", read_next)
    cached, _ = losses_and_weights(study, "cd+gkd", live=False)
    assert largest_relative(live, cached) > 1e-3


# ---- runs


def test_a_run_leaves_its_files_and_a_finished_one_is_not_repeated(make_study: MakeStudy) -> None:
    study = make_study()
    first = train_student(study.run("cd", 1))
    folder = study.run("cd", 1).folder
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "run.json",
        "metrics.jsonl",
        "last.pt",
        "best.pt",
        "summary.json",
        "writer.lock",
    }
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2, 3, 4]
    assert set(lines[0]["losses"]) == {"ce", "cd"}
    assert lines[-1]["test"] == first["last"]
    assert (
        min(line["test"]["top1_error"] for line in lines)
        == (first["best"]["metrics"]["top1_error"])
    )
    before = (folder / "last.pt").stat().st_mtime_ns
    assert train_student(study.run("cd", 1)) == first
    assert (folder / "last.pt").stat().st_mtime_ns == before


def test_the_saved_student_is_a_plain_network_without_connectors(make_study: MakeStudy) -> None:
    study = make_study()
    train_student(study.run("cd+gkd", 0))
    network = build("resnet8", num_classes=10, in_channels=1)
    load_weights(network, study.run("cd+gkd", 0).folder / "best.pt")


def test_with_a_held_out_split_the_best_epoch_is_chosen_on_it(make_study: MakeStudy) -> None:
    study = make_study(teacher=["dataset.validation_fraction=0.3"])
    epochs: list[EpochResult] = []
    summary = train_student(study.run("kd", 0), on_epoch=epochs.append)
    chosen = min(epochs, key=lambda epoch: epoch.tested.validation["top1_error"])
    assert summary["best"]["chosen_on"] == "validation"
    assert summary["best"]["epoch"] == chosen.epoch
    assert summary["best"]["metrics"] == chosen.tested.test
    assert all(epoch.tested.validation != epoch.tested.test for epoch in epochs)
    (result,) = results_in(study.folder).results
    assert result.last_validation == epochs[-1].tested.validation


@pytest.mark.long  # the compiler takes a minute; the next test captures the same graphs without it
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.filterwarnings("ignore")  # torch's compiler has its own
def test_a_compiled_student_with_connectors_learns_the_same(make_study: MakeStudy) -> None:
    settings = ["training.learning_rate=1e-3", "training.epochs=2", "training.batch_size=60"]
    terms = ["methods.cd+gkd=[{loss: ce}, {loss: gkd}, {loss: cd, weight: 6}]"]
    found = {}
    for compiled in ("false", "true"):
        study = make_study(student=[*settings, *terms, f"training.compile={compiled}"])
        found[compiled], _ = losses_and_weights(study, "cd+gkd", live=False)
    assert largest_relative(found["false"], found["true"]) < 1e-4


@pytest.mark.filterwarnings("ignore")
def test_compiled_runs_after_one_another_read_the_maps_that_each_needs(
    make_study: MakeStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    # This backend captures as the default one does, and then runs the operations as they are.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    settings = ["training.learning_rate=1e-3", "training.epochs=2", "training.batch_size=16"]
    found = {}
    for compiled in ("false", "true"):
        study = make_study(student=[*settings, f"training.compile={compiled}"])
        for method in ("ce", "cd"):
            shutil.rmtree(study.run(method, 0).folder, ignore_errors=True)
            found[method, compiled], _ = losses_and_weights(study, method, live=False)
    for method in ("ce", "cd"):
        assert largest_relative(found[method, "false"], found[method, "true"]) < 1e-4


def test_where_not_every_epoch_is_tested_the_last_one_is(make_study: MakeStudy) -> None:
    study = make_study(student=["training.epochs=5", "training.eval_every=2"])
    epochs: list[EpochResult] = []
    summary = train_student(study.run("kd", 0), on_epoch=epochs.append)
    tested = [epoch.epoch for epoch in epochs if epoch.tested.test is not None]
    assert tested == [2, 4, 5]
    assert summary["best"]["epoch"] in tested
    lines = (study.run("kd", 0).folder / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["test"] is None for line in lines] == [1, 0, 1, 0, 0]


def test_the_best_epoch_is_the_first_of_equals(
    make_study: MakeStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    errors = iter([30.0, 20.0, 20.0, 25.0])

    def evaluate_batches(*_: object) -> Generator[None, None, dict[str, float]]:
        yield
        return {"top1_error": next(errors)}

    monkeypatch.setattr("teach_once.train.sessions.loop.evaluate_batches", evaluate_batches)
    summary = train_student(make_study().run("ce", 0))
    assert summary["best"]["epoch"] == 2
    assert summary["last"]["top1_error"] == 25.0


def test_other_settings_are_another_run(make_study: MakeStudy) -> None:
    study = make_study()
    other = make_study(student=["training.weight_decay=1e-3"])
    folders = {
        study.run("ce", 0).folder,
        study.run("ce", 1).folder,
        study.run("kd", 0).folder,
        study.run("ce", 0, live_teacher=True).folder,
        other.run("ce", 0).folder,
    }
    assert len(folders) == 5
    assert study.run("ce", 0).identity != study.run("ce", 1).identity
    tested = make_study(teacher=["views.evaluation={type: center-crop, resize_px: 9, crop_px: 8}"])
    assert tested.cache.path == study.cache.path
    assert tested.run("ce", 0).identity != study.run("ce", 0).identity


def test_a_run_that_another_process_trains_is_refused_with_its_pid(make_study: MakeStudy) -> None:
    study = make_study()
    folder = study.run("ce", 0).folder
    folder.mkdir(parents=True)
    lock = WriterLock(folder, Job())
    with pytest.raises(Busy, match=f"is being written by process {os.getpid()}"):
        train_student(study.run("ce", 0))
    lock.release()
    train_student(study.run("ce", 0))


class Stopped(Exception):
    pass


@pytest.mark.parametrize("after_epoch", [1, 2, 3])
def test_a_run_that_was_stopped_and_resumed_equals_an_uninterrupted_one_bit_for_bit(
    make_study: MakeStudy, after_epoch: int
) -> None:
    study = make_study()

    def stop(result: EpochResult) -> None:
        if result.epoch == after_epoch:
            raise Stopped

    with pytest.raises(Stopped):
        train_student(study.run("cd+gkd+edt", 0), on_epoch=stop)
    folder = study.run("cd+gkd+edt", 0).folder
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": "a line written after the last checkpoint"}\n')
    train_student(study.run("cd+gkd+edt", 0))
    resumed = torch.load(folder / "last.pt", weights_only=True)
    metrics = without_times(folder)
    shutil.rmtree(folder)
    train_student(study.run("cd+gkd+edt", 0))
    whole = torch.load(folder / "last.pt", weights_only=True)
    assert all((resumed[name] == whole[name]).all() for name in whole)

    assert metrics == without_times(folder)


@pytest.mark.parametrize("placement", ["auto", "window"])
def test_a_run_killed_at_random_steps_equals_an_uninterrupted_one_bit_for_bit(
    make_study: MakeStudy, monkeypatch: pytest.MonkeyPatch, placement: str
) -> None:
    study = dataclasses.replace(make_study(), placement=placement)
    steps_left = [3]
    keep = Recorder.save

    def kept_then_killed(self: Recorder, partial: Partial) -> None:
        keep(self, partial)
        steps_left[0] -= 1
        if steps_left[0] == 0:
            raise Stopped

    monkeypatch.setattr(Recorder, "save", kept_then_killed)
    for following in (2, 5, 1, 10**9):
        with pytest.raises(Stopped):
            train_student(study.run("cd+gkd+edt", 0), checkpoint_minutes=0)
        steps_left[0] = following
    train_student(study.run("cd+gkd+edt", 0), checkpoint_minutes=0)
    folder = study.run("cd+gkd+edt", 0).folder
    resumed = torch.load(folder / "last.pt", weights_only=True)
    metrics = without_times(folder)
    shutil.rmtree(folder)
    train_student(study.run("cd+gkd+edt", 0))
    whole = torch.load(folder / "last.pt", weights_only=True)
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    assert metrics == without_times(folder)


def test_an_epoch_shows_every_sample_once_in_the_order_of_seed_and_epoch(
    make_study: MakeStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[int] = []
    outputs = CachedTeacher.rows

    def noted(self: CachedTeacher, batch: ViewBatch) -> dict[str, torch.Tensor]:
        shown.extend(batch.ids.tolist())
        return outputs(self, batch)

    monkeypatch.setattr(CachedTeacher, "rows", noted)
    train_student(make_study().run("cd", 5))
    epochs = [shown[start : start + 60] for start in range(0, len(shown), 60)]
    assert epochs == [permutation(5, epoch, 60).tolist() for epoch in (1, 2, 3, 4)]
    assert all(sorted(epoch) == list(range(60)) for epoch in epochs)


def test_the_learning_rate_moves_with_every_step(make_study: MakeStudy) -> None:
    study = make_study(student=['training.schedule={"type": "onecycle"}'])
    rates: list[float] = []
    train_student(study.run("ce", 0), on_epoch=lambda result: rates.append(result.learning_rate))
    training = study.config.training  # an epoch has four steps; told is the rate of the last
    assert rates == [learning_rate_at(training, 4 * epoch - 1, 4) for epoch in (1, 2, 3, 4)]


def test_a_signal_saves_the_very_step_and_the_same_call_resumes_there(
    make_study: MakeStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = make_study()
    handlers = signal.getsignal(signal.SIGTERM)
    outputs, steps = CachedTeacher.rows, iter(range(10**6))

    def interrupted(self: CachedTeacher, batch: ViewBatch) -> dict[str, torch.Tensor]:
        if next(steps) == 8:  # the first of the third epoch's four steps
            os.kill(os.getpid(), signal.SIGTERM)
        return outputs(self, batch)

    with monkeypatch.context() as patched:
        patched.setattr(CachedTeacher, "rows", interrupted)
        with pytest.raises(StoppedBySignal, match="stopped in epoch 3 after step 1") as stopped:
            train_student(study.run("cd", 0))
    assert stopped.value.exit_code == 143
    assert signal.getsignal(signal.SIGTERM) is handlers
    folder = study.run("cd", 0).folder
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert (checkpoint["epoch"], checkpoint["partial"]["step"]) == (2, 1)
    train_student(study.run("cd", 0))
    metrics = without_times(folder)
    shutil.rmtree(folder)
    train_student(study.run("cd", 0))
    assert metrics == without_times(folder)


@pytest.mark.parametrize("batch_size", [16, 60])  # 60: an epoch is one step
def test_a_signal_between_epochs_ends_the_run_there(make_study: MakeStudy, batch_size: int) -> None:
    study = make_study(student=[f"training.batch_size={batch_size}"])

    def stop(result: EpochResult) -> None:
        if result.epoch == 2:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(StoppedBySignal, match="stopped after epoch 2") as stopped:
        train_student(study.run("cd", 0), on_epoch=stop)
    assert stopped.value.exit_code == 130
    assert train_student(study.run("cd", 0))["epochs"] == 4


def test_an_idle_classifier_stays_or_shrinks_as_asked(make_study: MakeStudy) -> None:
    terms = ["methods.cd+gkd+edt.0.start_epoch=4", "methods.cd+gkd+edt.1.start_epoch=4"]
    norms = {}
    for frozen in ("true", "false"):
        study = make_study(
            student=[
                *terms,
                "training.weight_decay=0.5",
                f"training.freeze_idle_classifier={frozen}",
            ]
        )
        weights: list[torch.Tensor] = []

        def stop(result: EpochResult) -> None:
            if result.epoch == 3:
                raise Stopped

        with pytest.raises(Stopped):
            train_student(study.run("cd+gkd+edt", 0), on_epoch=stop)
        checkpoint = study.run("cd+gkd+edt", 0).folder / "checkpoint.pt"
        weights.append(torch.load(checkpoint, weights_only=True)["network"]["fc.weight"])
        norms[frozen] = weights[0].norm().item()
    fresh = build("resnet8", num_classes=10, in_channels=1, seed=0).fc.weight.norm().item()
    assert norms["true"] == pytest.approx(fresh, rel=1e-6)
    assert norms["false"] < 0.9 * fresh


def test_a_student_may_use_the_first_views_of_a_cache(make_study: MakeStudy) -> None:
    study = make_study(student=["num_views=2"])
    epochs: list[EpochResult] = []
    train_student(study.run("cd", 0), on_epoch=epochs.append)
    assert study.num_views == 2


# ---- connectors


def test_connectors_act_on_maps_and_not_on_means() -> None:
    connectors = build_connectors({"stage1": 2}, {"stage1": 3}, "conv-bn-relu", seed=0)
    maps = {"stage1": torch.randn(4, 2, 5, 5)}
    (means,) = connectors(maps)
    assert means.shape == (4, 3)
    flat = {"stage1": maps["stage1"].mean((2, 3), keepdim=True)}
    assert not torch.allclose(means, connectors(flat)[0], atol=1e-3)


def test_a_connector_is_there_also_where_channels_match_unless_none_is_asked_for() -> None:
    channels = {"stage1": 4}
    assert sum(p.numel() for p in Connectors(channels, channels, "conv-bn-relu").parameters())
    assert not list(Connectors(channels, channels, "none").parameters())


def test_stages_that_do_not_match_are_refused() -> None:
    with pytest.raises(StageMismatch, match=r"student has 1 stages and the cache 2 \(stage1"):
        Connectors({"stage1": 4}, {"stage1": 4, "stage2": 4}, "conv-bn-relu")
    with pytest.raises(StageMismatch, match="stage1 has 4 channels in the student and 8"):
        Connectors({"stage1": 4}, {"stage1": 8}, "none")


def test_describe_student_returns_its_shapes_and_leaves_the_network_as_it_was() -> None:
    network = build("resnet8", num_classes=2)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    net = StudentNet(arch="resnet8")
    parts = describe_student(network, net, {"means", "pre_logits"}, (16, 16, 3))
    assert parts.modules == stage_modules("resnet8")
    assert parts.shapes == {"stage1": (16, 16, 16), "stage2": (32, 8, 8), "stage3": (64, 4, 4)}
    assert (parts.classifiers, parts.embedding) == (("fc",), 64)
    assert network.training
    assert all((value == before[name]).all() for name, value in network.state_dict().items())
    with read_stages(network, stage_modules("resnet8"), as_is) as maps:
        assert maps == {}


# ---- what is refused


def test_a_missing_cache_is_an_error_that_names_the_command(make_study: MakeStudy) -> None:
    study = make_study()
    shutil.rmtree(study.cache.path)
    with pytest.raises(CacheMissing, match="make cache-teacher TEACHER=digits-resnet20"):
        open_study(
            study.config, study.teacher, caches_dir=study.cache.path.parent, runs_dir=study.runs_dir
        )


def test_a_cache_of_other_weights_is_refused_with_the_field(
    make_study: MakeStudy, small_teacher: Callable, tmp_path: Path
) -> None:
    study = make_study()
    state = torch.load(study.teacher.teacher.weights, weights_only=True)
    state["conv1.weight"][0, 0, 0, 0] += 1e-3
    torch.save(state, tmp_path / "changed.pt")
    with pytest.raises(CacheMismatch, match=r"teacher\.weights_sha256: expected"):
        open_study(
            study.config,
            small_teacher(f"teacher.weights={tmp_path / 'changed.pt'}"),
            caches_dir=study.cache.path.parent,
            runs_dir=study.runs_dir,
        )


def test_a_cache_given_by_its_path_is_checked_too(
    make_study: MakeStudy, small_teacher: Callable, tmp_path: Path
) -> None:
    study = make_study()
    other = make_cache(small_teacher("views.seed=5"), tmp_path / "others")
    with pytest.raises(CacheMismatch, match=r"views\.seed: expected 0, found 5"):
        open_study(
            study.config,
            study.teacher,
            caches_dir=tmp_path,
            runs_dir=tmp_path,
            cache_path=other.path,
        )


def test_more_views_than_the_cache_holds_are_refused(make_study: MakeStudy) -> None:
    with pytest.raises(TrainError, match=r"num_views is 4, but views.count .* gives 3 views"):
        make_study(student=["num_views=4"])


@pytest.mark.parametrize(
    ("override", "told"),
    [
        (
            "methods.cd.0.start_epoch=9",
            "training ends after epoch 4: this term would never be active",
        ),
        ("methods.ce.0.start_epoch=2", "every weight is zero in epoch 1"),
        ('methods.kd=[{"loss":"kd"},{"loss":"kd"}]', "duplicate loss 'kd'"),
    ],
)
def test_methods_that_cannot_work_are_refused(
    make_study: MakeStudy, override: str, told: str
) -> None:
    study = make_study(student=[override])
    method = override.split(".")[1].split("=")[0]
    with pytest.raises(TrainError, match=told):
        train_student(study.run(method, 0))


def test_a_run_whose_loss_is_no_number_any_more_is_stopped_with_its_place(
    make_study: MakeStudy,
) -> None:
    study = make_study(student=["training.learning_rate=1e30"])
    with pytest.raises(TrainError, match=r"the loss became (nan|inf) in epoch 1, step \d+"):
        train_student(study.run("ce", 0))
    assert not (study.run("ce", 0).folder / "summary.json").exists()


def test_the_term_that_is_not_a_number_is_named(make_study: MakeStudy) -> None:
    study = make_study(student=["methods.x=[{loss: ce}, {loss: 'tests.support.own_losses:root'}]"])
    told = r"epoch 1, step 1: ce \d.*, tests\.support\.own_losses:root nan"
    with pytest.raises(TrainError, match=told):
        train_student(study.run("x", 0))


def test_a_student_with_other_stages_than_the_cache_is_refused(make_study: MakeStudy) -> None:
    study = make_study(student=["student.stages=[layer2,layer3]"])
    with pytest.raises(StageMismatch, match="student has 2 stages and the cache 3"):
        train_student(study.run("cd", 0))


# ---- teachers


@pytest.mark.parametrize("augment", ["pad-crop-flip", "random-resized-crop"])
def test_a_teacher_may_train_for_more_epochs_than_there_are_views(
    small_teacher: Callable, tmp_path: Path, console, augment: str
) -> None:
    crop = f"views.augment={{type: {augment}, flip: false}}"
    size = ["views.augment.size_px=8"] if augment == "random-resized-crop" else []
    one_pixel = ["views.augment.pad_px=1"] if augment == "pad-crop-flip" else []
    settings = [
        f"teacher.weights={tmp_path / 'w.pt'}",
        "training.epochs=10",
        "training.max_per_class=3",
    ]
    config = small_teacher(crop, *size, *one_pixel, *settings)
    assert train_teacher(config, Compute("cpu", 0), Recording(console=console))["epochs"] == 10


def test_a_run_killed_after_its_last_epoch_is_finished_by_the_next_call(
    make_study: MakeStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = make_study()

    def killed(self: Recorder, extra: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Recorder, "finish", killed)
        with pytest.raises(KeyboardInterrupt):
            train_student(study.run("cd", 0))
    folder = study.run("cd", 0).folder
    metrics = without_times(folder)
    kept = torch.load(folder / "checkpoint.pt", weights_only=True)
    summary = train_student(study.run("cd", 0))
    assert summary["last"] == metrics[-1]["test"]
    assert summary["epochs"] == 4
    assert without_times(folder) == metrics
    last = torch.load(folder / "last.pt", weights_only=True)
    assert all(torch.equal(last[name], kept["network"][name]) for name in last)
    assert summary["seconds"] >= kept["seconds"] > 0


def test_a_checkpoint_without_its_metrics_is_not_resumed(make_study: MakeStudy) -> None:
    study = make_study()

    def stop(result: EpochResult) -> None:
        if result.epoch == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(StoppedBySignal):
        train_student(study.run("cd", 0), on_epoch=stop)
    metrics = study.run("cd", 0).folder / "metrics.jsonl"
    whole = metrics.read_text().splitlines(keepends=True)
    metrics.write_text(whole[0])
    with pytest.raises(TrainError, match=r"metrics\.jsonl has 1 of the 3 epochs"):
        train_student(study.run("cd", 0))
    assert (metrics.parent / "checkpoint.pt").is_file()
    metrics.write_text("".join(whole))
    epochs: list[EpochResult] = []
    train_student(study.run("cd", 0), on_epoch=epochs.append)
    assert [result.epoch for result in epochs] == [4]
    assert [line["epoch"] for line in without_times(metrics.parent)] == [1, 2, 3, 4]


def test_a_damaged_checkpoint_is_named_with_what_to_do(make_study: MakeStudy) -> None:
    study = make_study()
    folder = study.run("ce", 0).folder
    folder.mkdir(parents=True)
    (folder / "checkpoint.pt").write_bytes(b"half a file")
    with pytest.raises(TrainError, match=r"checkpoint.pt is not .*\n  fix: rm .*starts again"):
        train_student(study.run("ce", 0))
