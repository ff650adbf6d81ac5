"""One student trained by several processes, compared with one process.

Measures the time of a step and its communication, and each process's memory and reads of the cache.
Each process has a GPU of its own, if there are any. Steps of all rows (`ROWS`) alternate in one
group of processes, which run this module.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from benchmarks.harness import (
    ROUNDS,
    Findings,
    Timing,
    Verdict,
    drain,
    interleaved,
    markdown,
    table_of,
    timed,
)
from benchmarks.synthetic.caches import fill_with_noise
from benchmarks.synthetic.studies import (
    SHAPES,
    Shape,
    StudyFiles,
    endless_steps,
    steps_of_epoch,
    study_of,
    write_shape,
)
from teach_once.runtime.command.frame import end_process
from teach_once.runtime.launch import launch
from teach_once.runtime.machine.devices import pick_device
from teach_once.train.engine.ranks import ALONE, Ranks, init_process_group
from teach_once.train.engine.step import TrainContext
from teach_once.train.engine.train_state import capture_maps
from teach_once.train.outputs.cached_teacher import view_bytes
from teach_once.train.sessions.student import open_context

TITLE = "One student on several processes"
METHOD = "cd+gkd"
ROWS = {
    "share alone": "one process, its slice of the batch, the others idle",
    "share": "every process its slice of the batch, no communication",
    "local": "together, `batch_norm: local`",
    "sync": "together, `batch_norm: sync`",
}
_CLASSES_OF_MEMORY = 1000
_BLOCK_ROWS = 4096  # of such records; a view consists of whole blocks
_QUIET_SECONDS = 0.3  # without a read: prefetching has finished
Found = dict[str, Any]  # as JSON between processes


def measure(
    device: str = "auto",
    ranks: int = 2,
    shapes: str = "digits cifar-56-20",
    rounds: int = 15,
    steps: int = 4,
    slab_mb: int = 200,
) -> Findings:
    """Time all rows. steps: steps per row and round. slab_mb: MB per view of teacher outputs."""
    where, load = pick_device(device), os.getloadavg()[0]
    found = dict[str, dict[str, Timing]]()
    for name in shapes.split():
        with tempfile.TemporaryDirectory() as folder:
            study_of(SHAPES[name], Path(folder), where)
            first, *_ = measured_by(ranks, where, Path(folder), step_seconds, rounds, steps)
            found[name] = {row: Timing(tuple(seconds)) for row, seconds in first.items()}
    with tempfile.TemporaryDirectory() as folder:
        blocks = max(1, slab_mb * 10**6 // (4 * _CLASSES_OF_MEMORY * _BLOCK_ROWS))
        shape = Shape("digits-resnet8", blocks * _BLOCK_ROWS, classes=_CLASSES_OF_MEMORY)
        setup = write_shape(shape, Path(folder), ["training.batch_size=64"]).setup()
        fill_with_noise(setup, setup.dataset.train.read_digests)
        memory = [measured_by(world, where, Path(folder), memory_of_rank) for world in (1, ranks)]
    slab = memory[0][0]["slab"]
    memory_rows = [
        [
            str(len(world)),
            *(", ".join(f"{each[what] / 1e6:,.0f}" for each in world) for what in ("kept", "read")),
            f"{sum(each['kept'] for each in world) / slab:.2f}",
        ]
        for world in memory
    ]
    header = ["processes", "kept by each, MB", "read by each, MB a view", "kept by all, views"]
    text = (
        f", {ranks} processes on {where}, load average before it {load:.1f}: {METHOD}, batches of "
        f"the shapes' configs, split into {ranks} slices. Medians of rounds of {steps} steps that "
        f"take turns, until the last process is done, {ROUNDS}.\n\n"
        f"{table_of('a step', ROWS, found, lambda t: t.format_ms(calls=steps))}\n"
        f"A view of {slab / 1e6:,.0f} MB of logits, of which two are kept; memory "
        f"without a file, shared pages divided among the processes that share them.\n\n"
        f"{markdown(header, memory_rows)}"
    )
    # Without targets: they depend on the machine's memory bus and cores, not on this project.
    pairs = {"together": "sync", "together with local batch norm": "local"}
    verdicts = [
        Verdict(f"{name}: {what} ÷ the same, no communication", rows[row].ratio_to(rows["share"]))
        for name, rows in found.items()
        for what, row in pairs.items()
    ]
    return Findings(text, verdicts)


def measured_by(
    world: int, device: torch.device, folder: Path, question: Callable[..., Found], *words: object
) -> list[Found]:
    """Call a function of this module in `world` processes; return the result of each."""
    asked = [str(folder), device.type, question.__name__, json.dumps(words)]
    threads = str(max(1, (os.cpu_count() or 1) // world))
    variables = {"OMP_NUM_THREADS": threads, "TORCH_CPP_LOG_LEVEL": "ERROR"}
    command = [sys.executable, "-m", "benchmarks.targets.ranks", *asked]
    if status := launch(world, command, variables):
        raise SystemExit(status)
    return [json.loads((folder / f"found-{rank}.json").read_text()) for rank in range(world)]


def step_seconds(
    folder: Path, device: torch.device, ranks: Ranks, rounds: int, num_steps: int
) -> Found:
    """Time `num_steps` steps by row and round, until the last rank has finished them."""
    study = StudyFiles(folder).study()
    whole = study.config.training

    def steps(
        batch_size: int, who: Ranks, batch_norm: Literal["sync", "local"] = "sync"
    ) -> Iterator[None]:
        training = replace(whole, batch_size=batch_size, batch_norm=batch_norm)
        run = replace(study, config=replace(study.config, training=training)).run(METHOD, 0)
        return endless_steps(open_context(run, device, ranks=who))

    def row(steps: Iterator[None], count: int = num_steps) -> Callable[[], float]:
        return timed(drain(lambda: itertools.islice(steps, count)), device, ranks.barrier)

    own = steps(whole.batch_size // ranks.world, ALONE)
    rows = {
        "share alone": row(own, num_steps if ranks.is_first else 0),  # the others only wait
        "share": row(own),
        "local": row(steps(whole.batch_size, ranks, "local")),
        "sync": row(steps(whole.batch_size, ranks)),
    }
    return {name: timing.seconds for name, timing in interleaved(rows, rounds).items()}


def memory_of_rank(folder: Path, device: torch.device, ranks: Ranks) -> Found:
    """Measure the memory and reads of a rank for teacher outputs, over two epochs of a view each.

    kept: bytes of memory without a file, shared pages divided among the processes that share
    them. read: bytes per view. slab: the bytes of a view.
    """
    study = StudyFiles(folder).study()
    _train_a_little(open_context(study.run("ce", 0), device, ranks=ranks), epochs=1)
    before, read_before = _memory_and_read()
    run = study.run("kd", 0)
    context = open_context(run, device, ranks=ranks)
    _train_a_little(context, epochs=2)
    last = -(10**6)
    while (now := _memory_and_read())[1] - last > 10**5:  # prefetching continues in the background
        last = now[1]
        time.sleep(_QUIET_SECONDS)
    found = {
        "kept": now[0] - before,
        "read": (now[1] - read_before) / 3,  # two epochs, and the third is prefetched
        "slab": view_bytes(study.cache, run.needed_taps),
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


def _memory_and_read() -> tuple[int, int]:
    """Return bytes of memory without a file (PSS: shared pages count in part), and bytes read."""
    text = Path("/proc/self/smaps_rollup").read_text() + Path("/proc/self/io").read_text()
    fields = dict(re.findall(r"^(\w+): +(\d+)", text, re.MULTILINE))
    return 1024 * (int(fields["Pss_Anon"]) + int(fields["Pss_Shmem"])), int(fields["rchar"])


def main() -> int:
    """Run in each process: write its results to a file in the folder."""
    folder, device, question, words = sys.argv[1:]
    ask = {each.__name__: each for each in (step_seconds, memory_of_rank)}[question]
    with init_process_group(device) as ranks:
        found = ask(Path(folder), pick_device(device), ranks, *json.loads(words))
        Path(folder, f"found-{ranks.rank}.json").write_text(json.dumps(found))
    return 0


if __name__ == "__main__":
    end_process(main())
