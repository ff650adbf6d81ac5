"""python -m benchmarks ablation [--shape cifar-56-20] [--epochs 4] [--device cuda]

A whole ablation of five methods: from the cache, its making included, and with the live teacher.
How many runs it takes until the cache has paid for itself, and how long a cached run waits for its
feed.
"""

from __future__ import annotations

import dataclasses
import io
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.harness import Verdict, machine, markdown, parser_of, publish
from benchmarks.synthetic.studies import SHAPES, setup_of
from teach_once.precompute.compute.teacher_pass import PassOptions
from teach_once.precompute.run_pass import fill_cache
from teach_once.runtime.machine.devices import pick_device
from teach_once.train.engine.epoch_result import EpochResult
from teach_once.train.runs.study import Study
from teach_once.train.sessions.student import train_student

METHODS = ("ce", "kd", "cd", "cd+gkd", "cd+gkd+edt")


def main(arguments: list[str]) -> int:
    parser = parser_of("ablation", __doc__)
    parser.add_argument("--shape", default="cifar-56-20")
    parser.add_argument("--epochs", type=int, default=4)
    options = parser.parse_args(arguments)
    device = pick_device(options.device)
    overrides = [f"training.epochs={options.epochs}", "training.schedule={kind: onecycle}"]
    overrides += [f"methods.cd+gkd+edt.{term}.start_epoch=2" for term in (0, 1)]
    seconds: dict[str, dict[str, float]] = {"cached": {}, "live": {}}
    epochs: list[EpochResult] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shape = dataclasses.replace(SHAPES[options.shape], num_views=options.epochs)
        setup, student = setup_of(shape, folder, overrides)
        started = time.perf_counter()
        cache = fill_cache(setup, PassOptions(device), Console(file=io.StringIO()))
        building = time.perf_counter() - started
        assert cache is not None
        study = Study(student, setup.config, setup.dataset, cache, folder / "runs")
        seeds = {"cached": 0, "live": 1}  # ce has no teacher: its seed keeps its runs apart
        for method in METHODS:  # in turn, so that a slow hour falls on both
            for kind in ("cached", "live"):
                started = time.perf_counter()
                train_student(
                    study.run(method, seeds[kind], kind == "live" and method != "ce"),
                    device=str(device),
                    on_epoch=epochs.append if kind == "cached" else None,
                )
                seconds[kind][method] = time.perf_counter() - started
    cached_seconds = building + sum(seconds["cached"].values())
    live_seconds = sum(seconds["live"].values())
    taught = [method for method in METHODS if method != "ce"]
    saved = sum(seconds["live"][m] - seconds["cached"][m] for m in taught) / len(taught)
    verdicts = [
        Verdict(
            "waiting for the feed, epoch 2 on (share of the time)",
            _share_of_waiting(epochs),
            "≤ 0.01",
            lambda x: x <= 0.01,
        ),
        Verdict(
            "ablation: five runs live ÷ cache and five cached runs", live_seconds / cached_seconds
        ),
        Verdict("taught runs until the cache has paid for itself", building / max(saved, 1e-9)),
    ]
    text = (
        f"`python -m benchmarks ablation {' '.join(arguments)}` on {machine()}, torch "
        f"{torch.__version__}, {device}: {options.shape}, {shape.num_train:,} images, "
        f"{options.epochs} epochs with a fresh view each; one run per row.\n\n"
        f"{_table(seconds, building)}"
    )
    publish(options, "An ablation of five methods", text, verdicts)
    return 0


def _share_of_waiting(epochs: Sequence[EpochResult]) -> float:
    """The feed's, of the time of all epochs but the first, which reads ahead for nobody."""
    later = [epoch for epoch in epochs if epoch.epoch > 1]
    waited = sum(epoch.wait_seconds for epoch in later)
    return waited / (waited + sum(epoch.train_seconds for epoch in later))


def _table(seconds: Mapping[str, Mapping[str, float]], building: float) -> str:
    """seconds: "cached" and "live" -> method -> seconds of its run. building: of the cache."""
    cached, live = seconds["cached"], seconds["live"]
    rows = [[method, f"{cached[method]:.1f}", f"{live[method]:.1f}"] for method in METHODS]
    rows.append(["making the cache", f"{building:.1f}", ""])
    in_all = building + sum(cached.values())
    rows.append(["in all", f"{in_all:.1f}", f"{sum(live.values()):.1f}"])
    return markdown(["seconds", "from the cache", "teacher in the loop"], rows)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
