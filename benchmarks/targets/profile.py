"""python -m benchmarks profile [--shape cifar-56-20] [--steps 20] [--method cd+gkd] [--device cuda]

Where the time of a cached training step goes: the top operators of torch's profiler as a table.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from torch.profiler import ProfilerActivity, profile

from benchmarks.harness import Report, markdown
from benchmarks.synthetic.studies import SHAPES, endless_steps, study_of
from teach_once.runtime.machine.devices import pick_device
from teach_once.train.sessions.student import open_context

TITLE = ""  # docs/performance.md shows it


def measure(
    device: str = "auto",
    shape: str = "cifar-56-20",
    method: str = "cd+gkd",
    steps: int = 20,
    top: int = 15,
) -> Report:
    where, activities = pick_device(device), [ProfilerActivity.CPU]
    if where.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with tempfile.TemporaryDirectory() as folder:
        study = study_of(SHAPES[shape], Path(folder), where)
        endless = endless_steps(open_context(study.run(method, 0), where))
        for _ in range(3):
            next(endless)
        with profile(activities=activities) as found:
            for _ in range(steps):
                next(endless)
    events = sorted(found.key_averages(), key=_self_time, reverse=True)
    total = sum(map(_self_time, events))
    rows = [
        [each.key, f"{us / 1e3 / steps:.2f}", f"{us / total:.1%}", f"{each.count / steps:.0f}"]
        for each in events[:top]
        for us in [_self_time(each)]
    ]
    table = markdown(["operator", "ms per step", "share", "calls per step"], rows)
    return Report(f", {where}: {shape}, {method}\n\n{table}")


def _self_time(event: object) -> float:
    """Microseconds in the operator itself, on the GPU if it ran there."""
    on_device = getattr(event, "self_device_time_total", 0)
    return float(on_device or getattr(event, "self_cpu_time_total", 0))
