"""The pass stores the teacher's outputs of the test images in a cache inside the cache."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from teach_once.configs.schema import TeacherConfig
from teach_once.nets.metrics import count_errors
from teach_once.nets.teacher.taps import Tap
from teach_once.nets.weights.files import save_atomically
from teach_once.precompute import run_pass
from teach_once.precompute.command import cli
from teach_once.precompute.compute.blocks import run_blocks
from teach_once.precompute.compute.setup import Setup, evaluation_setup, open_evaluated
from teach_once.precompute.compute.teacher_pass import PassOptions, TeacherPass
from teach_once.runtime.command.signals import StopRequest
from teach_once.store import TeacherCache
from teach_once.store.command import cli as store
from teach_once.store.read.evaluation import evaluation_names
from teach_once.views.pixels.resident import evaluation_pixels
from tests.support.caches.damage import flip
from tests.support.caches.teacher_cache import CPU, make_cache, setup_of

Make = Callable[..., TeacherConfig]


def evaluated(setup: Setup) -> TeacherCache:
    cache = open_evaluated(setup, every_byte=True)
    assert cache is not None
    return cache


def words_of(config: TeacherConfig, caches: Path) -> list[str]:
    assert config.source is not None
    return [config.name, "--caches", str(caches), "--device", "cpu", *config.source.overrides]


def files_below(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.mark.parametrize("logits", ["float16", "uint8", "{top_k: 2}"])
def test_evaluation_cache_holds_the_exact_outputs_of_the_test_images(
    small_teacher: Make, tmp_path: Path, logits: str
) -> None:
    config = small_teacher(f"taps.logits={logits}", "taps.embedding=float16")
    setup = setup_of(config, tmp_path)
    cache, found = make_cache(config, tmp_path), evaluated(setup)
    teacher = TeacherPass(setup, PassOptions(CPU)).teacher
    test = evaluation_pixels(setup.dataset.test, config.views, config.dataset.normalization, CPU)
    (batch,) = test.batches([0], np.arange(len(test)), len(test))
    expected = teacher.outputs(batch.inputs, batch.labels, [Tap("logits"), Tap("embedding")])
    read = found.read_view(0)
    assert read["logits"].dtype == np.float32
    np.testing.assert_allclose(read["logits"], expected["logits"].numpy(), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(read["embedding"], expected["embedding"].numpy(), rtol=2e-3)
    assert {"stage1", "stage2", "stage3", "correct"} < set(read)
    assert np.array_equal(found.labels, setup.dataset.test.labels)
    errors = count_errors([(torch.from_numpy(read["logits"]), torch.from_numpy(found.labels))])
    assert {f"test_{name}": value for name, value in errors.items()}.items() <= (
        cache.measured.items()
    )


def test_evaluation_cache_without_logits_holds_the_means(
    small_teacher: Make, tmp_path: Path
) -> None:
    config = small_teacher("taps.logits=null")
    cache = make_cache(config, tmp_path)
    assert set(evaluated(setup_of(config, tmp_path)).taps) == {"stage1", "stage2", "stage3"}
    assert "test_top1_error" not in cache.measured


def test_evaluation_cache_that_is_missing_is_added_and_the_views_stay(
    small_teacher: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = small_teacher()
    cache, setup = make_cache(config, tmp_path), setup_of(config, tmp_path)
    path = evaluated(setup).path
    before, inside = files_below(cache.path), files_below(path)
    for file in sorted(path.rglob("*"), reverse=True):
        file.unlink() if file.is_file() else file.rmdir()
    (cache.path / "index.json").unlink()
    assert cli(words_of(config, tmp_path)) == 0
    assert "lacks some of the teacher's outputs of the test images" in capsys.readouterr().out
    assert files_below(path) == inside
    assert evaluated(setup).read_view(0)["logits"].shape == (len(setup.dataset.test), 10)
    assert (
        TeacherCache.open(cache.path).measured["images_per_second"]
        == (cache.measured["images_per_second"])
    )
    after = files_below(cache.path)
    assert {name for name in before if before[name] != after[name]} <= {
        "manifest.json",  # the rate of the last pass
        "index.json",
    }
    assert cli(words_of(config, tmp_path)) == 0
    assert "is complete: nothing to do" in capsys.readouterr().out


def test_evaluation_cache_with_a_flipped_bit_is_repaired(
    small_teacher: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = small_teacher()
    cache, setup = make_cache(config, tmp_path), setup_of(config, tmp_path)
    found = evaluated(setup)
    chunk = found.path / "teacher.zarr/logits/c.0.0.0"
    content = chunk.read_bytes()
    flip(chunk, 40)
    assert store(["check", str(cache.path)]) == 1
    assert f"CACHES={tmp_path} FULL_CHECK=1" in capsys.readouterr().out
    assert open_evaluated(setup, every_byte=True) is None
    assert cli(words_of(config, tmp_path)) == 0
    assert chunk.read_bytes() == content
    assert store(["check", str(cache.path)]) == 0


def test_evaluation_of_other_test_images_is_another_cache(
    small_teacher: Make, tmp_path: Path
) -> None:
    config = small_teacher()
    make_cache(config, tmp_path)
    setup = setup_of(config, tmp_path)
    test = setup.dataset.test.subset(np.arange(40))
    other = dataclasses.replace(setup.dataset, test=test, digest_test=lambda: "ab" * 32)
    changed = dataclasses.replace(setup, dataset=other)
    assert open_evaluated(changed, every_byte=True) is None
    teacher_pass = TeacherPass(changed, PassOptions(CPU))
    with StopRequest() as stop:
        run_pass.fill_evaluation(teacher_pass, stop, Console(quiet=True))
    assert len(evaluated(changed).labels) == 40
    assert evaluated(setup).num_samples == len(setup.dataset.test)
    names = evaluation_names(setup.path)
    assert names == sorted({evaluation_setup(each).path.name for each in (setup, changed)})


def test_evaluation_in_another_transform_is_another_cache(
    small_teacher: Make, tmp_path: Path
) -> None:
    setups = []
    for more in ([], ["views.evaluation={type: center-crop, resize_px: 10, crop_px: 8}"]):
        config = small_teacher(*more)
        setups.append(setup_of(config, tmp_path))
        assert open_evaluated(setups[-1], every_byte=True) is None
        assert cli(words_of(config, tmp_path)) == 0
    usual, larger = (evaluated(setup) for setup in setups)
    assert setups[0].path == setups[1].path
    assert evaluation_names(setups[0].path) == sorted({usual.path.name, larger.path.name})
    both = [cache.read_view(0)["logits"] for cache in (usual, larger)]
    assert not np.array_equal(*both)
    shutil.rmtree(usual.path)
    larger.path.rename(usual.path)
    assert open_evaluated(setups[0], every_byte=True) is None


def test_evaluation_cache_of_a_teacher_with_attention_only_holds_the_means(
    small_teacher: Make, tmp_path: Path
) -> None:
    config = small_teacher("taps.logits=null", "taps.channel_means=null", "taps.attention=float16")
    make_cache(config, tmp_path)
    assert set(evaluated(setup_of(config, tmp_path)).taps) == {"stage1", "stage2", "stage3"}


def test_evaluation_pass_that_was_killed_is_resumed(
    small_teacher: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_teacher()

    class Killed(BaseException):
        pass

    def killed(teacher_pass: TeacherPass, *more: Any) -> int:
        if "evaluation" in teacher_pass.setup.path.parts:
            raise Killed
        return run_blocks(teacher_pass, *more)

    with monkeypatch.context() as patched:
        patched.setattr(run_pass, "run_blocks", killed)
        with pytest.raises(Killed):
            make_cache(config, tmp_path)
    setup = setup_of(config, tmp_path)
    assert open_evaluated(setup, every_byte=True) is None
    cache = make_cache(config, tmp_path)
    assert "test_top1_error" in cache.measured
    assert evaluated(setup).num_samples == len(setup.dataset.test)


def test_evaluation_cache_holds_means_that_overflow_float16(
    small_teacher: Make, tmp_path: Path
) -> None:
    weights = torch.load(small_teacher().teacher.weights, weights_only=True)
    weights["layer3.0.bn2.weight"] *= 1e6
    save_atomically(weights, tmp_path / "large.pt")
    config = small_teacher(
        f"teacher.weights={tmp_path}/large.pt", "taps.channel_means=uint8", "taps.logits=uint8"
    )
    make_cache(config, tmp_path / "caches")
    means = evaluated(setup_of(config, tmp_path / "caches")).read_view(0)["stage3"]
    assert means.max() > np.finfo(np.float16).max
