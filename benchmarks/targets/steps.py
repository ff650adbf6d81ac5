"""python -m benchmarks steps [--shapes "digits cifar-56-20"] [--rounds 40] [--device cuda]

What a training step costs with the teacher's outputs read from the cache, lying in memory, or
computed in the loop; beside the student alone, and beside the way the original trainer works (a
DataLoader with workers, the teacher in the loop, `.item()` in every step).

Single steps of all rows take turns, so that a slow moment of a shared machine falls on all of them
alike. The rows: see `ROWS`; the targets: see `judged`.
"""

from __future__ import annotations

import functools
import itertools
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.harness import Timing, Verdict, interleaved, machine, markdown, parser_of, publish
from benchmarks.synthetic.studies import SHAPES, Shape, shapes_for, steps, study_of
from teach_once.nets.networks.precision import autocast
from teach_once.nets.teacher.taps import as_is, read_stages
from teach_once.runtime.machine.devices import pick_device
from teach_once.train.engine.step import TrainContext, start_epoch
from teach_once.train.losses import cd, ce, gkd
from teach_once.train.outputs.teacher_outputs import Ids, NoTeacher
from teach_once.train.runs.study import Study
from teach_once.train.sessions.student import open_context
from teach_once.views.pixels.batches import ViewBatch

METHOD = "cd+gkd"
ROWS = {
    "student": "student alone (ce)",
    "memory": "cd+gkd, teacher outputs in memory",
    "cached": "cd+gkd, read from the cache",
    "live": "cd+gkd, teacher in the loop",
    "original": "cd+gkd, as the original trainer works",
    "teacher": "the teacher's forward pass alone",
    "connectors": "the connectors alone, forward and backward",
}


_CLOSE_ROUNDS = 24


class HeldTeacher(NoTeacher):
    """Every batch's teacher outputs, gathered before the clock starts; epochs repeat themselves."""

    def __init__(self, context: TrainContext) -> None:
        source, data = context.teacher, context.data.train
        self._order = start_epoch(context, 1)
        size = context.run.training.batch_size
        self._held = [
            {tap: values.clone() for tap, values in source.outputs(batch).items()}
            for batch in data.batches([0], self._order, size)
        ]
        self._turn = itertools.cycle(range(len(self._held)))

    def order(self, seed: int, epoch: int, num_samples: int) -> Ids:
        return self._order

    def outputs(self, batch: ViewBatch) -> dict[str, Tensor]:
        return self._held[next(self._turn)]


def rows_of(study: Study, device: torch.device) -> dict[str, Iterator[None]]:
    """Endless steps of every row."""

    def opened(method: str, *, live: bool = False) -> TrainContext:
        return open_context(study.run(method, 0, live), device)

    memory = opened(METHOD)
    return {
        "student": steps(opened("ce")),
        "memory": steps(replace(memory, teacher=HeldTeacher(memory))),
        "cached": steps(opened(METHOD)),
        "live": steps(opened(METHOD, live=True)),
        "original": original_steps(study, opened(METHOD, live=True)),
        "teacher": teacher_steps(opened(METHOD, live=True)),
        "connectors": connector_steps(opened(METHOD)),
    }


def teacher_steps(context: TrainContext) -> Iterator[None]:
    batch = _first_batch(context)
    while True:
        context.teacher.outputs(batch)
        yield


def connector_steps(context: TrainContext) -> Iterator[None]:
    """Connectors and the CD loss on maps that are there already."""
    train_state = context.train_state
    assert train_state.connectors is not None
    with (
        torch.no_grad(),
        autocast(train_state.precision, train_state.device),
        read_stages(train_state.network, train_state.stages, as_is) as maps,
    ):
        train_state.network(_first_batch(context).inputs)
    held = {stage: features.detach().requires_grad_() for stage, features in maps.items()}
    wanted = None
    while True:
        with autocast(train_state.precision, train_state.device):
            means = train_state.connectors(held)
        wanted = wanted or [torch.zeros_like(mean) for mean in means]
        cd(means, wanted).backward()  # type: ignore[no-untyped-call]
        for features in held.values():
            features.grad = None
        yield


def _first_batch(context: TrainContext) -> ViewBatch:
    data = context.data.train
    return next(data.batches([0], np.arange(len(data)), context.run.training.batch_size))


def original_steps(study: Study, context: TrainContext) -> Iterator[None]:
    """Workers that hand over float images one by one, the teacher in each step, a wait in each."""
    train_state, device = context.train_state, context.train_state.device
    images = torch.from_numpy(study.dataset.train.images).permute(0, 3, 1, 2).float() / 255
    data = TensorDataset(images, torch.from_numpy(study.dataset.train.labels))
    size = context.run.training.batch_size
    loader = DataLoader(data, size, shuffle=True, num_workers=2, persistent_workers=True)
    train_state.network.train()
    with read_stages(train_state.network, train_state.stages, as_is) as maps:
        while True:
            for pixels, labels in loader:
                inputs = pixels.to(device, memory_format=torch.channels_last)
                batch = ViewBatch(0, labels, labels, inputs, labels.to(device))
                teacher = context.teacher.outputs(batch)
                with autocast(train_state.precision, device):
                    logits = train_state.network(inputs)
                    means = train_state.connectors(maps) if train_state.connectors else []
                wanted = [teacher[f"stage{number + 1}"] for number in range(len(means))]
                loss = (
                    ce(logits, batch.labels)
                    + 0.1 * gkd(logits, teacher["logits"], teacher["correct"])
                    + 6 * cd(means, wanted)
                )
                train_state.optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                train_state.optimizer.step()
                loss.item()
                maps.clear()
                yield


def measure(shape: Shape, device: torch.device, rounds: int) -> dict[str, Timing]:
    """Seconds of a step, per row; and once more of the two that are to be told apart closely."""
    with tempfile.TemporaryDirectory() as folder:
        study = study_of(shape, Path(folder), device)
        rows = rows_of(study, device)

        def timed(row: Iterator[None]) -> float:
            if device.type == "cuda":
                torch.cuda.synchronize()
            started = time.perf_counter()
            next(row)
            if device.type == "cuda":
                torch.cuda.synchronize()
            return time.perf_counter() - started

        timings = {name: functools.partial(timed, row) for name, row in rows.items()}
        alternating = interleaved(timings, rounds)
        # Two per cent cannot be told from noise in a few rounds of seconds: these two take more.
        pair = {name: timings[name] for name in ("memory", "cached")}
        closely = interleaved(pair, max(rounds, _CLOSE_ROUNDS))
        return {**alternating, **{f"{name}, closely": timing for name, timing in closely.items()}}


def judged(shape: str, timings: dict[str, Timing], device: torch.device) -> list[Verdict]:
    """The rows of the target table that a step's cost decides."""
    t = {name: timing.mean for name, timing in timings.items()}
    epoch = 1.10 if device.type == "cuda" else 1.15
    student_and_losses = t["memory"]
    bound = (t["teacher"] + student_and_losses) / student_and_losses
    verdicts = [
        Verdict(
            f"{shape}: cached ÷ in memory",
            timings["cached, closely"].ratio_to(timings["memory, closely"]),
            "≤ 1.02",
            lambda x: x <= 1.02,
        ),
        Verdict(
            f"{shape}: live ÷ cached, of the most possible ({bound:.2f})",
            t["live"] / t["cached"] / bound,
            "≥ 0.95",
            lambda x: x >= 0.95,
        ),
    ]
    share = f" (connectors alone: {t['connectors'] / t['student']:.2f})"
    on_target = shape == "cifar-56-20"
    verdicts.append(
        Verdict(
            f"{shape}: cached ÷ student alone{share}",
            timings["cached"].ratio_to(timings["student"]),
            f"≤ {epoch:.2f}" if on_target else "",
            (lambda x: x <= epoch) if on_target else None,
        )
    )
    return verdicts


def report(shapes: dict[str, dict[str, Timing]]) -> str:
    """Milliseconds of a step, and relative to the student alone."""
    header = ["a step of", *shapes]
    body = [
        [
            label,
            *(
                f"{timings[name].median * 1e3:,.1f} ms ± {timings[name].spread:.0%} "
                f"({timings[name].ratio_to(timings['student']):.2f})"
                for timings in shapes.values()
            ),
        ]
        for name, label in ROWS.items()
    ]
    return markdown(header, body)


def main(arguments: list[str]) -> int:
    parser = parser_of("steps", __doc__)
    parser.add_argument("--shapes", help=f"of {', '.join(SHAPES)}; default: all but slow ones")
    parser.add_argument("--rounds", type=int, default=40)
    options = parser.parse_args(arguments)
    device = pick_device(options.device)
    timings, verdicts = {}, []
    for name, shape in shapes_for(device, options.shapes).items():
        # Short steps are measured more often, long ones less.
        factor = {"digits": 10.0, "cifar-56-20": 1.0, "cifar-110-32": 0.5}.get(name, 0.125)
        rounds = max(5, int(options.rounds * factor))
        timings[name] = measure(shape, device, rounds)
        verdicts += judged(name, timings[name], device)
    text = (
        f"`python -m benchmarks steps {' '.join(arguments)}` on {machine()}, torch "
        f"{torch.__version__}, {device}. Medians of single steps that take turns, ± half the "
        f"distance between the quartiles; in brackets relative to the student alone.\n\n"
        f"{report(timings)}"
    )
    publish(options, "A training step", text, verdicts)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
