"""How fast the teacher's pass is: it crops views, reads taps, and writes and flushes blocks.

Compared with a bare loop of its forward passes over prepared batches.
"""

from __future__ import annotations

import io
import tempfile
import time
from dataclasses import replace
from itertools import count
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from benchmarks.harness import Findings, Timing, Verdict, interleaved, markdown, timed
from benchmarks.synthetic.studies import Shape, shapes_for, write_shape
from teach_once.nets.networks.precision import autocast
from teach_once.precompute.compute.blocks import run_blocks
from teach_once.precompute.compute.teacher_pass import PassOptions, TeacherPass
from teach_once.runtime.command.signals import StopRequest
from teach_once.runtime.machine.devices import pick_device
from teach_once.store import CacheWriter

TITLE = "The teacher pass"
_BLOCKS = 4  # at least: all but the last are written while the teacher runs


def measure(
    device: str = "auto", shapes: str = "", rounds: int = 5, batch_size: int = 256
) -> Findings:
    where, rows, verdicts = pick_device(device), [], []
    for name, known in shapes_for(where, shapes).items():
        images = (16 if name == "digits" else 2) * known.num_train  # enough for the blocks
        shape = replace(known, num_train=images, num_views=1)
        found = seconds_of(shape, where, rounds, batch_size)
        rows.append([name, *(f"{images / each.median:,.0f}" for each in found.values())])
        ratio = found["bare"].ratio_to(found["pass"])
        verdicts.append(Verdict(f"{name}: pass ÷ bare loop, images/s", ratio, at_least=0.95))
    table = markdown(["teacher of", "pass, images/s", "bare forward loop, images/s"], rows)
    return Findings(f", {where}; medians of {rounds} interleaved rounds.\n\n{table}", verdicts)


def seconds_of(
    shape: Shape, device: torch.device, rounds: int, batch_size: int
) -> dict[str, Timing]:
    with tempfile.TemporaryDirectory() as name:
        setup = write_shape(shape, Path(name)).setup()
        teacher_pass = TeacherPass(setup, PassOptions(device, batch_size))
        content, ids = teacher_pass.content(), np.arange(shape.num_train)
        inputs = [each.inputs for each in teacher_pass.pixels.batches([0], ids, batch_size)]
        block_rows = 1 << ((len(ids) // _BLOCKS).bit_length() - 1)
        quiet, made = Console(file=io.StringIO()), count()

        def whole_pass() -> float:
            path = Path(name, f"cache-{next(made)}")
            with CacheWriter.open(path, content, block_rows=block_rows) as writer:
                started = time.perf_counter()
                run_blocks(teacher_pass, writer, writer.work, StopRequest(), quiet)
                return time.perf_counter() - started

        @torch.inference_mode()
        def bare() -> None:
            with autocast(setup.config.teacher.precision, device):
                for batch in inputs:
                    teacher_pass.teacher.network(batch)

        return interleaved({"pass": whole_pass, "bare": timed(bare, device)}, rounds)
