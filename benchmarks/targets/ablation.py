"""Time an ablation of five methods: from the cache, its pass included, and with the live teacher.

Reports the number of runs after which the cache has paid for itself, and how long a cached run
waits for teacher outputs.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import replace
from pathlib import Path

from benchmarks.harness import Findings, Verdict, markdown
from benchmarks.synthetic.studies import SHAPES, make_cache, write_shape
from teach_once.precompute.compute.teacher_pass import PassOptions
from teach_once.runtime.machine.devices import pick_device
from teach_once.train.engine.epoch_result import EpochResult
from teach_once.train.sessions.student import train_student

TITLE = "An ablation of five methods"
METHODS = ("ce", "kd", "cd", "cd+gkd", "cd+gkd+edt")


def measure(device: str = "auto", shape: str = "cifar-56-20", epochs: int = 4) -> Findings:
    where = pick_device(device)
    overrides = [f"training.epochs={epochs}", "training.schedule={type: onecycle}"]
    overrides += [f"methods.cd+gkd+edt.{term}.start_epoch=2" for term in (0, 1)]
    cached, live, results = dict[str, float](), dict[str, float](), list[EpochResult]()
    with tempfile.TemporaryDirectory() as name:
        images = replace(SHAPES[shape], num_views=epochs)
        files = write_shape(images, Path(name), overrides)
        started = time.perf_counter()
        make_cache(files.setup(), PassOptions(where))
        building = time.perf_counter() - started
        study = files.study()
        for method in METHODS:  # cached and live alternate, so that a slow hour affects both
            for seed, seconds in enumerate((cached, live)):  # the seed keeps the runs of ce apart
                run = study.run(method, seed, seconds is live and method != "ce")
                on_epoch = results.append if seconds is cached else None
                started = time.perf_counter()
                train_student(run, device=str(where), on_epoch=on_epoch)
                seconds[method] = time.perf_counter() - started
    from_cache, in_loop = building + sum(cached.values()), sum(live.values())
    saved = (in_loop - live["ce"] - sum(cached.values()) + cached["ce"]) / len(METHODS[1:])
    rows = [[method, f"{cached[method]:.1f}", f"{live[method]:.1f}"] for method in METHODS]
    rows.append(["the teacher's pass", f"{building:.1f}", ""])
    rows.append(["total", f"{from_cache:.1f}", f"{in_loop:.1f}"])
    text = f", {where}: {shape}, {images.num_train:,} images, {epochs} epochs with a fresh view"
    table = markdown(["seconds", "from the cache", "teacher in the loop"], rows)
    # Without the first epoch of a run, for which nothing was prefetched.
    later = [epoch for epoch in results if epoch.epoch > 1]
    waited = sum(epoch.wait_seconds for epoch in later)
    fraction = waited / (waited + sum(epoch.train_seconds for epoch in later))
    verdicts = [
        Verdict(
            "waiting for teacher outputs, epoch 2 on (fraction of time)", fraction, at_most=0.01
        ),
        Verdict("ablation: five runs live ÷ cache and five cached runs", in_loop / from_cache),
        Verdict("distilled runs until the cache has paid for itself", building / max(saved, 1e-9)),
    ]
    return Findings(f"{text} each; one run per row.\n\n{table}", verdicts)
