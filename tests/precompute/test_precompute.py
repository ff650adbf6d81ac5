"""Stage 1: its result depends only on its identity, it resumes, and it reports errors."""

from __future__ import annotations

import dataclasses
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from teach_once.configs.schema import TeacherConfig
from teach_once.nets.networks.names import stage_modules
from teach_once.nets.networks.zoo import build
from teach_once.nets.teacher.taps import channel_means, read_stages
from teach_once.nets.weights.files import load_weights
from teach_once.precompute import run_pass as fill_module
from teach_once.precompute.command import cli
from teach_once.precompute.compute import trial as trial_module
from teach_once.precompute.compute.teacher_pass import PassOptions, TeacherPass
from teach_once.precompute.compute.trial import fastest_batch
from teach_once.precompute.run_pass import fill_cache, plan_pass
from teach_once.runtime.formats import format_size
from teach_once.store import TeacherCache
from teach_once.views.augment.crops import crop_and_flip
from teach_once.views.augment.parameters import view_parameters
from teach_once.views.datasets import load_dataset
from teach_once.views.pixels.batches import normalize
from tests.support.caches.teacher_cache import CPU, make_cache, setup_of
from tests.support.programs.processes import run, start
from tests.support.project import ROOT

Make = Callable[..., TeacherConfig]


def all_records(cache: TeacherCache) -> dict[str, np.ndarray]:
    views = [cache.read_view(view) for view in range(cache.num_views)]
    return {tap: np.stack([view[tap] for view in views]) for tap in cache.taps}


def means_of(stage: str, features: torch.Tensor) -> torch.Tensor:
    return channel_means(features)


@pytest.mark.parametrize(("batch_size", "block_rows"), [(1, 16), (7, 64), (256, 8)])
def test_a_record_does_not_depend_on_batch_or_block_size(
    small_teacher: Make, tmp_path: Path, batch_size: int, block_rows: int
) -> None:
    config = small_teacher("taps.logits=float32", "taps.channel_means=float32")
    usual = all_records(make_cache(config, tmp_path / "a", batch_size=256, block_rows=16))
    other = all_records(
        make_cache(config, tmp_path / "b", batch_size=batch_size, block_rows=block_rows)
    )
    for tap, values in usual.items():
        assert np.allclose(values, other[tap], rtol=1e-4, atol=1e-4), tap
    assert (usual["correct"] == other["correct"]).all()


def test_records_are_the_teachers_outputs_on_exactly_those_views(
    small_teacher: Make, tmp_path: Path
) -> None:
    config = small_teacher("taps.logits=float32", "taps.channel_means=float32")
    cache = make_cache(config, tmp_path)
    data = load_dataset(config.dataset).train
    network = build("resnet8", num_classes=10, in_channels=1)
    load_weights(network, Path(config.teacher.weights))
    network.eval()
    for view in range(3):
        parameters = view_parameters(config.views, view, len(data))
        pixels = torch.from_numpy(crop_and_flip(data.images, parameters, config.views.augment))
        stages = stage_modules("resnet8")
        with torch.no_grad(), read_stages(network, stages, means_of) as means:
            logits = network(normalize(pixels, config.dataset.normalization))
        found = cache.read_view(view)
        assert np.allclose(found["logits"], logits.numpy(), atol=1e-4)
        for stage, values in means.items():
            assert np.allclose(found[stage], values.numpy(), atol=1e-5)
        right = (found["logits"].argmax(axis=1) == data.labels).astype(np.uint8)
        assert (found["correct"] == right).all()
        assert 0 < right.mean() < 1  # else the test above says little


def test_a_recalibrated_teacher_is_another_cache_and_no_less_deterministic(
    small_teacher: Make, tmp_path: Path
) -> None:
    usual = make_cache(small_teacher(), tmp_path / "a")
    config = small_teacher("teacher.bn=recalibrated")
    ours = make_cache(config, tmp_path / "a", batch_size=7, block_rows=8)
    again = make_cache(config, tmp_path / "b", batch_size=64, block_rows=64)
    assert ours.path.name == again.path.name != usual.path.name
    records = all_records(ours)
    for tap, values in all_records(again).items():
        assert np.allclose(values, records[tap], rtol=2e-3, atol=2e-3), tap
    assert not np.allclose(records["stage1"], all_records(usual)["stage1"], atol=1e-2)


@pytest.mark.usefixtures("all_digits")
def test_the_teachers_error_and_agreement_are_recorded(small_teacher: Make, tmp_path: Path) -> None:
    cache = make_cache(small_teacher(), tmp_path)
    correct = all_records(cache)["correct"]
    assert cache.measured["train_agreement"] == pytest.approx(correct.mean())
    assert 0 < cache.measured["test_top5_error"] < cache.measured["test_top1_error"] < 100


def test_float16_taps_hold_the_rounded_float32_values(small_teacher: Make, tmp_path: Path) -> None:
    exact = all_records(
        make_cache(small_teacher("taps.logits=float32", "taps.channel_means=float32"), tmp_path)
    )
    rounded = all_records(make_cache(small_teacher(), tmp_path))
    for tap, values in rounded.items():
        assert (values == exact[tap].astype(values.dtype)).all()


# ---- the command


def command(config: TeacherConfig, caches: Path, *arguments: str) -> list[str]:
    return [
        "precompute",
        "digits-resnet20",
        "--caches",
        str(caches),
        "--block-rows",
        "8",
        "teacher.arch=resnet8",
        f"teacher.weights={config.teacher.weights}",
        "dataset.max_per_class=6",
        "views.count=3",
        "taps.attention=null",
        "taps.hint=null",
        *arguments,
    ]


@pytest.mark.usefixtures("all_digits")
def test_a_second_call_does_nothing_says_so_and_loads_no_torch(
    small_teacher: Make, tmp_path: Path
) -> None:
    call = command(small_teacher(), tmp_path)
    first = run(*call)
    assert first.returncode == 0, first.stderr
    assert " files: 3 views x 60 samples, 245 bytes each\n" in first.stdout
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    python = [sys.executable, "-X", "importtime", "-m"]
    second = subprocess.run([*python, *call], cwd=ROOT, capture_output=True, text=True, check=False)
    assert second.returncode == 0
    assert "is complete: nothing to do. Teacher: test error" in second.stdout
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    assert "views.augment" in second.stderr
    assert " torch" not in second.stderr


@pytest.mark.usefixtures("all_digits")
def test_complete_cache_is_reported_by_the_first_rank_and_by_each_machine_of_a_job(
    small_teacher: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = small_teacher()
    make_cache(config, tmp_path)
    call = command(config, tmp_path)[1:]
    for ranks, reports in (
        (["--rank", "0", "--world-size", "2"], 1),
        (["--rank", "1", "--world-size", "2"], 0),
        (["--rank", "1", "--world-size", "2", "--job", "7"], 1),
    ):
        assert cli([*call, *ranks]) == 0
        assert capsys.readouterr().out.count("is complete: nothing to do") == reports, ranks


def test_a_killed_pass_loses_at_most_the_blocks_in_flight_and_resumes_to_the_same_records(
    small_teacher: Make, tmp_path: Path
) -> None:
    config = small_teacher("views.count=9")
    call = [*command(config, tmp_path / "killed", "--batch-size", "1"), "views.count=9"]
    process = start(*call)
    journal: list[Path] = []
    while not journal or journal[0].stat().st_size < 1000:
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.005)
        journal = list((tmp_path / "killed").glob("*/journal/*"))
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    committed = journal[0].read_bytes().count(b"\n")
    assert committed >= 2
    resumed = run(*call)
    assert resumed.returncode == 0, resumed.stderr
    todo = int(resumed.stdout.split("to do ")[1].split()[0])
    assert todo <= 9 * 60 - (committed - 9) * 8 - 9 * 4  # no committed block is computed again
    whole = all_records(make_cache(config, tmp_path / "whole", batch_size=1, block_rows=8))
    (path,) = (tmp_path / "killed").iterdir()
    for tap, values in all_records(TeacherCache.open(path)).items():
        assert np.allclose(values, whole[tap], rtol=1e-3, atol=1e-3), tap


def test_changed_weights_make_another_cache_and_leave_the_old_one(
    small_teacher: Make, tmp_path: Path
) -> None:
    config = small_teacher()
    old = make_cache(config, tmp_path / "caches")
    state = torch.load(config.teacher.weights, weights_only=True)
    state["fc.bias"][0] += 1
    torch.save(state, tmp_path / "changed.pt")
    new = make_cache(
        small_teacher(f"teacher.weights={tmp_path / 'changed.pt'}"), tmp_path / "caches"
    )
    assert new.path != old.path
    assert TeacherCache.open(old.path).faults() == []


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["teacher.weights=gone.pt"], "python -m train teacher digits-resnet20"),
        (["teacher.weights=gone.pt", "training=null"], "set teacher.weights=PATH"),
        (["teacher.arch=resnet9"], "unknown arch 'resnet9'; did you mean"),
        (["taps.stages=[layer1,layer7]"], "no module 'layer7'"),
        (["views.count=10"], "only 9 distinct views"),
        (["teacher.arch=resnet14"], "do not fit the network"),
        (["dataset.root=x"], "dataset.root: unknown key"),
        (["views.augment.pad_px=8", "views.augment.padding=reflect"], "by at most 7"),
    ],
)
def test_bad_input_is_an_error_with_its_remedy_and_no_traceback(
    small_teacher: Make,
    tmp_path: Path,
    arguments: list[str],
    told: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli(command(small_teacher(), tmp_path, *arguments)[1:]) == 2
    assert told in capsys.readouterr().err


def test_an_error_shows_no_traceback(small_teacher: Make, tmp_path: Path) -> None:
    result = run(*command(small_teacher(), tmp_path, "teacher.arch=resnet9"))
    assert result.returncode == 2
    assert result.stderr.startswith("error: unknown arch 'resnet9'")
    assert "Traceback" not in result.stderr


PASS_AND_ITS_PEAK = """
import sys
from teach_once.runtime.command.cost import peak_memory
from teach_once.precompute.command import cli
assert cli(sys.argv[1:]) == 0
print("peak", peak_memory())
"""


def test_a_pass_stays_within_the_memory_that_its_plan_names(
    teacher_weights: Path, tmp_path: Path
) -> None:
    arguments = [
        "digits-resnet20",
        "teacher.arch=resnet8",
        f"teacher.weights={teacher_weights}",
        "dataset.max_per_class=null",
        "--caches",
        str(tmp_path),
        "--device",
        "cpu",
    ]
    result = subprocess.run(
        [sys.executable, "-c", PASS_AND_ITS_PEAK, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    ((planned, unit),) = re.findall(r"at most about ([\d.,]+) (MB|GB) of RAM", result.stdout)
    (peak,) = re.findall(r"peak (\d+)", result.stdout)
    assert int(peak) <= float(planned.replace(",", "")) * {"MB": 1e6, "GB": 1e9}[unit]


def test_a_long_pass_tries_batch_sizes_and_takes_the_fastest(
    small_teacher: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, console: Console
) -> None:
    rates = {64: 100.0, 128: 180.0, 256: 200.0, 512: 203.0, 1024: 900.0}
    tried: list[int] = []

    def rate_of(batches: Iterator[int]) -> float:
        size = next(batches)  # the first batch is a whole one
        tried.append(size)
        return rates[size]

    config = small_teacher("dataset.max_per_class=null", "views.count=1")  # 1,000 samples
    teacher_pass = TeacherPass(setup_of(config, tmp_path), PassOptions(CPU))
    monkeypatch.setattr(trial_module, "measured_rate", rate_of)
    assert fastest_batch(teacher_pass) == (256, 200.0)
    assert tried == [64, 128, 256]  # no more on a CPU, where it takes memory for nothing
    tried.clear()
    monkeypatch.setattr(trial_module, "_LARGEST_ON_CPU", 8192)
    assert fastest_batch(teacher_pass) == (256, 200.0)
    assert tried == [64, 128, 256, 512]  # the last gained less than 3 %

    monkeypatch.setattr(trial_module, "measured_rate", lambda batches: 50.0)
    monkeypatch.setattr(fill_module, "TRIAL_RECORDS", 0)
    fill_cache(setup_of(config, tmp_path), PassOptions(CPU), console)
    assert "batches of 64 images were the fastest" in console.file.getvalue()


@pytest.mark.usefixtures("all_digits")
def test_a_plan_counts_the_trial_of_the_batch_size_and_the_test(
    small_teacher: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, console: Console
) -> None:
    monkeypatch.setattr(fill_module, "TRIAL_RECORDS", 0)
    monkeypatch.setattr(fill_module, "fastest_batch", lambda teacher_pass: (128, 0.25))
    setup = setup_of(small_teacher("views.count=1"), tmp_path)
    plan = plan_pass(setup, PassOptions(CPU))
    assert (plan.images_per_second, plan.evaluated) == (0.25, {"test image": 797})
    stored = {
        tap: spec for tap, spec in plan.manifest.taps.items() if tap[:4] not in ("atte", "hint")
    }
    assert plan.evaluated_bytes == 797 * 4 * sum(math.prod(each.shape) for each in stored.values())
    images = plan.pending_records + 797
    assert plan.hours == pytest.approx(images / 0.25 / 3600, rel=1e-3)
    assert plan.trial_hours > 0
    table = plan.table(setup.path)
    assert "at 0.25 images/s on cpu and a batch size trial" in table
    assert "then     797 test images, " in table
    large = dataclasses.replace(
        plan,
        manifest=dataclasses.replace(plan.manifest, num_views=90, num_samples=1_281_167),
        pending_records=115_305_030,
        evaluated={"test image": 50_000, "probe image": 1_331_167},
        evaluated_bytes=123_400_000_000,
        images_per_second=12_345.6,
        spool_bytes=123_400_000_000,
        device="cuda:0",
    )
    for is_remote in (False, True):
        lines = dataclasses.replace(large, is_remote=is_remote).table(
            Path("caches/x"), "on the device"
        )
        assert max(map(len, lines.splitlines())) <= 100


def test_plan_in_a_file_instead_of_a_folder_is_refused(
    small_teacher: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "caches").write_text("")
    assert cli([*command(small_teacher(), tmp_path / "caches")[1:], "--plan"]) == 2
    error = f"error: {tmp_path / 'caches'} is a file, expected a folder\n  fix: choose another"
    assert capsys.readouterr().err.startswith(error)


def test_a_plan_of_a_repair_counts_the_damaged_blocks(
    small_teacher: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = small_teacher()
    cache = make_cache(config, tmp_path)
    chunk = next(cache.path.glob("teacher.zarr/logits/c.1.*"))
    chunk.write_bytes(b"\0" * chunk.stat().st_size)
    rows, size = cache.manifest.block(1, 0).rows, chunk.stat().st_size
    for options in (["--plan"], []):
        assert cli([*command(config, tmp_path)[1:], *options]) == 0
        printed = capsys.readouterr().out
        assert f"to do    {rows:,} of 180 records, {format_size(size)}" in printed
    assert cli([*command(config, tmp_path)[1:], "--plan"]) == 0
    assert "to do    0 of 180 records, 0 B" in capsys.readouterr().out


def test_the_peak_is_that_of_the_program_alone() -> None:
    program = (
        "from teach_once.runtime.command.cost import peak_memory; before = peak_memory(); "
        "held = bytearray(300_000_000); print(before, peak_memory())"
    )
    mine = np.ones(80_000_000)  # 640 MB, which a process that is started from here must not count
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    before, after = map(int, result.stdout.split())
    assert mine.nbytes > before
    assert 280e6 < after - before < 330e6
