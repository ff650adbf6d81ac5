"""Every method with every seed from one cache; what is finished already is not trained again."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from rich.console import Console

from train.run import train_student
from train.study import Study


def run_ablation(
    study: Study,
    methods: Sequence[str],
    seeds: Sequence[int],
    device: str,
    num_workers: int | None,
    console: Console,
) -> list[dict[str, Any]]:
    """Train what is missing; returns the summaries, method by method. The teacher is not loaded."""
    runs = [(method, seed) for method in methods for seed in seeds]
    started = time.perf_counter()
    summaries = []
    for number, (method, seed) in enumerate(runs, start=1):
        summaries.append(train_student(study, method, seed, device=device, num_workers=num_workers))
        elapsed = time.perf_counter() - started
        left = elapsed / number * (len(runs) - number)
        error = summaries[-1]["last"]["top1_error"]
        console.print(
            f"run {number:3d}/{len(runs)}  {method:<12} seed {seed}  top-1 error {error:6.2f} %  "
            f"ETA {left:4.0f} s"
        )
    return summaries
