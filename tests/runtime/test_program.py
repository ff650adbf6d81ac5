"""The commands in messages begin with words that the user's shell finds."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from teach_once.runtime.command.program import pip_install, portable_program, program_text
from teach_once.runtime.launch import cli

HERE = Path(sys.executable).parent


@pytest.fixture
def shell_finds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., None]:
    """Lets the shell find these programs, each of which is somebody else's, and the system's."""

    def find(*names: str) -> None:
        folder = tmp_path / "bin"
        folder.mkdir()
        for name in names:
            (folder / name).write_text("#!/bin/sh\nexit 1\n")
            (folder / name).chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")

    return find


def test_a_command_names_the_running_python_where_the_shell_finds_another_or_none(
    shell_finds: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    shell_finds("python")
    assert cli(["2"]) == 2
    command = capsys.readouterr().err.partition("fix: ")[2]
    begin = shlex.split(command)[:3]
    assert begin[1:] == ["-m", "runtime.launch"]
    version = "import sys; print(sys.executable)"
    ran = subprocess.run([begin[0], "-c", version], capture_output=True, text=True, check=True)
    assert Path(ran.stdout.strip()).parent == HERE
    assert pip_install("ray").startswith(begin[0])


def test_a_command_begins_with_python_where_the_shell_finds_the_running_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PATH", f"{HERE}{os.pathsep}/usr/bin")
    assert program_text("train") == "python -m train"


def test_a_python_below_the_current_folder_is_named_from_there(
    shell_finds: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    shell_finds()
    monkeypatch.setattr("sys.executable", str(Path.cwd() / "my env/bin/python3"))
    assert program_text("train") == "'my env/bin/python3' -m train"


def test_elsewhere_a_command_is_the_installed_one_by_its_path_where_the_shell_lacks_it(
    shell_finds: Callable[..., None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shell_finds("teach-once")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.executable", str(tmp_path / "elsewhere/bin/python"))
    assert program_text("train") == "teach-once train"  # there is none beside this Python
    monkeypatch.setattr("sys.executable", str(tmp_path / "env/bin/python"))
    (tmp_path / "env/bin").mkdir(parents=True)
    (tmp_path / "env/bin/teach-once").touch(mode=0o755)
    assert program_text("train") == "env/bin/teach-once train"
    assert portable_program("train") == ["teach-once", "train"]
    monkeypatch.setenv("PATH", str(tmp_path / "env/bin"))
    assert program_text("train") == "teach-once train"
