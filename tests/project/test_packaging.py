"""Installation by pip: all files exist in any folder and do not conflict with the user's files."""

from __future__ import annotations

import ast
import email
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

from teach_once import __version__
from tests.support.project import ROOT, copy_project

# The folders that the links in teach_once lead to.
PARTS = [each.name for each in sorted((ROOT / "teach_once").iterdir()) if each.is_symlink()]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# What is asked for: what is imported, and where.
OPTIONAL = {
    "trackers": {("wandb", "tracking.py"), ("mlflow", "tracking.py")},
    "huggingface": {("datasets", "huggingface.py")},
    "cluster": {("ray", "ray.py")},
    "onnx": set(),  # examples/export_onnx.py
    "docs": set(),  # make docs
}


def declared(lines: list[str]) -> dict[str, Requirement]:
    return {Requirement(line).name.lower(): Requirement(line) for line in lines}


DECLARED = declared(PROJECT["dependencies"])
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
OFFLINE = ["--no-deps", "--no-index", "--no-build-isolation"]


def run(*words: str | Path, cwd: Path, ok: bool = True) -> subprocess.CompletedProcess[str]:
    result = subprocess.run(list(map(str, words)), cwd=cwd, capture_output=True, text=True)
    assert (result.returncode == 0) == ok, result.stderr
    return result


def new_environment(folder: Path) -> Path:
    """An environment that has this one's packages, but not the project; returns its bin folder."""
    venv.create(folder, with_pip=False)
    packages = next(folder.glob("lib/*/site-packages"))
    (packages / "shared.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_project(tmp_path_factory.mktemp("source") / "project")


def build(kind: str, folder: Path) -> Path:
    """What `python -m build` calls, in the project's folder; returns the file that it made."""
    call = f"from setuptools import build_meta; build_meta.build_{kind}('dist')"
    run(sys.executable, "-c", call, cwd=folder)
    (built,) = (folder / "dist").iterdir()
    return built


@pytest.fixture(scope="module")
def sdist(source: Path) -> Path:
    return build("sdist", source)


@pytest.fixture(scope="module")
def wheel(sdist: Path) -> Path:
    """As `python -m build` and pip do it: from the unpacked sdist, not from the repository."""
    unpacked = sdist.parent.parent.parent / "unpacked"
    with tarfile.open(sdist) as archive:
        archive.extractall(unpacked, filter="data")
    (folder,) = unpacked.iterdir()
    return build("wheel", folder)


@pytest.fixture(scope="module")
def installed(wheel: Path) -> Path:
    """The bin folder of an environment that the wheel is installed in."""
    folder = new_environment(wheel.parent / "environment")
    run(*PIP, "--python", folder / "python", "install", *OFFLINE, wheel, cwd=wheel.parent)
    return folder


@pytest.fixture(scope="module")
def editable(source: Path) -> Path:
    folder = new_environment(source.parent / "editable")
    run(*PIP, "--python", folder / "python", "install", *OFFLINE, "-e", source, cwd=source.parent)
    return folder


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """A folder whose files have the names of our packages."""
    for name in PARTS:
        (tmp_path / f"{name}.py").write_text("raise RuntimeError('the wrong file')\n")
    return tmp_path


def test_a_wheel_has_every_file_of_the_packages_and_no_other(wheel: Path) -> None:
    shipped = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    listed = run("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT)
    names = [name for name in listed.stdout.splitlines() if not (ROOT / name).is_symlink()]
    own = {name for name in names if name.partition("/")[0] == "teach_once"}
    assert shipped == own | {f"teach_once/{n}" for n in names if n.partition("/")[0] in PARTS}
    assert len(PARTS) == 8


@pytest.mark.parametrize("kind", ["installed", pytest.param("editable", marks=pytest.mark.long)])
def test_the_command_offers_every_program_from_any_folder(
    kind: str, hostile: Path, request: pytest.FixtureRequest
) -> None:
    command = request.getfixturevalue(kind) / "teach-once"
    shown = run(command, cwd=hostile).stdout
    for package in PARTS:
        is_program = (ROOT / package / "__main__.py").is_file()
        assert bool(re.search(rf"^  {package} +[A-Z]", shown, re.M)) == is_program
    assert "digits-resnet8" in run(command, "configs", "list", cwd=hostile).stdout
    help_text = run(command, "train", "student", "--help", cwd=hostile).stdout
    assert "Usage: teach-once train student" in help_text
    missing = run(command, "train", "student", "digits-resnet8", cwd=hostile, ok=False)
    assert f"fix: {command} precompute digits-resnet20" in missing.stderr  # no shell finds it
    assert (
        "command 'tran' not found; did you mean 'train'"
        in run(command, "tran", cwd=hostile, ok=False).stderr
    )


def test_each_program_of_the_installed_command_has_help(installed: Path, tmp_path: Path) -> None:
    code = (
        "from teach_once.__main__ import PROGRAMS, main\n"
        "for name in PROGRAMS:\n"
        "    assert main([name, '--help']) == 0, name\n"
    )
    run(installed / "python", "-P", "-c", code, cwd=tmp_path)


@pytest.mark.parametrize("kind", ["installed", "editable"])
def test_a_project_with_modules_of_the_same_names_imports_its_own_and_ours(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    for name in ("configs", "store"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(f"OWN = {name!r}\n")
    (tmp_path / "train.py").write_text(
        "import configs, store, train\n"
        "from teach_once import DistillationDataset, TeacherCache, load_teacher, losses\n"
        "from teach_once.nets.networks.zoo import build\n"
        "print(configs.OWN, store.OWN, train.__file__ == __file__)\n"
        "print(DistillationDataset.__module__, losses.__name__, TeacherCache.__module__)\n"
        "print(load_teacher('digits-resnet20').name)\n"
    )
    result = run(request.getfixturevalue(kind) / "python", "train.py", cwd=tmp_path)
    lines = list(dict.fromkeys(result.stdout.splitlines()))  # train.py runs as two modules
    assert lines == [
        "configs store True",
        "teach_once.train.dataset teach_once.train.losses teach_once.store.read.reader",
        "digits-resnet20",
    ]


def test_the_wheel_declares_the_license_and_the_version(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (folder,) = {name.partition("/")[0] for name in archive.namelist() if ".dist-info/" in name}
    described = email.message_from_bytes(archive.read(f"{folder}/METADATA"))
    assert described["License-Expression"] == "Apache-2.0"
    assert described["Version"] == __version__
    assert archive.read(f"{folder}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()


def test_the_citation_names_the_title_the_authors_and_the_license() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["title"].startswith("Teach Once")
    assert citation["authors"] == PROJECT["authors"]
    assert citation["license"] == PROJECT["license"]
    assert "version" not in citation  # it would be a second home; a release adds it with its date


def test_the_wheel_installs_one_name(wheel: Path) -> None:
    names = {name.partition("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {name for name in names if not name.endswith(".dist-info")} == {"teach_once"}


def test_a_file_of_the_user_with_a_librarys_name_is_not_run_by_the_command(
    installed: Path, tmp_path: Path
) -> None:
    for name in ("numpy", "yaml", "typer", "random"):
        (tmp_path / f"{name}.py").write_text(f"raise RuntimeError('the wrong {name}')\n")
    assert "digits-resnet8" in run(installed / "teach-once", "configs", "list", cwd=tmp_path).stdout
    run(installed / "teach-once", "train", "check", "digits-resnet8", cwd=tmp_path)


def test_processes_that_the_command_starts_do_not_run_such_a_file_either(tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    for name in ("socket", "pickle", "tempfile"):
        (tmp_path / "here" / f"{name}.py").write_text(f"raise RuntimeError('the wrong {name}')\n")
    (tmp_path / "script.py").write_text(
        "import contextlib, sys\n"
        "from multiprocessing import get_context\n"
        "from teach_once.__main__ import run\n"
        "if __name__ == '__main__':\n"
        "    sys.argv = ['teach-once', 'configs', 'list']\n"
        "    with contextlib.suppress(SystemExit):\n"
        "        run()\n"
        "    process = get_context('spawn').Process(target=print)\n"
        "    process.start()\n"
        "    process.join()\n"
        "    assert process.exitcode == 0\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "../script.py"]
    subprocess.run(command, cwd=tmp_path / "here", env=environment, check=True)


@pytest.mark.parametrize("modules", ["torchvision", "timm", "torch, torchvision"])
def test_torchvision_and_timm_can_be_imported_where_the_project_is_installed(
    modules: str, installed: Path, tmp_path: Path
) -> None:
    run(installed / "python", "-c", f"import {modules}", cwd=tmp_path)


def test_the_editable_project_is_found_by_torch_too(editable: Path, tmp_path: Path) -> None:
    code = (
        "from importlib.metadata import entry_points\n"
        "(found,) = entry_points(group='torch.backends', name='torchvision_shim')\n"
        "found.load()()\n"
    )
    run(editable / "python", "-P", "-c", code, cwd=tmp_path)


def test_timm_can_be_imported_after_the_project_without_installing_it() -> None:
    code = "import sys, teach_once; assert 'torch' not in sys.modules; import timm"
    run(sys.executable, "-c", code, cwd=ROOT)


def test_a_loss_beside_the_user_is_found_by_the_command(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from teach_once.train.terms import loss_term\n\n\n@loss_term()\ndef one(student_logits):\n"
        "    return student_logits.sum()\n"
    )
    call = ["train", "check", "digits-resnet8", "methods.own=[{loss: mine:one}]", "--methods=own"]
    run(installed / "teach-once", *call, cwd=tmp_path)


# ---- dependencies: pyproject.toml says what is needed, requirements.txt what is tested


def pins(text: str) -> dict[str, str]:
    """{name: version} of the lines `name==version`."""
    lines = [line.partition("#")[0].strip() for line in text.splitlines()]
    return {name.lower(): v for name, _, v in (line.partition("==") for line in lines if line)}


def test_what_is_declared_is_what_is_pinned_for_the_programs() -> None:
    programs_part, checks_part = (
        (ROOT / "requirements.txt").read_text().split("# Tests and checks\n")
    )
    assert pins(programs_part).keys() == DECLARED.keys()
    assert pins(checks_part)
    for name, version in pins(programs_part).items():
        assert DECLARED[name].specifier.contains(version), name
        assert not any(each.operator == "==" for each in DECLARED[name].specifier), name


def test_trackers_and_tables_are_optional_and_tested_in_the_versions_that_are_declared() -> None:
    files = [f"requirements-{name}.txt" for name in ("examples", "cluster", "docs")]
    pinned = {name: v for file in files for name, v in pins((ROOT / file).read_text()).items()}
    assert PROJECT["optional-dependencies"].keys() == OPTIONAL.keys()
    for lines in PROJECT["optional-dependencies"].values():
        for name, requirement in declared(lines).items():
            assert requirement.specifier.contains(pinned[name]), name


def test_the_tests_install_what_the_examples_need_beside_the_pinned_torch() -> None:
    needed = pins((ROOT / "requirements-examples.txt").read_text())
    assert needed.keys() >= {"accelerate", "pytorch-lightning"}
    assert not needed.keys() & pins((ROOT / "requirements.txt").read_text()).keys()
    makefile = (ROOT / "Makefile").read_text()
    for name in ("examples", "cluster"):
        assert f"-r requirements-{name}.txt -c requirements.txt" in makefile
        assert re.search(rf"^test: .*\benv-{name} ", makefile, re.M)


def test_every_import_of_the_packages_is_declared() -> None:
    files = [file for name in (*PARTS, "teach_once") for file in (ROOT / name).rglob("*.py")]
    own = {"teach_once", *sys.stdlib_module_names}
    homes = packages_distributions()
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            for name in {name.partition(".")[0] for name in names} - own:
                home = homes.get(name, [name])[0].lower()
                is_optional = (name, file.name) in set().union(*OPTIONAL.values())
                assert home in DECLARED or is_optional, f"{file.relative_to(ROOT)} imports {name}"
