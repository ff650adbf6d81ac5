"""Requested trackers receive the content of metrics.jsonl as one run, however often it resumes."""

from __future__ import annotations

import json
import shutil
import struct
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from teach_once.runtime.errors import UserError
from teach_once.train.cli.commands import cli
from teach_once.train.engine.epoch_result import EpochResult
from teach_once.train.recording.checkpoint import Partial
from teach_once.train.recording.recorder import Recorder
from teach_once.train.recording.tracking import TRACKERS, flattened
from teach_once.train.runs.study import Run, Study
from teach_once.train.sessions.student import train_student

MakeStudy = Callable[..., Study]


class Cut(Exception):
    """Ends a training from outside."""


@pytest.fixture
def run(make_study: MakeStudy) -> Run:
    """Four epochs of cd."""
    return make_study().run("cd", 0)


@pytest.fixture
def mlflow_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "mlflow"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", folder.as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    return folder


def cut_after(epoch: int) -> Callable[[EpochResult], None]:
    def cut(result: EpochResult) -> None:
        if result.epoch == epoch:
            raise Cut

    return cut


def wandb_history(file: Path, key: str) -> list[float]:
    """What an offline run logged under a key; wandb's own process may still be writing it."""
    from wandb.proto.wandb_internal_pb2 import Record

    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        records = [Record.FromString(data) for data in wandb_records(file.read_bytes())]
        if any(record.HasField("exit") for record in records):
            items = [item for record in records for item in record.history.item]
            return [json.loads(each.value_json) for each in items if key in each.nested_key]
        time.sleep(0.1)
    raise TimeoutError(file)


def wandb_records(content: bytes, block: int = 32768) -> Iterator[bytes]:
    """The records of wandb's log: in blocks, each piece after its checksum, length and kind."""
    at, record = 7, b""  # behind the file's header
    while at + 7 <= len(content):
        if block - at % block < 7:  # no room for another piece in this block
            at += block - at % block
        size, kind = struct.unpack_from("<HB", content, at + 4)
        record += content[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last piece
            yield record
            record = b""


def losses_of(run: Run) -> list[float]:
    lines = (run.folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def test_no_tracker_is_imported_unless_it_is_asked_for(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("torch.utils.tensorboard", *TRACKERS):
        monkeypatch.setitem(sys.modules, name, None)  # importing it would raise
    train_student(run)
    assert run.is_finished


def test_tensorboard_shows_a_resumed_run_once(run: Run) -> None:
    with pytest.raises(Cut):
        train_student(run, loggers=["tensorboard"], on_epoch=cut_after(2))
    train_student(run, loggers=["tensorboard"])
    assert_logged_once(run)


def test_tensorboard_shows_a_run_that_began_again_once(run: Run) -> None:
    with pytest.raises(Cut):
        train_student(run, loggers=["tensorboard"], on_epoch=cut_after(2))
    (run.folder / "checkpoint.pt").unlink()
    train_student(run, loggers=["tensorboard"])
    assert_logged_once(run)


def assert_logged_once(run: Run) -> None:
    events = EventAccumulator(str(run.folder / "tensorboard"))
    events.Reload()
    assert {"loss/total", "loss/cd", "weight/cd", "test/top1_error", "learning_rate"} <= set(
        events.Tags()["scalars"]
    )
    scalars = events.Scalars("loss/total")
    assert [each.step for each in scalars] == [1, 2, 3, 4]
    assert [each.value for each in scalars] == pytest.approx(losses_of(run))


def test_mlflow_shows_a_resumed_run_once(run: Run, mlflow_folder: Path) -> None:
    from mlflow.tracking import MlflowClient

    with pytest.raises(Cut):
        train_student(run, loggers=["mlflow"], on_epoch=cut_after(2))
    client = MlflowClient()
    (experiment,) = [each for each in client.search_experiments() if each.name == "teach-once"]
    (begun,) = client.search_runs([experiment.experiment_id])
    assert begun.info.status == "KILLED"
    train_student(run, loggers=["mlflow"])
    (found,) = client.search_runs([experiment.experiment_id])
    assert (found.info.status, found.info.run_name) == (
        "FINISHED",
        f"digits-resnet8/{run.folder.name}",
    )
    history = client.get_metric_history(found.info.run_id, "loss/total")
    assert [each.step for each in history] == [1, 2, 3, 4]
    assert [each.value for each in history] == pytest.approx(losses_of(run))
    assert found.data.params["training.batch_size"] == "16"
    assert found.data.params["terms.1.loss"] == "cd"


def test_a_run_resumed_within_its_first_epoch_is_the_same_in_its_tracker(
    run: Run, mlflow_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow.tracking import MlflowClient

    def saved_then_cut(recorder: Recorder, partial: Partial) -> None:
        save(recorder, partial)
        raise Cut

    save = Recorder.save
    with monkeypatch.context() as patched:
        patched.setattr(Recorder, "save", saved_then_cut)
        with pytest.raises(Cut):
            train_student(run, loggers=["mlflow"], checkpoint_minutes=0)
    begun = json.loads((run.folder / "trackers.json").read_text())
    train_student(run, loggers=["mlflow"])
    assert json.loads((run.folder / "trackers.json").read_text()) == begun
    (experiment,) = MlflowClient().search_experiments(filter_string="name = 'teach-once'")
    (found,) = MlflowClient().search_runs([experiment.experiment_id])
    assert found.info.run_id == begun["mlflow"]


def test_wandb_keeps_an_offline_run_in_the_folder_of_the_run(
    run: Run, monkeypatch: pytest.MonkeyPatch, console: Console
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    train_student(run, loggers=["wandb"], console=console)
    (file,) = run.folder.glob("wandb/offline-run-*/run-*.wandb")
    assert f"tracked by wandb: {file.parent}" in console.file.getvalue()  # type: ignore[attr-defined]
    assert wandb_history(file, "loss/total") == pytest.approx(losses_of(run))
    known = json.loads((run.folder / "trackers.json").read_text())["wandb"]
    assert file.name == f"run-{known}.wandb"


def test_a_tracker_that_fails_does_not_end_the_run(
    run: Run, mlflow_folder: Path, console: Console
) -> None:
    def lose_server(result: EpochResult) -> None:
        shutil.rmtree(mlflow_folder, ignore_errors=True)

    train_student(run, loggers=["mlflow"], on_epoch=lose_server, console=console)
    assert run.is_finished
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    assert printed.count("mlflow failed and is disabled for this run") == 1


def test_a_tracker_that_is_not_there_is_an_error_before_anything_is_trained(
    run: Run, monkeypatch: pytest.MonkeyPatch, mlflow_folder: Path
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(
        UserError, match="--logger wandb: not installed\n  fix: python -m pip install wandb"
    ):
        train_student(run, loggers=["wandb"])
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nowhere://here")
    with pytest.raises(UserError, match=r"--logger mlflow: .*nowhere.*\n  fix: configure it"):
        train_student(run, loggers=["mlflow"])
    with pytest.raises(UserError, match="unknown tracker 'comet'"):
        train_student(run, loggers=["comet"])
    assert not run.is_finished
    assert losses_of(run) == []


def test_the_command_tracks_what_is_named(cached: list[str], tmp_path: Path) -> None:
    call = ["student", "digits-resnet8", "--method", "ce", "--logger", "tensorboard", *cached]
    assert cli(call) == 0
    assert list(tmp_path.glob("runs/digits-resnet8/ce-seed0-*/tensorboard/events*"))
    assert cli([*call, "--logger", "comet"]) == 2


def test_settings_are_flattened() -> None:
    assert flattened({"a": {"b": [1, {"c": 2}]}, "d": None}) == {
        "a.b.0": 1,
        "a.b.1.c": 2,
        "d": None,
    }
