"""Every command in an error about a cache in a bucket works as printed."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from teach_once.configs.schema import TeacherConfig
from teach_once.runtime.machine.urls import path_or_url
from teach_once.store.command import cli as store
from teach_once.store.move.copy import copy_cache
from teach_once.train.cli.commands import cli as train
from tests.project.test_remedies import printed_command, run_as_printed
from tests.support.caches.object_store import Server, emptied, running
from tests.support.caches.teacher_cache import make_cache

CACHES = "s3://bucket/caches"
TRAINING = ["training.epochs=1", "training.schedule={type: onecycle}", "training.batch_size=20"]


@pytest.fixture(scope="module")
def server(
    small_teacher: Callable[..., TeacherConfig], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """A store with the cache of `small_teacher`."""
    with running() as started, emptied(started):
        copy_cache(make_cache(small_teacher(), tmp_path_factory.mktemp("made")), url())
        yield started


def url():
    return path_or_url(CACHES)


@pytest.fixture
def run(
    small_teacher: Callable[..., TeacherConfig], tmp_path_factory: pytest.TempPathFactory
) -> list[str]:
    """A training from that cache, with overrides of the teacher."""
    source = small_teacher("training.epochs=3").source  # as its weights were trained
    assert source is not None
    overrides = [f"teacher.{item}" for item in source.overrides]
    places = ["--caches", CACHES, "--mirror", str(tmp_path_factory.mktemp("mirror"))]
    places += ["--runs", str(tmp_path_factory.mktemp("runs"))]
    words = ["student", "digits-resnet8", "--method", "cd", "--device", "cpu"]
    return [*words, *places, *TRAINING, *overrides]


def flipped(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def without_last_line(content: bytes) -> bytes:
    return b"".join(content.splitlines(keepends=True)[:-1])


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("teacher.zarr/stage1/c.0.0.0", flipped),
        ("teacher.zarr/stage1/c.0.0.0", None),
        pytest.param("teacher.zarr/labels/c.0", flipped, marks=pytest.mark.long),
        ("manifest.json", flipped),
        pytest.param("manifest.json", None, marks=pytest.mark.long),
        pytest.param("journal/", flipped, marks=pytest.mark.long),
        ("journal/", without_last_line),
    ],
)
def test_a_training_from_a_damaged_or_unfinished_cache_in_a_bucket_names_what_helps(
    part: str,
    change: Callable[[bytes], bytes] | None,
    server: Server,
    run: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    keys = [key for key in server.all_keys() if f"/{part}" in key]
    for key in keys:
        server.ask("PUT", key, change(server.ask("GET", key))) if change else server.ask(
            "DELETE", key
        )
    assert keys
    capsys.readouterr()
    assert train(run) == 2
    command = printed_command(capsys.readouterr().err)
    assert f"CACHES={CACHES}" in command
    run_as_printed(command)
    capsys.readouterr()
    assert train(run) == 0
    assert store(["check", "--caches", CACHES]) == 0


def test_what_check_advises_for_a_cache_in_a_bucket_is_one_command(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    (key,) = (
        key
        for key in server.all_keys()
        if key.endswith("teacher.zarr/logits/c.0.0.0") and "/evaluation/" not in key
    )
    content = server.ask("GET", key)
    try:
        server.ask("PUT", key, flipped(content))
        assert store(["check", "--caches", CACHES]) == 1
    finally:
        server.ask("PUT", key, content)
    printed = capsys.readouterr().out
    command = printed_command(printed)
    assert command.split()[-2:] == [f"CACHES={CACHES}", "FULL_CHECK=1"]
    assert f"with a valid copy of it, CACHE, also: python -m store copy CACHE {CACHES}\n" in printed
