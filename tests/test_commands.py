"""The commands as users type them: python -m train, make, and every command of the README."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from configs.load import load_student
from configs.schema import TeacherConfig
from nets.weights import save_atomically
from nets.zoo import build
from store.transfer import export_cache
from tests.support.teacher_cache import make_cache
from tests.support.training_runs import without_times
from train.__main__ import cli
from train.terms import loss_named

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()

QUICK = [
    "training.epochs=3",
    "training.schedule.milestones=[2]",
    "methods.cd+gkd+edt.0.start_epoch=2",
    "methods.cd+gkd+edt.1.start_epoch=2",
]


@pytest.fixture
def cached(small_teacher: Callable[..., TeacherConfig], tmp_path: Path) -> list[str]:
    """Arguments that point a digits-resnet8 run at a small cache and a temporary runs folder."""
    config = small_teacher("taps.energy=float16", "taps.hint={stage: stage2}")
    make_cache(config, tmp_path / "caches")
    return [
        "--caches",
        str(tmp_path / "caches"),
        "--runs",
        str(tmp_path / "runs"),
        *QUICK,
        "teacher.teacher.arch=resnet8",
        f"teacher.teacher.weights={config.teacher.weights}",
        "teacher.dataset.limit=6",
        "teacher.views.count=3",
    ]


def test_an_ablation_trains_every_method_and_repeats_nothing(
    cached: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call = ["ablation", "digits-resnet8", "--seeds", "0 1", *cached]
    assert cli(call) == 0
    printed = capsys.readouterr().out
    for method in ("teacher", *load_student("digits-resnet8").methods):
        assert f"| {method} |" in printed
    folder = tmp_path / "runs" / "digits-resnet8"
    assert len(list(folder.glob("*-seed*"))) == 22
    assert {path.name for path in folder.iterdir() if path.is_file()} == {
        "ablation.md",
        "ablation.csv",
        "ablation.png",
        "report.html",
    }
    assert cli(call) == 0
    assert "all 22 runs are finished: nothing to train." in capsys.readouterr().out


def test_a_run_that_is_killed_again_and_again_ends_with_the_same_bits(
    cached: list[str], tmp_path: Path
) -> None:
    call = [sys.executable, "-m", "train", "student", "digits-resnet8", "--method", "cd+gkd+edt"]
    call += ["--checkpoint-minutes", "0", "--device", "cpu", *cached]
    call += ["training.epochs=40", "training.batch_size=4"]
    steps_of, chance = tmp_path / "runs" / "digits-resnet8", np.random.default_rng(0)
    kills = 0
    for _ in range(2):
        process = subprocess.Popen(call, cwd=ROOT, stdout=subprocess.DEVNULL)
        while process.poll() is None and not list(steps_of.glob("*/checkpoint.pt")):
            time.sleep(0.01)
        time.sleep(chance.uniform(0.0, 1.5) if not kills else chance.uniform(3.0, 6.0))
        kills += process.poll() is None
        process.kill()
        process.wait()
    assert kills >= 1
    subprocess.run(call, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    (killed,) = steps_of.iterdir()
    resumed = torch.load(killed / "last.pt", weights_only=True)
    metrics = without_times(killed)
    shutil.rmtree(killed)
    subprocess.run(call, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    whole = torch.load(killed / "last.pt", weights_only=True)
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    assert metrics == without_times(killed)


def test_an_ablation_never_loads_the_teacher(
    cached: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("the teacher was loaded")

    monkeypatch.setattr("train.run.load_teacher_network", refuse)
    assert cli(["ablation", "digits-resnet8", "--seeds", "0", "--methods", "kd cd", *cached]) == 0
    with pytest.raises(AssertionError, match="the teacher was loaded"):
        cli(["student", "digits-resnet8", "--method", "kd", "--live-teacher", *cached])


def test_a_student_is_trained_once_and_its_table_printed_again(
    cached: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    call = ["student", "digits-resnet8", "--method", "cd+gkd", "--seed", "1", *cached]
    assert cli(call) == 0
    first = capsys.readouterr().out
    assert "epoch   3/3" in first
    assert cli(call) == 0
    second = capsys.readouterr().out
    assert "is finished: nothing to do." in second
    assert first.splitlines()[-2] == second.splitlines()[-2]


def test_a_student_trains_the_same_from_the_exported_file(
    cached: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call = ["student", "digits-resnet8", "--method", "cd+gkd", *cached]
    assert cli(call) == 0
    from_folder = capsys.readouterr().out.splitlines()
    (folder,) = (tmp_path / "caches").iterdir()
    export_cache(folder, tmp_path / "cache.h5")
    moved = ["--cache", str(tmp_path / "cache.h5"), "--runs", str(tmp_path / "runs2")]
    assert cli([*call, *moved]) == 0
    from_file = capsys.readouterr().out.splitlines()
    errors = [
        [line.split("images/s")[0][:60] for line in text if line.startswith("epoch")]
        for text in (from_folder, from_file)
    ]
    assert errors[0] == errors[1]


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_training_that_is_stopped_says_so_and_goes_on(
    cached: list[str], tmp_path: Path, number: int, status: int
) -> None:
    call = [sys.executable, "-m", "train", "student", "digits-resnet8", "--method", "ce", *cached]
    process = subprocess.Popen(
        [*call, "training.epochs=300"],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    while not list(tmp_path.glob("runs/*/*/checkpoint.pt")):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(number)
    _, told = process.communicate(timeout=60)
    assert process.returncode == status
    assert "the same command goes on from there" in told
    assert "Traceback" not in told
    (checkpoint,) = tmp_path.glob("runs/*/*/checkpoint.pt")
    assert torch.load(checkpoint, weights_only=True)["epoch"] >= 1


def test_the_plan_says_what_is_there_and_what_is_missing(
    cached: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli(["plan", "digits-resnet8", *cached]) == 0
    told = capsys.readouterr().out
    assert "teacher  there" in told
    assert "cache    there" in told
    assert "student  to be trained: 60 samples x 3 epochs through resnet8" in told
    assert re.search(r"trial    [\d,]+ images/s on cpu: \d+ s without tests; at most about", told)
    assert not list(tmp_path.glob("runs/*"))
    assert cli(["plan", "digits-resnet8", "--no-trial", *cached]) == 0
    assert "trial" not in capsys.readouterr().out
    assert (
        cli(
            [
                "plan",
                "digits-resnet8",
                *cached,
                "--caches",
                "nowhere",
                "teacher.teacher.weights=gone.pt",
            ]
        )
        == 0
    )
    told = capsys.readouterr().out
    assert "teacher  to be trained: all training images x 20 epochs" in told
    assert "cache    to be made: 60 samples x 3 views = 180 images" in told


COMMAND_AND_ITS_PEAK = """
import sys
from runtime.cost import peak_memory
from train.__main__ import cli
assert cli(sys.argv[1:]) == 0
print("peak", peak_memory())
"""


def test_a_run_stays_within_the_memory_that_its_plan_names(cached: list[str]) -> None:
    def told(command: str) -> str:
        run = [command, "digits-resnet8", "--method", "fitnets", *cached, "student.arch=resnet110"]
        return subprocess.run(
            [sys.executable, "-c", COMMAND_AND_ITS_PEAK, *run],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        ).stdout

    (planned,) = re.findall(r"at most about ([\d.]+) MB of memory", told("plan"))
    (peak,) = re.findall(r"peak (\d+)", told("student"))
    assert 0.7 * float(planned) < int(peak) / 1e6 <= float(planned)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (
            ["student", "digits-resnet8", "--method", "kdd"],
            "has ce, kd, at, fitnets, rkd, cd,",
        ),
        (["student", "digits-resnet8", "student.arch=resnet7"], "unknown arch 'resnet7'"),
        (["student", "digits-resnet8", "training.epochs=0"], "training.epochs"),
        (["student", "digits-resnet8", "--caches", "nowhere"], "make cache-teacher TEACHER="),
        (["student", "digits-resnet8", "teacher.views.seed=9"], "views.seed: expected 9, found 0"),
        (["student", "digits-resnet8", "num_views=5"], 'views.count=5"'),
        (["ablation", "digits-resnet8", "--seeds", "zero"], 'as in "0 1 2"'),
        (["ablation", "digits-resnet8", "--methods", "ce nonsense"], "unknown method 'nonsense'"),
        (
            ["teacher", "digits-resnet20", "training=null", "teacher.weights=gone.pt"],
            "has no training block",
        ),
    ],
)
def test_bad_input_is_an_error_with_its_remedy(
    cached: list[str], arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    common = [] if arguments[0] == "teacher" else cached
    # What the case says comes last, so that it wins over what is common.
    assert cli([*arguments[:2], *common, *arguments[2:]]) == 2
    assert told in capsys.readouterr().err


def make(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["make", *arguments], cwd=cwd, capture_output=True, text=True, check=False
    )


def test_make_alone_prints_every_target() -> None:
    result = make()
    assert result.returncode == 0
    for target in re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(), re.MULTILINE):
        assert f"make {target} " in result.stdout


def test_make_hands_overrides_on_to_both_stages() -> None:
    shown = make("-n", "ablation", "ARGS=training.epochs=2 teacher.dataset.limit=3 a=[1,2]").stdout
    assert "'training.epochs=2' 'teacher.dataset.limit=3' 'a=[1,2]'" in shown


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the tracked files that shares this environment."""
    for name in subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines():
        target = tmp_path / "checkout" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, target)
    environment = tmp_path / "checkout" / ".venv"
    (environment / "bin").mkdir(parents=True)
    (environment / "bin" / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (environment / "bin" / "python").chmod(0o755)
    shutil.copy(ROOT / "requirements.txt", environment / "installed.txt")
    return tmp_path / "checkout"


def test_make_train_student_does_everything_once(checkout: Path) -> None:
    quick = "ARGS=" + " ".join([*QUICK, "teacher.training.epochs=1"])
    first = make("train-student", quick, cwd=checkout)
    assert first.returncode == 0, first.stderr
    assert "cache    to be made: 200 samples x 9 views" in first.stdout
    assert "| cd+gkd+edt | resnet8 | 1 |" in first.stdout
    second = make("train-student", quick, cwd=checkout)
    assert second.returncode == 0
    assert second.stdout.count("nothing to do") == 3
    for target, told in (
        ("list-caches", "complete"),
        ("check-cache", "is sound"),
        ("verify-cache", "sound: 512 records"),
        ("bench-store", "| float16 | 245.0 |"),
    ):
        arguments = ["ARGS=training.epochs=1", "BENCH=--slab-mb 4 --rounds 1"]
        looked = make(
            target, *(arguments if target in ("verify-cache", "bench-store") else []), cwd=checkout
        )
        assert looked.returncode == 0, looked.stderr
        assert told in looked.stdout
    assert "## Tap dtypes: digits-resnet20" in (checkout / "docs" / "benchmarks.md").read_text()
    _, example = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    (checkout / "example.py").write_text(example)
    ran = subprocess.run(
        [sys.executable, "example.py"], cwd=checkout, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    losses = [float(line.split()[1]) for line in ran.stdout.splitlines()]
    assert len(losses) == 10
    assert losses[-1] < losses[0]
    shutil.rmtree(checkout / "caches")
    third = subprocess.run(
        [sys.executable, "-m", "train", "student", "digits-resnet8", "--method", "cd"],
        cwd=checkout,
        capture_output=True,
        text=True,
        check=False,
    )
    assert third.returncode == 2
    assert "make cache-teacher TEACHER=digits-resnet20" in third.stderr


def test_the_readmes_loss_of_ones_own_is_one(
    cached: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own_loss, _ = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    comment, _, _ = own_loss.partition("\n")
    (tmp_path / "my_losses.py").write_text(own_loss)
    monkeypatch.syspath_prepend(str(tmp_path))
    term = comment.removeprefix("# my_losses.py: ")
    call = ["student", "digits-resnet8", "--method", "own", f"methods.own=[{{loss: ce}}, {term}]"]
    try:
        assert cli([*call, *cached]) == 0
    finally:
        sys.modules.pop("my_losses", None)
        loss_named.cache_clear()


def test_the_readmes_folder_and_checkpoint_become_a_student(
    checkout: Path, photographs: Path
) -> None:
    files = re.findall(r"```yaml\n# (\S+)\n(.*?)```", README, re.DOTALL)
    for name, text in files:
        (checkout / name).write_text(text)
    shutil.copytree(photographs, checkout / "photos")
    network = build("resnet50", num_classes=2, stem="imagenet")
    save_atomically({"state_dict": network.state_dict()}, checkout / "checkpoint.pt")
    (command,) = [line for line in commands_in_readme() if "STUDENT=photos" in line]
    quick = "teacher.views.count=1 teacher.views.augment.size_px=32 training.epochs=1"
    result = make(*command.split()[1:], f"ARGS={quick}", cwd=checkout)
    assert result.returncode == 0, result.stderr
    assert "| cd+gkd | resnet18 | 1 |" in result.stdout
    assert "Warning" not in result.stderr


def commands_in_readme() -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    lines = [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line]


def test_the_readme_shows_the_commands_that_there_are() -> None:
    targets = set(re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(), re.MULTILINE))
    shown = commands_in_readme()
    assert {"make train-student", "make cache-teacher", "make ablation", "make test"} <= set(shown)
    for command in shown:
        words = command.split()
        if words[0] == "make":
            assert words[1] in targets, command
        if words[:2] == ["python", "-m"]:
            result = subprocess.run(
                [sys.executable, "-m", words[2], "--help"],
                cwd=ROOT,
                capture_output=True,
                text=True,
                check=False,
            )
            assert (
                words[3].startswith("-")
                or words[3] in result.stdout + result.stderr
                or words[2] in ("precompute", "precompute.verify")
            ), command


def test_ci_runs_the_readmes_test_command() -> None:
    assert "\nmake test\n" in (ROOT / ".ci" / "run").read_text()
    assert "make test" in commands_in_readme()


def test_every_room_is_on_the_readmes_map() -> None:
    for path in ROOT.iterdir():
        if path.is_dir() and list(path.glob("*.py")):
            assert f"{path.name}/" in README, path.name
