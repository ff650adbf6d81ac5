"""Untrusted configs: any file gives one message quickly, and no code is run."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from teach_once.configs.command import cli
from teach_once.configs.load import CONFIG_DIR, ConfigError, load_student, load_teacher
from tests.support.programs.work import few_calls

TEACHER = (CONFIG_DIR / "teacher" / "digits-resnet20.yaml").read_text()
STUDENT = (CONFIG_DIR / "student" / "digits-resnet8.yaml").read_text()


def refused(load: Callable[[], object]) -> str:
    """The message of a refusal that took no work worth mentioning."""
    # Of a megabyte of text, as much as a config may be, each value is counted.
    with few_calls(4_000_000), pytest.raises(ConfigError) as caught:
        load()
    assert len(str(caught.value)) < 1000
    return str(caught.value)


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(path))


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (os.mkfifo, "is a FIFO, expected a regular file"),
        (Path.mkdir, "is a folder, expected a regular file"),
        (lambda path: path.symlink_to("/dev/zero"), "is a device, expected a regular file"),
        (lambda path: path.symlink_to(path), "is a loop of symbolic links"),
        (lambda path: path.symlink_to("/nowhere"), "cannot be read: No such file"),
        (make_socket, "is a socket"),
        (lambda path: path.write_bytes(b"a: \xff"), "not UTF-8 text"),
        (lambda path: path.write_text("a: 1\n" * 300_000), "expected at most 1.0 MB"),
    ],
)
def test_a_config_is_a_regular_file_of_text(
    make: Callable[[Path], object], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make(Path("odd.yaml"))
    assert told in refused(lambda: load_teacher("odd.yaml"))


@pytest.mark.parametrize(
    "text",
    [
        "a: [" + "1, " * 300_000 + "]",
        "a: " + "[" * 500_000,
        "a: " + "{b: " * 200_000,
        "? " * 400_000,
        "- " * 400_000,
        "a: &a [x, x, x, x, x, x, x, x, x]\n"
        + "".join(
            f"{n}: &{n} [{', '.join([f'*{p}'] * 9)}]\n"
            for p, n in zip("abcdefg", "bcdefgh", strict=True)
        )
        + "i: [*h, *h]",
    ],
    ids=["list", "brackets", "braces", "question marks", "dashes", "aliases"],
)
def test_large_and_nested_yaml_is_refused_at_once(text: str, tmp_path: Path) -> None:
    (tmp_path / "large.yaml").write_text(text)
    assert "more than 20 levels or 10,000 values" in refused(
        lambda: load_teacher(tmp_path / "large.yaml")
    )


@pytest.mark.parametrize(
    "override",
    [
        *("training.epochs=99999999999999999999", "training.epochs=010", "training.epochs=1:30"),
        *("training.epochs=2001-01-01", f"training.epochs={'9' * 5000}", "training.epochs=1000001"),
        *("training.batch_size=2000000", "views.count=100000", "training.seed=1e3"),
        "views.augment={type: random-resized-crop, size_px: 10000}",
        "views.augment={type: random-resized-crop, ratio: [1e-300, 1e300]}",
        "views.augment={type: pad-crop-flip, mix: {type: mixup, alpha: 1e-300}}",
        "views.augment={type: pad-crop-flip, trivial_augment: {bins: 1000000000}}",
        f"taps.hint={{stage: stage{'9' * 5000}}}",
    ],
)
def test_numbers_that_are_looped_over_or_allocated_are_bounded(override: str) -> None:
    assert override.partition("=")[0].partition(".")[0] in refused(
        lambda: load_teacher("digits-resnet20", [override])
    )


@pytest.mark.parametrize("key", ["methods.kd.²", "methods.kd.-1", f"methods.kd.{'9' * 5000}"])
def test_odd_indices_of_overrides_are_refused(key: str) -> None:
    assert "not an index" in refused(lambda: load_student("digits-resnet8", [f"{key}.weight=1"]))
    assert "not an index" in refused(lambda: load_student("digits-resnet8", [f"{key}=1"]))


@pytest.mark.parametrize("name", ["../../x", "/tmp/x", "..", ".x", "-x", "x" * 101, ""])
def test_a_method_cannot_be_named_out_of_the_folder_of_runs(name: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(f"{STUDENT}\n  '{name}': [{{loss: ce}}]\n")
    assert f"methods.{name[:10]}" in refused(lambda: load_student(file))


@pytest.mark.parametrize(
    "stem", ["..", ".hidden", "-x", "a\nb", "a\x1b[31mb", "a$(touch b)", "`a`"]
)
def test_a_file_cannot_be_named_out_of_a_folder_or_forge_output(stem: str, tmp_path: Path) -> None:
    file = tmp_path / f"{stem}.yaml"
    file.write_text(TEACHER)
    told = refused(lambda: load_teacher(file))
    assert "name: the file's name becomes the cache's name and must be letters, digits" in told
    assert "\x1b" not in told
    assert "a\n" not in told


def test_code_that_a_strangers_config_names_is_told_of_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(f"{STUDENT}\n  own: [{{loss: 'their.losses:sharper'}}]\n")
    own = ["student.arch=python:their.nets:build"]
    assert cli(["student", str(file), *own]) == 0
    assert cli(["student", str(file), *own]) == 0
    told = capsys.readouterr().err
    assert told == (f"note: {file} runs Python code: their.losses:sharper, their.nets:build\n")
    assert cli(["student", "digits-resnet8"]) == 0
    assert not capsys.readouterr().err
