"""python -m benchmarks ranks [--ranks 2] [--shapes "digits cifar-56-20"] [--device cuda]

One student trained by several processes, next to one process: what a step takes, how much of that
is exchange, what each process keeps in memory and reads of the cache. On GPUs each process has one.

python -m runtime.launch 2 -m benchmarks.targets.ranks FOLDER [...] is what each process runs.
Steps of all rows take turns in one group of processes. The rows: see `ROWS`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from benchmarks.harness import ROUNDS, Findings, Timing, Verdict, interleaved, markdown
from benchmarks.synthetic.caches import fill_with_noise
from benchmarks.synthetic.studies import (
    SHAPES,
    Shape,
    configs_of,
    dataset_of,
    endless_steps,
    setup_of,
    steps_of_epoch,
    study_of,
)
from benchmarks.targets.start import ROOT
from teach_once.runtime.command.frame import end_process
from teach_once.runtime.machine.devices import pick_device
from teach_once.store import TeacherCache
from teach_once.train.engine.ranks import ALONE, Ranks, init_process_group
from teach_once.train.engine.step import TrainContext
from teach_once.train.engine.train_state import capture_maps
from teach_once.train.outputs.cached_teacher import view_bytes
from teach_once.train.runs.study import Study
from teach_once.train.runs.teachers import StudyTeacher
from teach_once.train.sessions.student import open_context

TITLE = "One student on several processes"
METHOD = "cd+gkd"
ROWS = {
    "share alone": "one process, its share of the batch, the others idle",
    "share": "every process its share of the batch, nothing exchanged",
    "local": "together, `batch_norm: local`",
    "sync": "together, `batch_norm: sync`",
}
_DEADLINE_SECONDS = 600.0
_CLASSES_OF_MEMORY = 1000
_BLOCK_ROWS = 4096  # of records that size; the last block of a view is read whole as well
_QUIET_SECONDS = 0.3  # without a byte read, after which all is read
Found = dict[str, Any]  # as JSON between processes


def measure(
    device: str = "auto",
    ranks: int = 2,
    shapes: str = "digits cifar-56-20",
    rounds: int = 15,
    steps: int = 4,
    slab_mb: int = 200,
) -> Findings:
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
    return Findings(text, verdicts)


def measured_by(world: int, device: torch.device, folder: Path, *words: str) -> list[Found]:
    """Run this module with these words in `world` processes; return what each found."""
    launcher = ["runtime.launch", str(world), "-m"] if world > 1 else []
    program = ["benchmarks.targets.ranks", str(folder), "--device", device.type]
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


def open_made_study(shape: Shape, folder: Path, *overrides: str) -> Study:
    """The study in `folder`, whose cache exists; each process opens it by itself."""
    student, teacher = configs_of(shape, folder, overrides)
    cache = TeacherCache.open(next((folder / "caches").glob("*-*")))
    return Study(
        student, (StudyTeacher(teacher, cache),), dataset_of(shape, teacher), folder / "runs"
    )


def step_seconds(
    shape: Shape, folder: Path, device: torch.device, ranks: Ranks, rounds: int, num_steps: int
) -> Found:
    """Seconds of a step, by row and round, until the last rank has taken it."""
    study = open_made_study(shape, folder)
    whole = study.config.training

    def context_steps(
        batch_size: int, who: Ranks, batch_norm: Literal["sync", "local"] = "sync"
    ) -> Iterator[None]:
        training = replace(whole, batch_size=batch_size, batch_norm=batch_norm)
        run = replace(study, config=replace(study.config, training=training)).run(METHOD, 0)
        return endless_steps(open_context(run, device, ranks=who))

    share = context_steps(whole.batch_size // ranks.world, ALONE)

    def row(steps: Iterator[None], only_first: bool = False) -> Callable[[], float]:
        """only_first: the other ranks wait, which takes no processor."""
        count = 0 if only_first and not ranks.is_first else num_steps

        def timed() -> float:
            _rendezvous(device, ranks)
            started = time.perf_counter()
            for _ in range(count):
                next(steps)
            _rendezvous(device, ranks)
            return (time.perf_counter() - started) / num_steps

        return timed

    rows = {
        "share alone": row(share, only_first=True),
        "share": row(share),
        "local": row(context_steps(whole.batch_size, ranks, "local")),
        "sync": row(context_steps(whole.batch_size, ranks)),
    }
    return {"steps": {name: t.seconds for name, t in interleaved(rows, rounds).items()}}


def _rendezvous(device: torch.device, ranks: Ranks) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    ranks.barrier()


def memory_shape(slab_mb: int) -> Shape:
    """Digits of a thousand classes, whose logits fill a view's slab."""
    blocks = max(1, slab_mb * 10**6 // (4 * _CLASSES_OF_MEMORY * _BLOCK_ROWS))
    return replace(SHAPES["digits"], num_train=blocks * _BLOCK_ROWS, classes=_CLASSES_OF_MEMORY)


def make_memory_study(slab_mb: int, folder: Path) -> None:
    """The study of `memory_shape`, with made-up records in its cache."""
    setup, _ = setup_of(memory_shape(slab_mb), folder)
    fill_with_noise(setup, setup.dataset.train.read_checksums)


def memory_of_rank(slab_mb: int, folder: Path, device: torch.device, ranks: Ranks) -> Found:
    """What a rank keeps and reads for the teacher's outputs of two epochs of a view each.

    held: bytes of memory that no file backs, shared pages divided among the processes that share
    them. read: bytes for each view that was read. slab: the bytes of a view.
    """
    study = open_made_study(memory_shape(slab_mb), folder, "training.batch_size=64")
    _train_a_little(open_context(study.run("ce", 0), device, ranks=ranks), epochs=1)
    before, read_before = _memory(), _bytes_read()
    run = study.run("kd", 0)
    context = open_context(run, device, ranks=ranks)
    _train_a_little(context, epochs=2)
    read = -1
    while (now := _bytes_read()) - read > 10**5:  # more is read ahead in the background
        read = now
        time.sleep(_QUIET_SECONDS)
    found = {
        "held": float(_memory() - before),
        "read": (_bytes_read() - read_before) / 3,  # of the two epochs and, ahead, of the third
        "slab": float(view_bytes(study.cache, run.needed_taps)),
    }
    ranks.barrier()
    context.teacher.close()
    return found


def _train_a_little(context: TrainContext, epochs: int) -> None:
    context.train_state.train()
    with capture_maps(context.train_state, context.data.train, context.run.training.batch_size):
        for epoch in range(1, epochs + 1):
            for _ in itertools.islice(steps_of_epoch(context, epoch), 3):
                pass


def _memory() -> int:
    """Bytes of memory that no file backs: the process's own, and its part of what it shares."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
    sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}
    return sizes["Pss_Anon"] + sizes["Pss_Shmem"]


def _bytes_read() -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("rchar"))


def main(arguments: list[str]) -> int:
    """What each process runs: write what it finds to a file in the folder."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--shape")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--slab-mb", type=int, default=200)
    options = parser.parse_args(arguments)
    with init_process_group(options.device) as ranks:
        where = options.folder, pick_device(options.device), ranks
        if options.shape:
            found = step_seconds(SHAPES[options.shape], *where, options.rounds, options.steps)
        else:
            found = memory_of_rank(options.slab_mb, *where)
        (options.folder / f"found-{ranks.rank}.json").write_text(json.dumps(found))
    return 0


if __name__ == "__main__":
    end_process(main(sys.argv[1:]))
