"""The commands that train and store the runs behind the results page."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

import teach_once.configs.load
from benchmarks.results import long_study
from benchmarks.results.__main__ import cli
from benchmarks.results.kept import ResultsError, load_kept
from tests.support.project import ROOT

# A student and its teacher as short as they can be: what is kept does not depend on it.
STUDENT = "brief"
TEACHER_FILE = f"""
dataset: {{type: digits, max_per_class: 6, normalization: {{mean: [0.3], std: [0.35]}}}}
views: {{augment: {{type: pad-crop-flip, pad_px: 1, flip: false}}, count: all}}
teacher: {{arch: resnet8, weights: weights/{STUDENT}.pt}}
taps: {{logits: float16, channel_means: float16, attention: float16, hint: {{stage: stage2}}}}
training: {{epochs: 2, batch_size: 64, learning_rate: 0.05, schedule: {{type: onecycle}}}}
"""
STUDENT_FILE = f"""
teacher: {STUDENT}
student: {{arch: resnet8}}
training:
  epochs: 6
  batch_size: 32
  learning_rate: 0.05
  schedule: {{type: multistep, milestones: [2, 5], gamma: 0.2}}
methods:
  ce: [{{loss: ce}}]
  kd: [{{loss: ce, weight: 0.1}}, {{loss: kd, weight: 0.9, temperature: 4}}]
  at: [{{loss: ce}}, {{loss: at, weight: 60}}]
  cd: [{{loss: ce}}, {{loss: cd, weight: 6}}]
  cd+gkd: [{{loss: ce}}, {{loss: gkd, weight: 0.1}}, {{loss: cd, weight: 6}}]
  cd+gkd+edt:
    - {{loss: ce, start_epoch: 3}}
    - {{loss: cd, weight: 6, decay: 0.9, decay_epochs: [2, 5]}}
  dist: [{{loss: ce}}, {{loss: dist, weight: 2, temperature: 4}}]
"""
WEIGHTS = {"at": ("3000", "300", "100"), "dist": ("4", "1", "0.5")}
# The published study's values, and those of this one.
SMALLER = {
    "student: cifar10-16px-resnet8": f"student: {STUDENT}",
    "teacher: cifar10-16px-resnet20": f"teacher: {STUDENT}",
    "--seeds '0 1 2'": "--seeds 0",
    "views.count=20": "views.count=2",
    "training.epochs=20 training.eval_every=20": "training.epochs=2 training.eval_every=2",
    "milestones=[6, 12, 16]": "milestones=[1, 2]",
    "60 views": "9 views",
    "num_views=16": "num_views=2",
    "--methods 'cd+gkd+edt cd+gkd+early'": "--methods cd+gkd+edt",
}
LEFT_OUT = ("rkd", "lskd")  # methods without a term in STUDENT_FILE


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder where all parts of a small study have been trained with one seed."""
    folder = tmp_path_factory.mktemp("study")
    for kind, text in {"teacher": TEACHER_FILE, "student": STUDENT_FILE}.items():
        (folder / "configs" / kind).mkdir(parents=True)
        (folder / "configs" / kind / f"{STUDENT}.yaml").write_text(text)
    study = long_study.STUDY.read_text()
    for value, smaller in SMALLER.items():
        assert value in study
        study = study.replace(value, smaller)
    content = yaml.safe_load(study)
    for name, groups in content["parts"].items():
        kept = [each for each in groups if not each["label"].startswith(LEFT_OUT)]
        content["parts"][name] = kept
    for group in content["parts"]["cached"], content["parts"]["batch-norm"]:
        for each in group:
            each["commands"] = each["commands"][:1]  # of the first seed
    (folder / "study.yaml").write_text(yaml.safe_dump(content))
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        patched.setattr(teach_once.configs.load, "CONFIG_DIR", folder / "configs")
        words = ["--study", "study.yaml", "--jobs", "1", "--device", "cpu"]
        assert cli(["train", *words]) == 0
    return folder


def labels_of(folder: Path, study: str) -> list[str]:
    return [each.label for each in load_kept(folder / "docs/results" / f"{study}.json")]


@pytest.mark.long
def test_every_part_is_kept_under_its_labels(folder: Path) -> None:
    labels = labels_of(folder, STUDENT)
    assert set(labels) > {
        *("ce", "kd", "cd", "cd+gkd", "cd+gkd+edt", "at"),
        *("cd+gkd+edt, classifier decays", "cd+gkd, 1 view", "cd+gkd, 4 views"),
        *(
            "cd+gkd, 1 logit, uint8 means",
            "cd+gkd, uint8",
            "kd, 1 logit, uint8 means",
            "kd, 4 logits, uint8 means",
            "cd, recalibrated",
            "cd+gkd, live",
            "cd, live in training mode",
        ),
    }
    tried = labels_of(folder, f"{STUDENT}-weights")
    assert tried == [f"{name}, weight {each}" for name in WEIGHTS for each in WEIGHTS[name]]


@pytest.mark.long
def test_reduced_records_are_those_that_were_read(folder: Path) -> None:
    kept = load_kept(folder / "docs/results" / f"{STUDENT}.json")
    size = {each.label: each.record_bytes or 0 for each in kept}
    assert size["cd+gkd, 9 views"] == size["cd+gkd, 4 views"]
    assert size["cd+gkd, 1 logit, uint8 means"] < size["cd+gkd, uint8"] < size["cd+gkd, 4 views"]
    assert size["cd+gkd, 4 views"] < size["cd+gkd"]


def test_the_chosen_weights_have_the_lowest_validation_error() -> None:
    (student, *_) = yaml.safe_load(long_study.STUDY.read_text())["variables"].values()
    tried: dict[str, dict[str, float]] = {}
    for each in load_kept(ROOT / "docs/results" / f"{student}-weights.json"):
        assert each.first.last_validation is not None
        method = each.label.partition(", weight ")[0]
        tried.setdefault(method, {})[each.label] = each.first.last_validation["top1_error"]
    parts = long_study.LongStudy(long_study.STUDY, 1, "cpu").parts
    chosen = [group.label for group in parts["chosen"]]
    assert chosen == [min(errors, key=lambda label: errors[label]) for errors in tried.values()]
    assert {group.label for group in parts["weights"]} == {
        label for e in tried.values() for label in e
    }


def test_a_folder_with_two_caches_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("digits-resnet20-1", "digits-resnet20-2"):
        (tmp_path / name).mkdir()
    with pytest.raises(ResultsError, match=r"digits-resnet20-\*: 2 caches; expected one"):
        long_study.only_path("digits-resnet20-*")


def test_an_unknown_variable_of_a_study_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "study.yaml"
    file.write_text(long_study.STUDY.read_text().replace("--cache $full", "--cache $whole"))
    with pytest.raises(ResultsError, match="whole is neither a variable nor a cache"):
        long_study.LongStudy(file, 1, "cpu").train("methods")


def test_an_unknown_part_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli(["train", "beauty"]) == 2
    assert "one of methods, classifier" in capsys.readouterr().err


def test_a_signal_reaches_the_command_that_runs(tmp_path: Path) -> None:
    file = tmp_path / "study.yaml"
    study = long_study.STUDY.read_text()
    file.write_text(study.replace("cifar10-16px-resnet", "digits-resnet"))
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "benchmarks.results",
            "train",
            "--study",
            str(file),
            "methods",
        ],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    while "cache-teacher" not in process.stdout.readline():
        assert process.poll() is None
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 128 + signal.SIGTERM, errors
