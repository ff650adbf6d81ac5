"""A cache whose pixels cannot be reproduced is rejected with a useful fix."""

from __future__ import annotations

import dataclasses
import subprocess
from collections.abc import Callable
from pathlib import Path

import PIL
import pytest

from teach_once.configs.schema import TeacherConfig
from teach_once.precompute.command import cli
from teach_once.store import TeacherCache
from teach_once.store.format.manifest import read_manifest, write_manifest
from tests.support.caches.teacher_cache import make_cache


def arguments_of(config: TeacherConfig, caches: Path) -> list[str]:
    own = [
        "teacher.arch=resnet8",
        f"teacher.weights={config.teacher.weights}",
        "dataset.max_per_class=6",
    ]
    taps = ["taps.attention=null", "taps.hint=null"]
    return [config.name, *own, *taps, "views.count=1", "--caches", str(caches), "--device", "cpu"]


@pytest.mark.parametrize("pillow", ["11.0.0", PIL.__version__, None])
def test_the_remedy_is_another_pillow_or_a_new_cache(
    small_teacher: Callable[..., TeacherConfig],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    pillow: str | None,
) -> None:
    config = small_teacher("views.count=1")
    path = make_cache(config, tmp_path / "some caches").path
    arguments = arguments_of(config, path.parent)
    assert cli(arguments) == 0
    manifest = read_manifest(path)
    assert manifest.versions["pillow"] == PIL.__version__
    versions = {**manifest.versions, "pillow": pillow}
    if pillow is None:
        del versions["pillow"]
    canary = {**manifest.canary, "sha256": "0" * 64}
    write_manifest(path, dataclasses.replace(manifest, canary=canary, versions=versions))
    capsys.readouterr()
    assert cli(arguments) == 2
    told = capsys.readouterr().err
    assert "views replayed from this dataset differ from the teacher's views" in told
    assert (f"pip install pillow=={pillow}" in told) == (pillow == "11.0.0")
    assert (f"{PIL.__version__} now" in told) == (pillow != PIL.__version__)
    command = told[told.index("mv ") : told.index(" && make cache-teacher TEACHER=")]
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    subprocess.run(command, shell=True, check=True, cwd=elsewhere)
    assert cli(arguments) == 0
    assert TeacherCache.open(path).manifest.canary == manifest.canary
