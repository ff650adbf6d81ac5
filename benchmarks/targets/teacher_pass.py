"""python -m benchmarks teacher_pass [--shapes "digits cifar-56-20"] [--rounds 5] [--device cuda]

How near a pass of `precompute` comes to a bare forward loop of the same teacher over the same
batches that are already on the device. The pass cuts views, reads taps, copies, checks, writes
and flushes; planning, and the tests after it, are left out, as is making the cache's folder.
"""

from __future__ import annotations

import dataclasses
import io
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from benchmarks.harness import Verdict, interleaved, machine, markdown, parser_of, publish
from benchmarks.synthetic.studies import SHAPES, Shape, setup_of, shapes_for
from teach_once.nets.networks.precision import autocast
from teach_once.precompute.compute.blocks import run_blocks
from teach_once.precompute.compute.teacher_pass import PassOptions, TeacherPass
from teach_once.runtime.command.signals import StopRequest
from teach_once.runtime.machine.devices import pick_device
from teach_once.store import CacheWriter

# Enough to be cut into four blocks, of which all but the last are written while the teacher runs.
_MORE = {
    "digits": 16,
    "cifar-56-20": 2,
    "cifar-110-32": 2,
    "cifar-152-50": 2,
    "imagenet-34-18": 2,
}  # times the images of a step's benchmark
_BLOCKS = 4  # at least


def _block_rows(num_images: int) -> int:
    return 1 << ((num_images // _BLOCKS).bit_length() - 1)


def measure(shape: Shape, device: torch.device, rounds: int, batch_size: int) -> tuple[float, ...]:
    """Images per second of the pass and of the bare loop, and the median of their ratios."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        setup, _ = setup_of(shape, folder)
        teacher_pass = TeacherPass(setup, PassOptions(device, batch_size))
        content = teacher_pass.content()
        every = np.arange(len(teacher_pass.pixels))
        inputs = [batch.inputs for batch in teacher_pass.pixels.batches([0], every, batch_size)]
        quiet, made = Console(file=io.StringIO()), iter(range(10**6))

        def whole_pass() -> float:
            path = folder / f"cache-{next(made)}"
            with CacheWriter.open(path, content, block_rows=_block_rows(len(every))) as writer:
                started = time.perf_counter()
                run_blocks(teacher_pass, writer, writer.work, StopRequest(), quiet)
                return time.perf_counter() - started

        @torch.inference_mode()
        def bare() -> float:
            started = time.perf_counter()
            with autocast(setup.config.teacher.precision, device):
                for batch in inputs:
                    teacher_pass.teacher.network(batch)
            if device.type == "cuda":
                torch.cuda.synchronize()
            return time.perf_counter() - started

        timings = interleaved({"pass": whole_pass, "bare": bare}, rounds)
    images = len(every)
    return (
        images / timings["pass"].median,
        images / timings["bare"].median,
        timings["bare"].ratio_to(timings["pass"]),
    )


def main(arguments: list[str]) -> int:
    parser = parser_of("teacher_pass", __doc__)
    parser.add_argument("--shapes", help=f"of {', '.join(SHAPES)}; default: all but slow ones")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=256)
    options = parser.parse_args(arguments)
    device = pick_device(options.device)
    rows, verdicts = [], []
    for name, known in shapes_for(device, options.shapes).items():
        shape = dataclasses.replace(known, num_train=_MORE[name] * known.num_train, num_views=1)
        found, bare, ratio = measure(shape, device, options.rounds, options.batch_size)
        rows.append([name, f"{found:,.0f}", f"{bare:,.0f}"])
        verdicts.append(
            Verdict(f"{name}: pass ÷ bare loop, images/s", ratio, "≥ 0.95", lambda x: x >= 0.95)
        )
    table = markdown(["teacher of", "pass, images/s", "bare forward loop, images/s"], rows)
    text = (
        f"`python -m benchmarks teacher_pass {' '.join(arguments)}` on {machine()}, torch "
        f"{torch.__version__}, {device}; medians of {options.rounds} interleaved rounds.\n\n"
        f"{table}"
    )
    publish(options, "The teacher pass", text, verdicts)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
