"""python -m benchmarks ranks [--ranks 2] [--shapes "digits cifar-56-20"] [--device cuda]

One student trained by several processes, next to one process: what a step takes, how much of that
is exchange, what each process keeps in memory and reads of the cache. On GPUs each process has one.

Steps of all rows take turns in one group of processes. The rows: see `ROWS`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from benchmarks.harness import ROUNDS, Report, Timing, Verdict, markdown
from benchmarks.synthetic.studies import SHAPES, study_of
from benchmarks.targets.rank_measures import METHOD, Found, make_memory_study
from benchmarks.targets.start import ROOT
from teach_once.runtime.machine.devices import pick_device

TITLE = "One student on several processes"
ROWS = {
    "share alone": "one process, its share of the batch, the others idle",
    "share": "every process its share of the batch, nothing exchanged",
    "local": "together, `batch_norm: local`",
    "sync": "together, `batch_norm: sync`",
}
_DEADLINE_SECONDS = 600.0


def measure(
    device: str = "auto",
    ranks: int = 2,
    shapes: str = "digits cifar-56-20",
    rounds: int = 15,
    steps: int = 4,
    slab_mb: int = 200,
) -> Report:
    """ranks: processes. steps: of each row in a round. slab_mb: of a view of teacher outputs."""
    where, load = pick_device(device), os.getloadavg()[0]
    found = {name: steps_of(name, ranks, where, rounds, steps) for name in shapes.split()}
    memory = memory_of([1, ranks], where, slab_mb)
    step_table = markdown(
        ["a step", *found],
        [[label, *(t[row].format_ms() for t in found.values())] for row, label in ROWS.items()],
    )
    text = (
        f", {ranks} processes on {where}, load average before it {load:.1f}: {METHOD}, batches of "
        f"the shapes' configs, cut into {ranks} shares. Medians of rounds of {steps} steps that "
        f"take turns, until the last process is done, {ROUNDS}.\n\n{step_table}\n"
        f"A view of {memory[1][0]['slab'] / 1e6:,.0f} MB of logits, of which two are kept; memory "
        f"that no file backs, shared pages divided among the processes that share them.\n\n"
        f"{memory_table(memory)}"
    )
    # Without targets: a shared memory bus and its processors decide them, not this project.
    pairs = {"together": "sync", "together with local batch norm": "local"}
    verdicts = [
        Verdict(f"{name}: {what} ÷ the same without exchange", rows[row].ratio_to(rows["share"]))
        for name, rows in found.items()
        for what, row in pairs.items()
    ]
    return Report(text, verdicts)


def measured_by(world: int, device: torch.device, folder: Path, *words: str) -> list[Found]:
    """Run `rank_measures` with these words in `world` processes; return what each found."""
    launcher = ["runtime.launch", str(world), "-m"] if world > 1 else []
    program = ["benchmarks.targets.rank_measures", str(folder), "--device", device.type]
    threads = max(1, (os.cpu_count() or 1) // world)
    subprocess.run(
        [sys.executable, "-m", *launcher, *program, *words],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": str(threads), "TORCH_CPP_LOG_LEVEL": "ERROR"},
        check=True,
        timeout=_DEADLINE_SECONDS,
    )
    return [json.loads((folder / f"found-{rank}.json").read_text()) for rank in range(world)]


def steps_of(
    shape: str, world: int, device: torch.device, rounds: int, num_steps: int
) -> dict[str, Timing]:
    """Seconds of a step by row, as the first rank measured them."""
    with tempfile.TemporaryDirectory() as name:
        study_of(SHAPES[shape], Path(name), device)
        words = ["--shape", shape, "--rounds", str(rounds), "--steps", str(num_steps)]
        found = measured_by(world, device, Path(name), *words)[0]
    return {row: Timing(tuple(seconds)) for row, seconds in found["steps"].items()}


def memory_of(worlds: Sequence[int], device: torch.device, slab_mb: int) -> dict[int, list[Found]]:
    """What each rank keeps and reads, by the number of ranks."""
    with tempfile.TemporaryDirectory() as name:
        make_memory_study(slab_mb, Path(name))
        words = ["--slab-mb", str(slab_mb)]
        return {world: measured_by(world, device, Path(name), *words) for world in worlds}


def memory_table(found: Mapping[int, Sequence[Found]]) -> str:
    rows = [
        [
            str(world),
            *(", ".join(f"{each[what] / 1e6:,.0f}" for each in ranks) for what in ("held", "read")),
            f"{sum(each['held'] for each in ranks) / ranks[0]['slab']:.2f}",
        ]
        for world, ranks in found.items()
    ]
    header = ["processes", "held by each, MB", "read by each, MB a view", "all held, views"]
    return markdown(header, rows)
