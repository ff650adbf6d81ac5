"""python -m benchmarks.steps [--shapes "digits cifar-56-20"] [--rounds 40] [--device cuda]

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
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.harness import Timing, Verdict, interleaved, machine, markdown, parser_of, publish
from benchmarks.setting import SHAPES, Shape, shapes_for, steps, study_of
from nets.precision import autocast
from runtime.devices import pick_device
from train.feed import CachedTeacher, NoTeacher
from train.losses import cd, ce, gkd
from train.student import Assembled, assemble
from train.study import Study
from views.batches import ViewBatch

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

    def __init__(self, source: CachedTeacher, assembled: Assembled) -> None:
        task = assembled.task
        self._order = source.order(task.seed, 1, len(task.data.train))
        source.start_epoch(1, self._order)
        size = task.training.batch_size
        self._held = [
            {tap: values.clone() for tap, values in source.outputs(batch).items()}
            for batch in task.data.train.batches([0], self._order, size)
        ]
        self._turn = itertools.cycle(range(len(self._held)))

    def order(self, seed: int, epoch: int, num_samples: int) -> np.ndarray:
        return self._order

    def outputs(self, batch: ViewBatch) -> dict[str, Tensor]:
        return self._held[next(self._turn)]


def rows_of(study: Study, device: torch.device) -> dict[str, Iterator[None]]:
    """Endless steps of every row."""

    def made(method: str, *, live: bool = False) -> Assembled:
        return assemble(study.run(method, 0, live), device)

    alone, memory, cached, live = made("ce"), made(METHOD), made(METHOD), made(METHOD, live=True)
    assert isinstance(memory.source, CachedTeacher)
    held = HeldTeacher(memory.source, memory)
    return {
        "student": steps(*alone),
        "memory": steps(memory.task, memory.learner, held),
        "cached": steps(*cached),
        "live": steps(*live),
        "original": original_steps(study, made(METHOD, live=True), device),
        "teacher": teacher_steps(made(METHOD, live=True)),
        "connectors": connector_steps(made(METHOD), device),
    }


def teacher_steps(assembled: Assembled) -> Iterator[None]:
    task, source = assembled.task, assembled.source
    order = source.order(0, 1, len(task.data.train))
    batch, *_ = task.data.train.batches([0], order, task.training.batch_size)
    while True:
        source.outputs(batch)
        yield


def connector_steps(assembled: Assembled, device: torch.device) -> Iterator[None]:
    """Connectors and the CD loss on maps that are there already."""
    from nets.taps import as_is, read_stages

    task, learner = assembled.task, assembled.learner
    assert learner.connectors is not None
    order = np.arange(len(task.data.train))
    batch, *_ = task.data.train.batches([0], order, task.training.batch_size)
    precision = task.training.precision
    with (
        torch.no_grad(),
        autocast(precision, device),
        read_stages(learner.network, task.stages, as_is) as maps,
    ):
        learner.network(batch.inputs)
    held = {stage: features.detach().requires_grad_() for stage, features in maps.items()}
    wanted = None
    while True:
        with autocast(precision, device):
            means = learner.connectors(held)
        wanted = wanted or [torch.zeros_like(mean) for mean in means]
        cd(means, wanted).backward()
        for features in held.values():
            features.grad = None
        yield


def original_steps(study: Study, assembled: Assembled, device: torch.device) -> Iterator[None]:
    """Workers that hand over float images one by one, the teacher in each step, a wait in each."""
    task, learner, source = assembled
    images = torch.from_numpy(study.dataset.train.images).permute(0, 3, 1, 2).float() / 255
    data = TensorDataset(images, torch.from_numpy(study.dataset.train.labels))
    size = task.training.batch_size
    loader = DataLoader(data, size, shuffle=True, num_workers=2, persistent_workers=True)
    from nets.taps import as_is, read_stages

    learner.network.train()
    with read_stages(learner.network, task.stages, as_is) as maps:
        while True:
            for pixels, labels in loader:
                inputs = pixels.to(device, memory_format=torch.channels_last)
                batch = ViewBatch(0, labels, labels, inputs, labels.to(device))
                teacher = source.outputs(batch)
                with autocast(task.training.precision, device):
                    logits = learner.network(inputs)
                    means = learner.connectors(maps) if learner.connectors else []
                wanted = [teacher[f"stage{number + 1}"] for number in range(len(means))]
                loss = (
                    ce(logits, batch.labels)
                    + 0.1 * gkd(logits, teacher["logits"], teacher["correct"])
                    + 6 * cd(means, wanted)
                )
                learner.optimizer.zero_grad()
                loss.backward()
                learner.optimizer.step()
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
        found = interleaved(timings, rounds)
        # Two per cent cannot be told from noise in a few rounds of seconds: these two go on.
        pair = {name: timings[name] for name in ("memory", "cached")}
        closely = interleaved(pair, max(rounds, _CLOSE_ROUNDS))
        return {**found, **{f"{name}, closely": timing for name, timing in closely.items()}}


def judged(shape: str, found: dict[str, Timing], device: torch.device) -> list[Verdict]:
    """The rows of the target table that a step's cost decides."""
    t = {name: timing.mean for name, timing in found.items()}
    epoch = 1.10 if device.type == "cuda" else 1.15
    student_and_losses = t["memory"]
    bound = (t["teacher"] + student_and_losses) / student_and_losses
    verdicts = [
        Verdict(
            f"{shape}: cached ÷ in memory",
            found["cached, closely"].ratio_to(found["memory, closely"]),
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
            found["cached"].ratio_to(found["student"]),
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
                f"{found[name].median * 1e3:,.1f} ms ± {found[name].spread:.0%} "
                f"({found[name].ratio_to(found['student']):.2f})"
                for found in shapes.values()
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
    found, verdicts = {}, []
    for name, shape in shapes_for(device, options.shapes).items():
        # Short steps are measured more often, long ones less.
        factor = {"digits": 10.0, "cifar-56-20": 1.0, "cifar-110-32": 0.5}.get(name, 0.125)
        rounds = max(5, int(options.rounds * factor))
        found[name] = measure(shape, device, rounds)
        verdicts += judged(name, found[name], device)
    text = (
        f"`python -m benchmarks.steps {' '.join(arguments)}` on {machine()}, torch "
        f"{torch.__version__}, {device}. Medians of single steps that take turns, ± half the "
        f"distance between the quartiles; in brackets relative to the student alone.\n\n"
        f"{report(found)}"
    )
    publish(options, "A training step", text, verdicts)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
