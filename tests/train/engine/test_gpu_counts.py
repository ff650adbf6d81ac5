"""Number of visible GPUs and their free memory, tested without a GPU."""

from __future__ import annotations

import pytest
import torch

from teach_once.train.engine.ranks import _require_own_gpus
from teach_once.train.errors import TrainError
from teach_once.views.pixels.resident import free_memory


@pytest.fixture
def one_gpu(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Eight processes on this machine, each of which sees one GPU."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name in ("SLURM_PROCID", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    return monkeypatch


def test_srun_with_one_visible_gpu_per_task_is_accepted(one_gpu: pytest.MonkeyPatch) -> None:
    one_gpu.setenv("SLURM_PROCID", "3")
    one_gpu.setenv("CUDA_VISIBLE_DEVICES", "3")
    _require_own_gpus("auto")


@pytest.mark.parametrize(
    "environment",
    [{}, {"SLURM_PROCID": "3"}, {"CUDA_VISIBLE_DEVICES": "0"}],
)
def test_processes_that_share_a_gpu_are_refused(
    one_gpu: pytest.MonkeyPatch, environment: dict[str, str]
) -> None:
    for name, value in environment.items():
        one_gpu.setenv(name, value)
    with pytest.raises(TrainError, match="8 processes of this machine need a GPU each"):
        _require_own_gpus("auto")


def test_memory_that_torch_keeps_for_later_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (1_000, 9_000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 700)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 200)
    assert free_memory(torch.device("cuda")) == 1_500
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert free_memory(torch.device("cuda")) == 1_000
