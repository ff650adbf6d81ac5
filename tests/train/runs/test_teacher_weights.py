"""The weights that match a teacher's config, and their training."""

from __future__ import annotations

import io
import itertools
import json
import os
import re
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from rich.console import Console

from teach_once.configs.load import load_teacher
from teach_once.runtime.command.options import Compute
from teach_once.store.identity import identity_sha256
from teach_once.train.cli.commands import cli
from teach_once.train.recording.options import Recording
from teach_once.train.recording.printing import EpochPrinter
from teach_once.train.runs.files import summary_document
from teach_once.train.runs.weights import training_folder
from teach_once.train.sessions.teacher import train_teacher
from tests.support.project import ROOT


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    return tmp_path / "w.pt"


@pytest.fixture
def call(weights: Path) -> list[str]:
    """A command that trains a small teacher for two epochs."""
    settings = ["teacher.arch=resnet8", f"teacher.weights={weights}", "training.max_per_class=10"]
    return ["teacher", "digits-resnet20", "--device", "cpu", *settings, "training.epochs=2"]


def stopped_after(monkeypatch: pytest.MonkeyPatch, epoch: int, call: list[str]) -> None:
    """Run the command, and stop it by a signal after that epoch."""

    def stop(printer: EpochPrinter, result) -> None:
        if result.epoch == epoch:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(EpochPrinter, "__call__", stop)
        assert cli(call) == 128 + signal.SIGTERM


def test_a_teacher_is_trained_once_and_other_settings_are_refused(
    call: list[str], weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli(call) == 0
    assert cli(call) == 0
    assert f"{weights} exists (test top-1 error" in capsys.readouterr().out
    for other, told in (
        ("training.epochs=3", "training.epochs: expected 3, found 2"),
        ("teacher.arch=resnet14", "arch: expected 'resnet14', found 'resnet8'"),
        ("dataset.normalization.mean=[0.4]", "normalization.mean: expected [0.4], found [0.3]"),
    ):
        assert cli([*call, other]) == 2
        assert told in capsys.readouterr().err
    assert cli([*call, "training.epochs=3", "training=null"]) == 0
    state = torch.load(weights, weights_only=True)
    state["fc.bias"] += 1
    torch.save(state, weights)  # the user's own from now on
    assert cli([*call, "training.epochs=3"]) == 0


def test_weights_of_other_data_are_refused(
    call: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli(call) == 0
    assert cli([*call, "dataset.validation_fraction=0.1"]) == 2
    assert "dataset_digest: expected" in capsys.readouterr().err


def test_weights_are_used_with_other_views_and_the_command_says_so(
    call: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli(call) == 0
    capsys.readouterr()
    assert cli([*call, "views.augment.pad_px=0", "views.count=1", "views.seed=3"]) == 0
    told = capsys.readouterr().out
    assert "nothing to do" in told
    assert "used as it is: augment.pad_px: expected 0, found 1; views_seed: expected 3" in told


def test_weights_whose_data_are_not_at_hand_are_used_and_the_command_says_so(
    call: list[str], weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli(call) == 0
    assert cli([*call, "dataset.type=imagefolder", f"dataset.root={tmp_path / 'gone'}"]) == 0
    told = capsys.readouterr().out
    assert "nothing to do" in told
    assert "cannot check whether it was trained on these data: dataset.root: folder" in told


def test_an_interrupted_retraining_leaves_the_weights_what_they_are(
    call: list[str],
    weights: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli(call) == 0
    stopped_after(monkeypatch, 1, [*call, "training.epochs=4", "--retrain"])
    assert cli([*call, "training.epochs=4"]) == 2
    assert "training.epochs: expected 4, found 2" in capsys.readouterr().err
    assert cli(call) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert cli([*call, "training.epochs=4", "--retrain"]) == 0
    told = capsys.readouterr().out
    assert "epoch   2/4" in told  # resumed
    assert "epoch   1/4" not in told
    assert cli([*call, "training.epochs=4"]) == 0


def test_weights_trained_on_slices_of_batches_are_used_whatever_their_number(
    call: list[str], weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli(call) == 0
    assert cli([*call, "training.batch_norm=local"]) == 0  # the same with one process
    summary = training_folder(weights) / "summary.json"
    content = json.loads(summary.read_text())
    content["settings"]["training"] |= {"batch_norm": "local", "ranks": 4}
    del content["content_sha256"]
    summary.write_bytes(summary_document(content))
    assert cli([*call, "training.batch_norm=local"]) == 0
    assert cli(call) == 2
    assert re.search("training.batch_norm: .*'local'", capsys.readouterr().err)


def test_a_record_with_more_settings_than_can_be_read_is_cut(
    call: list[str], weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli(call) == 0
    summary = training_folder(weights) / "summary.json"
    content = json.loads(summary.read_text())
    content["settings"] |= dict.fromkeys(map(str, range(5_000)), 1)
    del content["content_sha256"]
    summary.write_text(json.dumps(content | {"content_sha256": identity_sha256(content)}))
    capsys.readouterr()
    cli(call)
    told = "".join(capsys.readouterr())
    assert "and 4,980 more" in told
    assert len(told) < 3_000


def test_an_interrupted_training_is_not_lost_to_other_settings(
    call: list[str],
    weights: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    stopped_after(monkeypatch, 1, call)
    checkpoint = training_folder(weights) / "checkpoint.pt"
    before = checkpoint.read_bytes()
    assert cli([*call, "training.epochs=1"]) == 2
    told = capsys.readouterr().err
    assert "unfinished training with other settings, 1 finished epochs" in told
    assert "training.epochs: expected 1, found 2" in told
    assert "fix: python -m train teacher digits-resnet20 --retrain teacher.arch=resnet8" in told
    assert checkpoint.read_bytes() == before
    assert cli([*call, "training.epochs=1", "--retrain"]) == 0
    assert "discarded: " in capsys.readouterr().out


def test_a_long_training_into_a_missing_file_needs_consent(
    call: list[str],
    weights: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("teach_once.train.sessions.loop.Recorder", None)  # it would take days
    long = [*call, "training.epochs=1000000"]
    assert cli(long) == 2
    told = capsys.readouterr().err
    assert f"file {weights} not found, and training it takes about" in told
    cost = r"[\d.]+ h of processor time: 1,000,000 epochs x 100 images through resnet8 on cpu"
    assert re.search(cost, told)
    assert "with make: TRAIN_TEACHER=1" in told
    assert "fix: python -m train teacher digits-resnet20 --train-teacher teacher.arch" in told
    assert not training_folder(weights).exists()


def test_a_slow_clock_alone_asks_for_no_consent(
    call: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a loaded machine the wall clock runs on while other programs have the processor."""
    monkeypatch.setattr(
        "teach_once.runtime.command.cost.time.perf_counter", itertools.count(0, 1000).__next__
    )
    stopped_after(monkeypatch, 1, call)
    assert "of processor time without tests, estimated" in capsys.readouterr().out


def test_the_default_teacher_needs_no_consent_and_a_changed_one_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("teach_once.train.sessions.missing_weights._HOURS_TO_AGREE_TO", 0.0)
    monkeypatch.chdir(tmp_path)
    command = ["teacher", "digits-resnet20", "--device", "cpu"]
    assert cli([*command, "training.epochs=2"]) == 2
    assert "training it takes about" in capsys.readouterr().err
    stopped_after(monkeypatch, 1, command)
    assert (tmp_path / "weights/digits-resnet20.training/checkpoint.pt").exists()


def test_consent_is_asked_for_once(
    call: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("teach_once.train.sessions.missing_weights._HOURS_TO_AGREE_TO", 0.0)
    assert cli(call) == 2
    stopped_after(monkeypatch, 1, [*call, "--train-teacher"])
    assert "without tests, estimated from a few steps" in capsys.readouterr().out
    assert cli(call) == 0  # resumes what was agreed to


def test_a_trial_changes_nothing_of_the_training(call: list[str], weights: Path) -> None:
    config = load_teacher(call[1], call[4:])
    train_teacher(config, Compute("cpu"), Recording(console=Console(file=io.StringIO())))
    without = torch.load(weights, weights_only=True)
    weights.unlink()
    assert cli(call) == 0
    after = torch.load(weights, weights_only=True)
    assert all(torch.equal(without[name], after[name]) for name in without)


def test_make_hands_consent_on() -> None:
    shown = subprocess.run(
        ["make", "-n", "cache-teacher", "TRAIN_TEACHER=1"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "--train-teacher" in shown
