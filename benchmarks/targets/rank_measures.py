"""What each of the processes measures that train one student: `ranks` starts them.

python -m runtime.launch 2 -m benchmarks.targets.rank_measures steps|memory FOLDER [...]
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from benchmarks.harness import interleaved
from benchmarks.synthetic.studies import SHAPES, Shape, configs_of, dataset_of, setup_of, steps
from teach_once.precompute.compute.teacher_pass import PassOptions, TeacherPass
from teach_once.runtime.command.frame import end_process
from teach_once.runtime.machine.devices import pick_device
from teach_once.store import CacheWriter, TeacherCache
from teach_once.store.format.spec import SAMPLE_CRC
from teach_once.train.engine.ranks import ALONE, Ranks, init_process_group
from teach_once.train.engine.step import TrainContext, active_terms, epoch_steps, start_epoch
from teach_once.train.engine.train_state import capture_maps
from teach_once.train.outputs.teacher_outputs import view_bytes
from teach_once.train.runs.study import Study
from teach_once.train.sessions.student import open_context

METHOD = "cd+gkd"
_CLASSES_OF_MEMORY = 1000
_BLOCK_ROWS = 4096  # of records that size; the last block of a view is read whole as well
_KEPT = 0.3  # seconds without a byte read, after which all is read


def opened_study(shape: Shape, folder: Path, *overrides: str) -> Study:
    """The study in `folder`, whose cache is there; each process opens it by itself."""
    student, teacher = configs_of(shape, folder, overrides)
    cache = TeacherCache.open(next((folder / "caches").glob("*-*")))
    return Study(student, teacher, dataset_of(shape, teacher), cache, folder / "runs")


# ---- steps


def step_seconds(
    shape: Shape, folder: Path, device: torch.device, ranks: Ranks, rounds: int, num_steps: int
) -> dict[str, list[float]]:
    """Seconds of a step, by row and round, until the last rank has taken it."""
    study = opened_study(shape, folder)
    whole = study.config.training
    size = whole.batch_size

    def opened(
        batch_size: int, who: Ranks, batch_norm: Literal["sync", "local"] = "sync"
    ) -> Iterator[None]:
        training = replace(whole, batch_size=batch_size, batch_norm=batch_norm)
        config = replace(study.config, training=training)
        run = replace(study, config=config).run(METHOD, 0)
        return steps(open_context(run, device, ranks=who))

    share = opened(size // ranks.world, ALONE)

    def timed(row: Iterator[None], only_first: bool = False) -> float:
        """only_first: the other ranks wait, which takes no processor."""
        _rendezvous(device, ranks)
        started = time.perf_counter()
        for _ in range(0 if only_first and not ranks.is_first else num_steps):
            next(row)
        _rendezvous(device, ranks)
        return (time.perf_counter() - started) / num_steps

    rows = {
        "share alone": functools.partial(timed, share, only_first=True),
        "share": functools.partial(timed, share),
        "local": functools.partial(timed, opened(size, ranks, "local")),
        "sync": functools.partial(timed, opened(size, ranks)),
    }
    timings = interleaved(rows, rounds)
    return {name: list(timing.seconds) for name, timing in timings.items()}


def _rendezvous(device: torch.device, ranks: Ranks) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    ranks.barrier()


# ---- memory and bytes read


def memory_shape(slab_mb: int) -> Shape:
    """Digits of a thousand classes, whose logits fill a view's slab."""
    blocks = max(1, slab_mb * 10**6 // (4 * _CLASSES_OF_MEMORY * _BLOCK_ROWS))
    return replace(SHAPES["digits"], num_train=blocks * _BLOCK_ROWS, classes=_CLASSES_OF_MEMORY)


def make_memory_study(slab_mb: int, folder: Path) -> None:
    """The study of `memory_shape`, with made-up records in its cache."""
    setup, _ = setup_of(memory_shape(slab_mb), folder)
    rng, train = np.random.default_rng(0), setup.dataset.train
    content = TeacherPass(setup, PassOptions(torch.device("cpu"), num_workers=0)).content()
    with CacheWriter.open(setup.path, content) as writer:
        for item in writer.work:
            block, records = item.block, {}
            for tap in set(item.taps) - {SAMPLE_CRC}:
                spec = content.taps[tap]
                records[tap] = rng.random((block.rows, *spec.shape)).astype(spec.dtype)
            if SAMPLE_CRC in item.taps:
                ids = np.arange(block.start, block.stop)
                records[SAMPLE_CRC] = train.read_checksums(ids)
            writer.write_block(block, records)
        writer.record_measured({"views": 2, "images_per_second": 1.0})


def memory_of_rank(
    slab_mb: int, folder: Path, device: torch.device, ranks: Ranks
) -> dict[str, float]:
    """What a rank holds and reads for the teacher's outputs of two epochs of a view each.

    held: bytes of memory that no file backs, shared pages divided by those who share them. read:
    bytes for each view that was read. slab: the bytes of a view.
    """
    study = opened_study(memory_shape(slab_mb), folder, "training.batch_size=64")
    _train_a_little(open_context(study.run("ce", 0), device, ranks=ranks), ranks, epochs=1)
    before, read_before = _memory(), _bytes_read()
    run = study.run("kd", 0)
    context = open_context(run, device, ranks=ranks)
    _train_a_little(context, ranks, epochs=2)
    _wait_until_all_is_read()
    found = {
        "held": float(_memory() - before),
        "read": (_bytes_read() - read_before) / 3,  # of the two epochs and, ahead, of the third
        "slab": float(view_bytes(study.cache, run.needed_taps)),
    }
    ranks.barrier()
    context.teacher.close()
    return found


def _train_a_little(context: TrainContext, ranks: Ranks, epochs: int) -> None:
    run, data = context.run, context.data.train
    context.train_state.train()
    with capture_maps(context.train_state, data, run.training.batch_size):
        for epoch in range(1, epochs + 1):
            order = start_epoch(context, epoch)
            terms = active_terms(run.terms, epoch)
            for _ in itertools.islice(epoch_steps(context, epoch, order, terms), 3):
                pass


def _memory() -> int:
    """Bytes of memory that no file backs: the process's own, and its part of what it shares."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
    sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}
    return sizes["Pss_Anon"] + sizes["Pss_Shmem"]


def _bytes_read() -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("rchar"))


def _wait_until_all_is_read() -> None:
    before = -1
    while (now := _bytes_read()) - before > 10**5:
        before = now
        time.sleep(_KEPT)


# ---- the program


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["steps", "memory"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--shape", default="digits")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--slab-mb", type=int, default=200)
    options = parser.parse_args(arguments)
    with init_process_group(options.device) as ranks:
        device = pick_device(options.device)
        found: Any
        if options.what == "steps":
            shape = SHAPES[options.shape]
            found = step_seconds(
                shape, options.folder, device, ranks, options.rounds, options.steps
            )
        else:
            found = memory_of_rank(options.slab_mb, options.folder, device, ranks)
        (options.folder / f"found-{ranks.rank}.json").write_text(json.dumps(found))
    return 0


if __name__ == "__main__":
    end_process(main(sys.argv[1:]))
