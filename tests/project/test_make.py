"""make as users call it: it passes their words on, and each target does its work once."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.support.project import QUICK_ARGS, ROOT, make, makefile_targets

Trained = tuple[Path, subprocess.CompletedProcess[str]]


def test_make_help_all_prints_every_target() -> None:
    result = make("help-all")
    assert result.returncode == 0
    for target in makefile_targets():
        assert f"make {target} " in result.stdout


def test_make_hands_overrides_on_to_both_stages() -> None:
    overrides = "training.epochs=2 teacher.dataset.max_per_class=3 a=[1,2]"
    shown = make("-n", "ablation", f"ARGS={overrides}").stdout
    assert shown.count(f" --args='{overrides}'") == 1


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("GPUS=2", "variable GPUS: did you mean NPROC? "),
        ("OUT=folder", "variable OUT: did you mean EXPORT_DIR? "),
        ("REDO=1", "variable REDO: did you mean RETRAIN? "),
        ("TRACK=wandb", "variable TRACK: did you mean LOGGER? "),
        ("RECHECK=1", "variable RECHECK: did you mean FULL_CHECK? "),
        ("FEED=host", "variable FEED: did you mean PLACEMENT? "),
        ("SHARE=1", "variable SHARE: did you mean SHARED_LOADING? "),
        ("EPOCHS=1", "variable EPOCHS: "),
        ("verify-cache", "target verify-cache: did you mean check-recompute? "),
        ("check-cache", "target check-cache: did you mean check-checksums? "),
        ("nonsense", "target nonsense: "),
    ],
)
def test_make_with_an_old_name_names_the_new_one(given: str, meant: str) -> None:
    result = make(given)
    assert result.returncode == 2
    assert f"unknown {meant}make help-all lists all" in result.stderr


def reads(target: str) -> list[str]:
    """The variables of which the Makefile says that the target reads them."""
    refusal = make("-n", target, "BENCH=" if not target.startswith("bench") else "EXPORT_DIR=")
    assert refusal.returncode == 2
    return refusal.stderr.partition("; it reads: ")[2].removesuffix(".  Stop.\n").split()


def test_make_env_with_an_old_python_is_refused_before_anything_is_installed(
    tmp_path: Path,
) -> None:
    for name in ("Makefile", "requirements.txt"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "old-python").write_text("#!/bin/sh\nexit 1\n")  # as the comparison ends
    (tmp_path / "old-python").chmod(0o755)
    refused = make("env", "PYTHON=./old-python", cwd=tmp_path)
    assert refused.returncode != 0
    assert "older than Python 3.11\n  fix: make env PYTHON=python3.11" in refused.stderr
    assert not (tmp_path / ".venv").exists()


def test_make_env_installs_the_project_so_that_timm_can_be_imported(tmp_path: Path) -> None:
    for file in ("Makefile", "requirements.txt"):
        shutil.copy(ROOT / file, tmp_path)
    shown = subprocess.run(
        ["make", "-n", "env"], cwd=tmp_path, capture_output=True, text=True, check=True
    ).stdout
    assert "-m pip install --quiet --disable-pip-version-check --no-deps --editable ." in shown


SWITCHES = {
    "FULL_CHECK": "--full-check",
    "TRAIN_TEACHER": "--train-teacher",
    "QUIET": "--quiet --full-check",  # pip has a --quiet too
    "RETRAIN": "--retrain",
    "FILL_CACHE": "--fill-cache",
    "SHARED_LOADING": "--shared-loading",
}


def test_help_has_three_groups_of_at_most_eight_and_help_all_has_the_rest() -> None:
    _, *groups, pointer = make("help").stdout.strip().split("\n\n")
    assert [group.splitlines()[0].split(",")[0].rstrip(":") for group in groups] == [
        *("Train students", "Settings", "Develop")
    ]
    assert all(1 < len(group.splitlines()) <= 9 for group in groups)  # with a heading each
    assert "make help-all" in pointer
    everything = make("help-all").stdout
    assert set(re.findall(r"^  make (\S+)", everything, re.M)) == makefile_targets()
    known = set(re.findall(r"^([A-Z_]+) *\?=", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"\b([A-Z_]{3,})\b", everything)) >= known - {"PYTHON", "BENCH"}


@pytest.mark.parametrize("target", sorted(makefile_targets() - {"help"}))
def test_a_target_uses_every_variable_that_it_reads_and_refuses_the_others(target: str) -> None:
    names = set(reads(target)) - {"PYTHON"}
    settings = [f"{name}=<{name}>" for name in names]
    # CACHE takes the place of the teacher and its pass.
    shown = make("-n", target, *(each for each in settings if each != "CACHE=<CACHE>")).stdout
    if "CACHE" in names:
        shown += make("-n", target, "CACHE=<CACHE>").stdout
    for name in names:
        assert SWITCHES.get(name, f"<{name}>") in shown, name


@pytest.mark.parametrize(
    ("targets", "given", "meant"),
    [
        ("ablation", "METHOD=kd", "METHODS"),
        ("ablation", "SEED=1", "SEEDS"),
        ("train-student", "METHODS=kd", "METHOD"),
        ("train-student export-student", "SEEDS=1", "SEED"),
        ("train-student", "TEACHER=digits-resnet20", "STUDENT"),
        ("train-student", "JOBS=2", "NPROC"),
        ("cache-teacher", "STUDENT=digits-resnet8", "TEACHER"),
        ("list-caches", "CACHE=caches", "CACHES"),
        ("export-student", "RETRAIN=1", None),
        ("test", "JOBS=2", None),
    ],
)
def test_a_variable_that_the_target_does_not_read_is_refused_with_the_one_that_was_meant(
    targets: str, given: str, meant: str | None
) -> None:
    result = make("-n", *targets.split(), given)
    assert result.returncode == 2
    name = given.partition("=")[0]
    instead = f": did you mean {meant}? It" if meant else "; it"
    assert f"make {targets} does not read {name}{instead} reads: PYTHON" in result.stderr


def test_a_variable_that_any_of_several_targets_reads_is_taken() -> None:
    result = make(
        "-n", "train-student", "export-student", "METHOD=kd", "EXPORT_DIR=there", "RETRAIN=1"
    )
    assert result.returncode == 0
    assert make("METHOD=kd", "EXPORT_DIR=there").returncode == 0  # `make` alone shows the settings


@pytest.mark.parametrize("target", sorted(makefile_targets() - {"help"}))
def test_whatever_a_variable_holds_reaches_the_programs_as_one_word(target: str) -> None:
    odd = "a 'b' \"c\" $(shell touch PWNED) `touch PWNED` ; # \\ ${HOME}"
    names = (
        "TEACHER",
        "STUDENT",
        "METHOD",
        "CACHES",
        "RUNS",
        "EXPORT_DIR",
        "DEVICE",
        "ARGS",
        "CLUSTER",
    )
    given = sorted(set(names) & set(reads(target)))
    result = make("-n", target, *(f"{name}={name} {odd}" for name in given))
    assert result.returncode == 0, result.stderr
    assert not (ROOT / "PWNED").exists()
    shown = result.stdout.replace("\\\n", " ").splitlines()
    lines = [line for line in shown if line.startswith(".venv/bin/python")]
    allowed = {f"{name} {odd}" for name in names} | {f"--args=ARGS {odd}"}
    for line in lines:
        given = [word for word in shlex.split(line) if "PWNED" in word]
        assert set(given) <= allowed


def test_nothing_that_a_students_file_says_reaches_make_or_a_shell(checkout: Path) -> None:
    folder = checkout / "my 'own' files"
    folder.mkdir()
    name = "a 't' \"d\" $(shell touch PWNED)`touch PWNED`/t.yaml"
    teacher = yaml.safe_load((checkout / "configs/teacher/digits-resnet20.yaml").read_text())
    teacher["teacher"] |= {"arch": "resnet8", "weights": "w $(touch PWNED).pt"}
    (folder / name).parent.mkdir()
    (folder / name).write_text(yaml.safe_dump(teacher))
    student = yaml.safe_load((checkout / "configs/student/digits-resnet8.yaml").read_text())
    (folder / "s.yaml").write_text(yaml.safe_dump({**student, "teacher": name}))
    overrides = (
        "training.epochs=1 training.schedule={type: onecycle} teacher.dataset.max_per_class=4"
    )
    overrides += " teacher.views.count=1 teacher.training.epochs=1"
    settings = [f"STUDENT={folder.name}/s.yaml", "METHOD=kd", f"ARGS={overrides}"]
    result = make("train-student", *settings, "CACHES=my caches", cwd=checkout)
    assert result.returncode == 0, result.stderr
    assert "kd, seed 0: " in result.stdout
    assert list(folder.rglob("w $(touch PWNED).pt"))
    assert list((checkout / "my caches").iterdir())
    assert not list(checkout.rglob("PWNED"))


def test_make_train_student_does_everything_once(trained_checkout: Trained) -> None:
    project, first = trained_checkout
    assert first.returncode == 0, first.stderr
    assert "cache    to build: 200 samples x 9 views" in first.stdout
    assert re.search(
        r"^cd\+gkd\+edt, seed 0: .*\n  last epoch .* top-1 error .*%", first.stdout, re.M
    )
    second = make("train-student", QUICK_ARGS, cwd=project)
    assert second.returncode == 0
    assert second.stdout.count("nothing to do") == 3


@pytest.mark.parametrize(
    ("target", "settings", "printed"),
    [
        ("list-caches", [], "complete"),
        ("check-checksums", [], "is valid"),
        ("check-recompute", ["ARGS=training.epochs=1"], "valid: 512 records"),
        pytest.param(
            "bench-store",
            ["ARGS=training.epochs=1", "BENCH=--slab-mb 4 --rounds 1"],
            "| float16 | 245 |",
            marks=pytest.mark.long,
        ),
    ],
)
def test_make_looks_at_caches(
    trained_checkout: Trained, target: str, settings: list[str], printed: str
) -> None:
    project, _ = trained_checkout
    result = make(target, *settings, cwd=project)
    assert result.returncode == 0, result.stderr
    assert printed in result.stdout
    if target == "bench-store":
        text = (project / "docs" / "development/benchmarks.md").read_text()
        assert "## Tap dtypes: digits-resnet20" in text


def test_a_missing_cache_is_an_error_that_names_the_command(trained_checkout: Trained) -> None:
    project, _ = trained_checkout
    (project / "caches").rename(project / "elsewhere")
    try:
        result = subprocess.run(
            [sys.executable, "-m", "train", "student", "digits-resnet8", "--method", "cd"],
            cwd=project,
            capture_output=True,
            text=True,
            check=False,
        )
    finally:
        (project / "elsewhere").rename(project / "caches")
    assert result.returncode == 2
    assert "make cache-teacher TEACHER=digits-resnet20" in result.stderr


def test_make_hands_the_cluster_on() -> None:
    settings = ["CLUSTER=10.0.0.1:6379", "GPUS_PER_WORKER=0.5", "CPUS_PER_WORKER=4"]
    shown = make("-n", "cache-teacher", *settings).stdout
    assert "--cluster '10.0.0.1:6379'" in shown
    assert "--gpus-per-worker '0.5'" in shown
    assert "--cpus-per-worker '4'" in shown
    assert "--cluster" not in make("-n", "cache-teacher").stdout
    shown = make("-n", "ablation", "CLUSTER=auto", "GPUS_PER_RUN=0.5", "CPUS_PER_RUN=3").stdout
    assert shown.count("--cluster 'auto'") == 1
    assert "--gpus-per-run '0.5'" in shown
    assert "--cpus-per-run '3'" in shown


def test_gpus_is_the_number_of_processes_of_teacher_pass_and_student() -> None:
    for target in ("cache-teacher", "train-student", "ablation"):
        assert "--nproc '8'" in make("-n", target, "NPROC=8").stdout
        assert "--nproc" not in make("-n", target).stdout
    odd = make("-n", "train-student", "NPROC=8 $(shell touch PWNED)").stdout.splitlines()
    (words,) = (shlex.split(line) for line in odd if "--nproc" in line)
    assert words[words.index("--nproc") + 1] == "8 $(shell touch PWNED)"
    assert not (ROOT / "PWNED").exists()


@pytest.mark.long
def test_several_processes_of_this_machine_train_the_teacher_fill_its_cache_and_train_a_student(
    checkout: Path,
) -> None:
    settings = "training.epochs=1 training.schedule={type: onecycle} teacher.training.epochs=1"
    settings += (
        " teacher.dataset.max_per_class=4 teacher.views.count=1 teacher.training.max_per_class=10"
    )
    asked = ["NPROC=2", "DEVICE=cpu", "METHOD=kd", f"ARGS={settings}"]
    result = make("train-student", *asked, cwd=checkout)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("in each of 2 processes") == 2  # teacher and student
    assert re.search(r"^kd, seed 0: .*\n  last epoch .* top-1 error .* %", result.stdout, re.M)


def test_make_hands_every_tracker_on() -> None:
    shown = make("-n", "train-student", "LOGGER=wandb mlflow").stdout
    assert "--logger 'wandb' --logger 'mlflow'" in shown
