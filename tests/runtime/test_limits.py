"""Memory, cores and GPUs of a process."""

from __future__ import annotations

import resource
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from teach_once.configs.schema import CenterCrop, Normalization, TeacherConfig, ViewsConfig
from teach_once.precompute.command import cli as precompute
from teach_once.runtime.command.options import Compute
from teach_once.runtime.errors import DeviceError
from teach_once.runtime.machine.devices import pick_device
from teach_once.runtime.machine.resources import (
    Share,
    free_memory,
    sharing_machine,
    total_memory,
    usable_cores,
)
from teach_once.train.cli.commands import cli as train
from teach_once.train.outputs.shuffle_buffer import jobs_that_fit
from teach_once.train.recording.options import Recording
from teach_once.train.runs.study import Study
from teach_once.train.studies.ablation import run_ablation
from teach_once.views.pixels.resident import evaluation_pixels
from teach_once.views.pixels.resident import free_memory as free_memory_on
from teach_once.views.pixels.streaming import default_workers
from teach_once.views.splits import Split, array_split, stack_digests

CPU = torch.device("cpu")
GB = 2**30
MakeMachine = Callable[..., Path]


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MakeMachine:
    """The root of a machine with 64 GiB, 48 of them free, and 16 cores; files below it follow."""
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(16)))

    def make(groups: str, files: dict[str, str]) -> Path:
        meminfo = f"MemTotal: {64 * GB // 1024} kB\nMemAvailable: {48 * GB // 1024} kB\n"
        proc = {"proc/meminfo": meminfo, "proc/self/cgroup": groups, "proc/self/statm": "1000 9\n"}
        for name, text in {**proc, **files}.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        return tmp_path

    return make


def test_without_limits_the_machine_counts(machine: MakeMachine) -> None:
    root = machine("0::/\n", {"sys/fs/cgroup/memory.stat": "anon 5\n"})
    assert (total_memory(root), free_memory(root)) == (64 * GB, 48 * GB)
    assert usable_cores(root) == 16


def test_the_tightest_of_the_groups_around_a_process_counts(machine: MakeMachine) -> None:
    group = "sys/fs/cgroup/batch.slice"
    files = {
        f"{group}/job/memory.max": "max\n",
        f"{group}/job/cpu.max": "max 100000\n",
        f"{group}/memory.max": f"{8 * GB}\n",
        f"{group}/memory.high": f"{6 * GB}\n",
        f"{group}/memory.current": f"{5 * GB}\n",
        f"{group}/memory.stat": f"anon 1\nactive_file {GB}\ninactive_file {GB}\n",
        f"{group}/cpu.max": "250000 100000\n",
    }
    root = machine("0::/batch.slice/job\n", files)
    assert total_memory(root) == 6 * GB
    assert free_memory(root) == 3 * GB  # files that the kernel keeps in memory can be given back
    assert usable_cores(root) == 3


def test_groups_of_the_first_version_count_too(machine: MakeMachine) -> None:
    memory, cpu = "sys/fs/cgroup/memory/docker/a", "sys/fs/cgroup/cpu"
    files = {
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
        f"{memory}/memory.limit_in_bytes": f"{4 * GB}\n",
        f"{memory}/memory.usage_in_bytes": f"{3 * GB}\n",
        f"{memory}/memory.stat": f"inactive_file 1\ntotal_inactive_file {GB}\n",
        f"{cpu}/cpu.cfs_quota_us": "400000\n",
        f"{cpu}/cpu.cfs_period_us": "100000\n",
    }
    # The group's path of cpu is the host's: in a container it does not exist.
    root = machine("4:memory:/docker/a\n2:cpu,cpuacct:/docker/a\n0::/\n", files)
    assert (total_memory(root), free_memory(root)) == (4 * GB, 2 * GB)
    assert usable_cores(root) == 4


def test_the_limit_of_the_address_space_counts(
    machine: MakeMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = machine("", {})
    monkeypatch.setattr("resource.getrlimit", lambda which: (2 * GB, resource.RLIM_INFINITY))
    mapped = 1000 * resource.getpagesize()
    assert (total_memory(root), free_memory(root)) == (2 * GB, 2 * GB - mapped)


def test_processes_of_one_machine_share_what_is_free_and_the_cores(machine: MakeMachine) -> None:
    root = machine("0::/\n", {})
    with sharing_machine(Share(3, 6)):
        assert Share.of_this_process() == Share(3, 6)
        assert free_memory(root) == 8 * GB
        assert usable_cores(root) == 2
        assert total_memory(root) == 64 * GB  # a run is the same run, alone or beside others
    assert Share.of_this_process() == Share()


def test_this_very_machine_can_be_asked() -> None:
    assert 0 < free_memory() <= total_memory()
    assert usable_cores() >= 1


def test_workers_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(32)))
    assert default_workers(CPU) == 16
    with sharing_machine(Share(0, 4)):
        assert default_workers(CPU) == 4
        assert default_workers(torch.device("cuda")) == 7


# ---- GPUs


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], list[torch.device]]:
    """Give this process so many GPUs; returns the list of those that were made current."""

    def make(count: int) -> list[torch.device]:
        made_current: list[torch.device] = []
        monkeypatch.setattr("torch.cuda.is_available", lambda: count > 0)
        monkeypatch.setattr("torch.cuda.device_count", lambda: count)
        monkeypatch.setattr("torch.cuda.set_device", made_current.append)
        return made_current

    return make


@pytest.mark.parametrize("name", ["auto", "cuda"])
@pytest.mark.parametrize(("count", "index"), [(8, 5), (4, 1), (1, 0)])
def test_processes_take_turns_with_the_gpus_that_they_see(
    gpus: Callable[[int], list[torch.device]], name: str, count: int, index: int
) -> None:
    made_current = gpus(count)
    with sharing_machine(Share(5, 8)):
        assert pick_device(name) == torch.device("cuda", index)
    assert made_current == [torch.device("cuda", index)]


def test_a_gpu_that_is_named_is_taken_and_made_current(
    gpus: Callable[[int], list[torch.device]],
) -> None:
    made_current = gpus(4)
    with sharing_machine(Share(1, 8)):
        assert pick_device("cuda:3") == torch.device("cuda:3")
    assert made_current == [torch.device("cuda:3")]
    assert pick_device("cpu") == CPU
    with pytest.raises(DeviceError, match=r"'cuda:4' is not available: torch finds cuda:0 to"):
        pick_device("cuda:4")


def test_processes_on_one_gpu_share_its_memory(
    gpus: Callable[[int], list[torch.device]], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus(2)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (12 * GB, 16 * GB))
    with sharing_machine(Share(0, 2)):
        assert free_memory_on(torch.device("cuda:0")) == 12 * GB
    with sharing_machine(Share(0, 5)):
        assert free_memory_on(torch.device("cuda:0")) == 4 * GB


@pytest.mark.parametrize("told", ["by torchrun", "by options"])
def test_each_rank_of_a_pass_takes_its_own_gpu(
    small_teacher: Callable[..., TeacherConfig],
    gpus: Callable[[int], list[torch.device]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    told: str,
) -> None:
    gpus(4)
    devices = []
    monkeypatch.setattr(
        "teach_once.precompute.run_pass.fill_cache", lambda _, options, __: devices.append(options)
    )
    weights = small_teacher().teacher.weights
    call = ["digits-resnet20", "teacher.arch=resnet8", f"teacher.weights={weights}"]
    call += ["--caches", str(tmp_path), "--job", "j", "--rank", "6", "--world-size", "8"]
    if told == "by torchrun":  # on the second of two machines
        monkeypatch.setenv("LOCAL_RANK", "2")
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert precompute(call) == 0
    assert [str(options.device) for options in devices] == ["cuda:2"]


@pytest.mark.parametrize("device", ["cuda", "cuda:1", "gpu"])
def test_a_device_that_is_missing_is_an_error_before_anything_starts(
    make_study: Callable[..., Study],
    gpus: Callable[[int], list[torch.device]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    device: str,
) -> None:
    gpus(0)
    study = make_study()
    call = ["digits-resnet8", "--caches", str(tmp_path / "caches"), "--runs", str(tmp_path / "r")]
    call += ["--device", device, "teacher.teacher.arch=resnet8", "teacher.dataset.max_per_class=6"]
    call += [f"teacher.teacher.weights={study.teacher.teacher.weights}", "teacher.views.count=3"]
    for command in (["student", "--method", "kd"], ["ablation", "--methods", "kd"]):
        assert train([*command[:1], *call, *command[1:]]) == 2
        told = capsys.readouterr().err
        assert told.startswith(f"error: device {device!r} is ")
        assert "with make: DEVICE=" in told
    assert not (tmp_path / "r").exists()


# ---- several jobs


def test_jobs_are_as_many_as_their_views_fit_into_memory(
    make_study: Callable[..., Study], monkeypatch: pytest.MonkeyPatch, console
) -> None:
    study = make_study()
    two_views = 2 * study.cache.nbytes // study.num_views
    memory = 2 * (3 * two_views)  # half of it may be taken: room for three
    monkeypatch.setattr("teach_once.train.outputs.shuffle_buffer.total_memory", lambda: memory)
    assert study.run("cd+gkd", 0).window_rows is None  # which reads all taps
    runs = [study.run("ce", 0), study.run("cd+gkd", 0)]
    assert [jobs_that_fit(jobs, [run.held_bytes for run in runs]) for jobs in (1, 3, 8)] == [
        1,
        3,
        3,
    ]
    monkeypatch.setattr("teach_once.train.outputs.shuffle_buffer.total_memory", lambda: memory // 3)
    run_ablation(runs[1:], Compute("cpu"), Recording(console=console), jobs=2)
    assert "1 of 2 jobs in parallel: no memory for more" in console.file.getvalue()


# ---- images


def photographs_of(count: int, size: int) -> Split:
    """Random images that are made when they are read, so that none of them is held."""

    def image(sample: int) -> np.ndarray:
        return np.full((size, size, 3), sample % 251, dtype=np.uint8)

    def digests(ids: np.ndarray) -> np.ndarray:
        return stack_digests(int(sample).to_bytes(16, "little") for sample in ids)

    def read_each(ids: np.ndarray) -> Iterator[tuple[np.ndarray, bytes]]:
        return ((image(int(sample)), int(sample).to_bytes(16, "little")) for sample in ids)

    def load(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return np.stack([image(int(sample)) for sample in ids]), digests(ids)

    return Split(np.arange(count), load, read_each, digests, str)


def test_test_images_are_held_once() -> None:
    split, size = photographs_of(1500, 96), 1500 * 80 * 80 * 3
    views = ViewsConfig(
        augment=CenterCrop(), evaluation=CenterCrop(resize_px=88, crop_px=80), count=1
    )
    rgb = Normalization(mean=(0.5,) * 3, std=(0.25,) * 3)
    tracemalloc.start()
    pixels = evaluation_pixels(split, views, rgb, CPU, 0)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert pixels.where == "on the device"
    assert peak < 0.5 * size  # beside what the device holds, which is not traced


def test_images_in_memory_are_not_copied_to_be_shown() -> None:
    images = np.zeros((50, 8, 8, 1), dtype=np.uint8)
    split = array_split(images, np.zeros(50, dtype=np.int64), "some")
    assert np.shares_memory(split.images, images)
    assert not np.shares_memory(split.read_some(np.arange(10)), images)
