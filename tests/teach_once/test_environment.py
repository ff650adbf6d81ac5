"""`teach-once env`: the lines of a bug report, even from a faulty machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from teach_once import __version__, environment
from teach_once.__main__ import main
from tests.support.project import ROOT


def lines_of(printed: str) -> dict[str, str]:
    rows = (line.partition(":") for line in printed.splitlines())
    return {name: value.strip() for name, _, value in rows}


def test_version_is_the_one_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"teach-once {__version__}\n"


def test_env_prints_a_value_for_every_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env"]) == 0
    lines = lines_of(capsys.readouterr().out)
    assert list(lines) == [
        *("teach-once", "python", "packages", "optional", "system", "processor", "memory"),
        *("/dev/shm", "folder", "limits", "variables", "torch", "gpus"),
    ]
    assert lines["teach-once"].startswith(__version__)
    assert "torch 2." in lines["packages"]
    assert "zarr 3." in lines["packages"]
    assert "kernels" in lines["torch"]
    assert not [line for line in lines.values() if "unknown: " in line]


def test_env_without_torch_names_the_error_and_prints_the_rest(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('libcudart.so.12 is missing')\n")
    path = {"PYTHONPATH": f"{tmp_path}:{ROOT}", "PATH": ""}
    ran = subprocess.run(
        [sys.executable, "-P", "-m", "teach_once", "env"],
        cwd=tmp_path,
        env={**os.environ, **path},
        capture_output=True,
        text=True,
        check=True,
    )
    lines = lines_of(ran.stdout)
    assert lines["torch"] == "unknown: ImportError: libcudart.so.12 is missing"
    assert "cores usable" in lines["processor"]


def test_environment_without_shared_memory_and_git_is_complete(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / ".git").mkdir()
    monkeypatch.setattr(environment, "PROJECT", tmp_path)
    monkeypatch.setenv("PATH", "")  # no git
    monkeypatch.setattr(environment, "_OPTIONAL", ("no-such-package",))
    monkeypatch.setattr(
        environment.shutil, "disk_usage", lambda _: (_ for _ in ()).throw(FileNotFoundError("x"))
    )
    found = dict(environment.environment())
    assert found["teach-once"].endswith("commit unknown")
    assert found["optional"] == "no-such-package (not installed)"
    assert found["/dev/shm"] == "unknown: FileNotFoundError: x"
    assert "open files" in found["limits"]
