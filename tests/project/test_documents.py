"""README.md and docs/: their files exist, and their commands and code run unchanged."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import typer.main

from benchmarks.__main__ import NAMES
from benchmarks.harness import target_app
from teach_once.__main__ import COMMANDS, PROGRAMS
from teach_once.configs.load import load_student, load_teacher, split_overrides
from teach_once.nets.networks.timm_models import import_timm
from teach_once.nets.networks.zoo import build
from teach_once.nets.weights.files import save_atomically
from teach_once.precompute.command import cli as precompute
from teach_once.store import TeacherCache
from teach_once.train.cli.commands import cli
from teach_once.train.terms import loss_named
from tests.support.caches.object_store import emptied, running
from tests.support.documents import code_blocks, commands, documents, links
from tests.support.programs.processes import make_in_forks, run, start
from tests.support.project import QUICK_ARGS, ROOT, make, makefile_targets
from tests.support.shortened import ALL_DIGITS

Trained = tuple[Path, subprocess.CompletedProcess[str]]

README = ROOT / "README.md"
WITHOUT_LABELS = "photos-without-labels.yaml"
OWN_LOSSES = ("my_losses.py", "my_batch_losses.py")
EVERY_COMMAND = [
    pytest.param(command, id=f"{document.stem}: {command}")
    for document in documents()
    for command in dict.fromkeys(commands(document))
]


def run_block(name: str, project: Path, then: str = "") -> list[str]:
    """The lines that a Python block, and `then`, print: run as a file in the project's folder."""
    (project / name).write_text(code_blocks("python")[name] + then)
    ran = run(name, cwd=project, env={**os.environ, ALL_DIGITS: "1"})  # as `make` read them
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.splitlines()


def test_every_code_block_is_run_by_a_test() -> None:
    assert set(code_blocks("python")) == {
        *OWN_LOSSES,
        "my_loop.py",
        "loader.py",
        "unpack_imagenet.py",
    }
    assert set(code_blocks("yaml")) == {
        *("photos-resnet50.yaml", "photos-resnet18.yaml"),
        WITHOUT_LABELS,
    }


def test_config_of_images_without_labels_makes_a_cache(
    photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / WITHOUT_LABELS).write_text(code_blocks("yaml")[WITHOUT_LABELS])
    shutil.copytree(photographs, tmp_path / "photos")
    network = build("timm:test_vit", num_classes=1000)
    save_atomically(network.state_dict(), tmp_path / "random.pt")
    small = ["teacher.arch=timm:test_vit", "teacher.weights=random.pt", "views.count=2"]
    small += ["views.augment.size_px=160"]
    assert precompute([WITHOUT_LABELS, "--device", "cpu", *small]) == 0
    (path,) = (tmp_path / "caches").glob("photos-*")
    cache = TeacherCache.open(path)
    assert cache.labels is None
    assert {"logits", "embedding"} < set(cache.taps)
    assert cache.taps["logits"].shape == (1000,)


@pytest.mark.parametrize("name", sorted(code_blocks("python")))
def test_code_block_pasted_into_the_checkout_passes_the_linter(name: str) -> None:
    command = [sys.executable, "-m", "ruff", "check", "--stdin-filename", name, "-"]
    block = code_blocks("python")[name]
    ran = subprocess.run(command, cwd=ROOT, input=block, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout


def test_a_training_loop_of_ones_own_learns(trained_checkout: Trained) -> None:
    project, made = trained_checkout
    assert made.returncode == 0, made.stderr
    losses = [float(line.split()[1]) for line in run_block("my_loop.py", project)]
    assert len(losses) == 10
    assert losses[-1] < losses[0]


def test_the_loader_of_the_documents_runs(trained_checkout: Trained) -> None:
    project, _ = trained_checkout
    assert run_block("loader.py", project) == []


@pytest.mark.long
def test_commands_of_clusters_and_buckets_run(
    trained_checkout: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The README's section, after a pass on a cluster and before a run from the bucket."""
    project, _ = trained_checkout
    monkeypatch.setenv("RAY_ADDRESS", "local")  # whatever else runs on this machine
    shown = README.read_text().partition("## Scale up")[2].partition("\n## ")[0]
    (block,) = re.findall(r"```bash\n(.*?)```", shown, re.DOTALL)
    shutil.copy(ROOT / "requirements-cluster.txt", project / ".venv/installed-cluster.txt")
    quick = {
        "ablation": ["METHODS=ce cd+gkd", "SEEDS=0 1", QUICK_ARGS],
        "train-student": [QUICK_ARGS],
        "cache-teacher": ["ARGS=training.epochs=1"],
    }
    on_cluster = "make cache-teacher CLUSTER=auto"
    from_bucket = (
        "make train-student METHOD=cd CACHES=s3://bucket/caches MIRROR=mirror MIRROR_GB=50"
    )
    assert {on_cluster, from_bucket} <= {line for page in documents() for line in commands(page)}
    printed = ""
    (project / "caches").rename(project / "elsewhere")
    try:
        with running() as server, emptied(server):
            for line in (on_cluster, *block.splitlines(), from_bucket):
                words = shlex.split(line, comments=True)[1:]
                result = make(*words, *quick.get(words[0], []), cwd=project)
                assert result.returncode == 0, result.stderr
                printed += result.stdout
    finally:
        shutil.rmtree(project / "caches", ignore_errors=True)
        (project / "elsewhere").rename(project / "caches")
    assert printed.count("Ray: ") == 2
    assert "1,800 images in" in printed
    assert "run   4/4" in printed
    assert re.search(r"/report(-\w+)?\.html, ", printed)  # of other settings than the first one
    assert "in each of 2 processes" in printed
    assert re.search(r"s3://bucket/caches/digits-resnet20-\w{8} is complete", printed)
    assert "cd, seed 0, from s3://bucket/caches/digits-resnet20-" in printed
    assert list((project / "mirror/bucket/caches").glob("digits-*/teacher.zarr/stage1/c.0.*"))


def test_the_job_array_of_the_documents_fills_the_cache(trained_checkout: Trained) -> None:
    project, _ = trained_checkout
    (script,) = re.findall(
        r"```slurm\n(.*?)```", (ROOT / "docs/how-to/cluster.md").read_text(), re.DOTALL
    )
    exported, command = re.findall(
        r"^export (.*?) #.*\n\.venv/bin/python -m ((?:.*\\\n)*.*)\n", script, re.MULTILINE
    )[0]
    (project / "caches").rename(project / "elsewhere")
    try:
        tasks = []
        for rank in "01":
            slurm = {"JOB_ID": "7", "TASK_ID": rank, "TASK_COUNT": "2"}
            told = {f"SLURM_ARRAY_{name}": value for name, value in slurm.items()}
            told |= dict(word.split("=") for word in exported.split())
            line = re.sub(r"\$(\w+)", lambda name: told[name[1]], command)  # noqa: B023
            environment = os.environ | told | {ALL_DIGITS: "1"}
            words = shlex.split(line.replace("\\\n", " "))
            tasks.append(start(*words, cwd=project, env=environment, merged=True))
        printed = [task.communicate()[0] for task in tasks]
        assert [task.returncode for task in tasks] == [0, 0], printed
        (path,) = (project / "caches").glob("digits-*")
        assert TeacherCache.open(path).faults() == []
    finally:
        shutil.rmtree(project / "caches", ignore_errors=True)
        (project / "elsewhere").rename(project / "caches")
    assert any(" is complete. " in text for text in printed)


def test_the_job_of_two_machines_in_the_documents_can_be_typed() -> None:
    (script,) = re.findall(
        r"```slurm\n(.*?)```", (ROOT / "docs/how-to/gpus.md").read_text(), re.DOTALL
    )
    words = shlex.split(script.rpartition(" -m ")[2])
    assert words[:2] == ["train", "student"]
    check_program(words[0], words[1:])


@pytest.mark.long
def test_the_job_of_two_machines_in_the_documents_trains_a_student(
    trained_checkout: Trained,
) -> None:
    project, _ = trained_checkout
    (script,) = re.findall(
        r"```slurm\n(.*?)```", (ROOT / "docs/how-to/gpus.md").read_text(), re.DOTALL
    )
    assert "--nproc-per-node 8" in script
    words = f"--seed 5 --device cpu {QUICK_ARGS.removeprefix('ARGS=')}"
    script = script.replace("--nproc-per-node 8", "--nproc-per-node 1").rstrip() + f" {words}"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        script = script.replace(":29500", f":{free.getsockname()[1]}")
    # What Slurm has: a command once per machine, here both times on this one.
    slurm = 'srun() { "$@" & "$@"; wait; }; scontrol() { echo localhost; }\n'
    result = subprocess.run(
        ["bash", "-c", slurm + script], cwd=project, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "in each of 2 processes" in result.stdout
    assert result.stdout.count("cd, seed 5: ") == 1


@pytest.mark.usefixtures("all_digits")
@pytest.mark.parametrize("name", OWN_LOSSES)
def test_a_loss_of_ones_own_is_a_method(
    name: str, cached: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    block = code_blocks("python")[name]
    (tmp_path / name).write_text(block)
    monkeypatch.syspath_prepend(str(tmp_path))
    term = block.partition("\n")[0].removeprefix(f"# {name}: ")
    call = ["student", "digits-resnet8", "--method", "own", f"methods.own=[{{loss: ce}}, {term}]"]
    try:
        assert cli([*call, *cached]) == 0
    finally:
        sys.modules.pop(name.removesuffix(".py"), None)
        loss_named.cache_clear()


def test_a_folder_and_a_checkpoint_become_a_student(checkout: Path, photographs: Path) -> None:
    for name in ("photos-resnet50.yaml", "photos-resnet18.yaml"):
        (checkout / name).write_text(code_blocks("yaml")[name])
    shutil.copytree(photographs, checkout / "photos")
    network = build("resnet50", num_classes=2, stem="imagenet")
    save_atomically({"state_dict": network.state_dict()}, checkout / "checkpoint.pt")
    (command,) = [line for page in documents() for line in commands(page) if "=photos-" in line]
    quick = "teacher.views.count=1 teacher.views.augment.size_px=32 training.epochs=1"
    result = make_in_forks(*command.split()[1:], f"ARGS={quick}", cwd=checkout)
    assert result.returncode == 0, result.stderr
    assert "cd+gkd, seed 0: " in result.stdout
    assert "Warning" not in result.stderr


def test_photographs_and_the_name_of_a_model_become_an_exported_student(
    checkout: Path, photographs: Path
) -> None:
    """The commands of the README, with small models and random weights."""
    new_teacher, new_student, train_and_export = (
        line.replace("convnext_tiny", "test_convnext").replace(
            "mobilenetv3_small_100", "test_resnet"
        )
        for line in commands(README)
        if "timm:convnext" in line or "my-student" in line
    )
    shutil.copytree(photographs, checkout / "photos")
    network = build("timm:test_convnext", num_classes=1000)
    save_atomically(network.state_dict(), checkout / "random.pt")
    for line in (new_teacher.replace("--root", "--weights random.pt --root"), new_student):
        words, _, file = line.removeprefix("teach-once ").partition(" > ")
        ran = run("teach_once", *shlex.split(words), cwd=checkout)
        assert ran.returncode == 0, ran.stderr
        (checkout / file).write_text(ran.stdout)
    quick = "teacher.views.count=1 teacher.views.augment.size_px=32 training.epochs=1"
    quick += " training.schedule.warmup_epochs=0 training.batch_size=10"
    result = make_in_forks(*shlex.split(train_and_export)[1:], f"ARGS={quick}", cwd=checkout)
    assert result.returncode == 0, result.stderr
    assert "distill, seed 0: " in result.stdout
    import_timm().create_model(
        "test_resnet",
        num_classes=2,
        checkpoint_path=str(checkout / "exported/student.pt"),
    )


@pytest.mark.parametrize("command", EVERY_COMMAND)
def test_a_command_that_is_shown_can_be_typed(command: str) -> None:
    words = shlex.split(command.partition(" > ")[0])
    if words[0] == "grep":
        assert list(ROOT.glob(words[-1]))
    elif words[0] == "make":
        targets = [word for word in words[1:] if "=" not in word]
        result = make("-n", *words[1:])
        assert result.returncode == 0, result.stderr
        for target in targets:
            check_make(target, dict(word.split("=", 1) for word in words[1 + len(targets) :]))
    elif words[0] in ("source", "."):
        assert words[1:] == [".venv/bin/activate"]  # what `make env` creates
    elif words[:3] == ["python", "-m", "pytest"]:
        assert all((ROOT / path).exists() for path in words[3:])
    elif words == ["python", "-m", "build"]:  # test_packaging.py calls the same hooks
        assert "build-backend" in (ROOT / "pyproject.toml").read_text()
    elif words[:2] == ["pip", "install"]:
        files = [word for word in words if word.endswith(".txt")] or ["pyproject.toml"]
        assert all((ROOT / file).is_file() for file in files)
    elif words[0] == "teach-once":
        assert set(words[1:2]) <= {*PROGRAMS, *COMMANDS}
        if words[1:]:
            check_word_of_the_one_command(*words[1:])
    else:
        start = words.index("-m")
        if words[start + 1] == "teach_once":
            check_word_of_the_one_command(*words[start + 2 :])
        else:
            check_program(words[start + 1], words[start + 2 :])


def check_word_of_the_one_command(name: str, *words: str) -> None:
    if name in ("new-teacher", "new-student"):
        check_program(f"teach_once.{name.replace('-', '_')}", list(words))
    elif name == "env":
        check_program("teach_once.environment", list(words))
    elif name in COMMANDS:
        check_program("teach_once.commands", [name, *words])
    else:
        check_program(name, list(words))


def check_make(target: str, settings: dict[str, str]) -> None:
    assert target in makefile_targets()
    known = re.findall(r"^([A-Z_]+) *\?=", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(settings) <= set(known)
    overrides = settings.get("ARGS", "").split()
    if overrides and target == "cache-teacher":
        load_teacher(settings.get("TEACHER", "digits-resnet20"), overrides)
    elif overrides:
        own, teachers = split_overrides(overrides)
        config = load_student(settings.get("STUDENT", "digits-resnet8"), own)
        load_teacher(config.teacher, teachers)


def check_program(name: str, arguments: list[str]) -> None:
    """That a program takes these arguments, as far as parsing them says."""
    package = importlib.util.find_spec(name)
    assert package is not None, name
    is_package = package.submodule_search_locations is not None
    module = importlib.import_module(f"{name}.__main__" if is_package else name)
    app = getattr(module, "app", None)
    if is_package and hasattr(module, "cli"):  # `__main__` hands it on
        if isinstance(module.cli, functools.partial):  # of run_command with the app
            (app,) = module.cli.args
        else:
            module = sys.modules[module.cli.__module__]
            app = getattr(module, "app", None)
    if name == "benchmarks" and arguments[:1] and arguments[0] in NAMES:
        typer.main.get_command(target_app(arguments[0])).make_context(name, arguments[1:])
        return
    if app is None:  # one that reads its few words itself: its docstring shows them
        shown = Path(str(module.__file__)).read_text()
        words = arguments[:1] if is_package and name != "benchmarks" else []
        words += [word for word in arguments if word.startswith("--")]
        assert all(re.search(rf"{word}(?![\w-])", shown) for word in words), arguments
        return
    command = typer.main.get_command(app)
    context = command.make_context(name, list(arguments))
    if hasattr(command, "resolve_command"):
        found, part, rest = command.resolve_command(context, arguments)
        part.make_context(found, rest, parent=context)


def test_every_link_leads_to_a_file() -> None:
    for document in documents():
        missing = [link for link in links(document) if not (document.parent / link).exists()]
        assert not missing, f"{document.name}: {missing}"


def test_the_readme_shows_the_stages() -> None:
    shown = {" ".join(command.split()[:2]) for command in commands(README)}
    assert {"make train-student", "make cache-teacher"} <= shown


def test_ci_runs_the_documented_test_command() -> None:
    assert "\nmake test\n" in (ROOT / ".ci" / "run").read_text()
    assert any("make test" in commands(document) for document in documents())


def test_every_package_is_on_the_map() -> None:
    text = "".join(document.read_text() for document in documents())
    for path in ROOT.iterdir():
        if path.is_dir() and list(path.glob("*.py")):
            assert f"{path.name}/" in text, path.name
