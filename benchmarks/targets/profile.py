"""python -m benchmarks profile [--shape cifar-56-20] [--steps 20] [--method cd+gkd] [--device cuda]

Where the time of a cached training step goes: torch's profiler, the top operators as a table.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.harness import machine, markdown
from benchmarks.synthetic.studies import SHAPES, steps, study_of
from teach_once.runtime.machine.devices import pick_device
from teach_once.train.sessions.student import open_context


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="cifar-56-20")
    parser.add_argument("--method", default="cd+gkd")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--top", type=int, default=15)
    parser.add_argument("--device", default="auto")
    options = parser.parse_args(arguments)
    device = pick_device(options.device)
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with tempfile.TemporaryDirectory() as folder:
        study = study_of(SHAPES[options.shape], Path(folder), device)
        endless = steps(open_context(study.run(options.method, 0), device))
        for _ in range(3):
            next(endless)
        with profile(activities=activities) as found:
            for _ in range(options.steps):
                next(endless)
    events = sorted(found.key_averages(), key=_self_time, reverse=True)
    total = sum(map(_self_time, events))
    rows = [
        [
            event.key,
            f"{_self_time(event) / 1e3 / options.steps:.2f}",
            f"{_self_time(event) / total:.1%}",
            f"{event.count / options.steps:.0f}",
        ]
        for event in events[: options.top]
    ]
    print(f"{options.shape}, {options.method}, {machine()}, torch {torch.__version__}, {device}\n")
    print(markdown(["operator", "ms per step", "share", "calls per step"], rows))
    return 0


def _self_time(event: object) -> float:
    """Microseconds in the operator itself, on the GPU where it ran there."""
    on_device = getattr(event, "self_device_time_total", 0)
    return float(on_device or getattr(event, "self_cpu_time_total", 0))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
