"""python -m benchmarks steps [--shapes "digits cifar-56-20"] [--rounds 40] [--device cuda]
python -m benchmarks profile [--shape cifar-56-20] [--steps 20] [--method cd+gkd] [--device cuda]

What a training step costs with the teacher's outputs read from the cache, kept in memory, or
computed in the loop; next to the student alone, and to the way the original trainer works (a
DataLoader with workers, the teacher in the loop, `.item()` in every step).

Single steps of all rows take turns, so that a slow moment of a shared machine affects them all
alike. The rows: see `ROWS`; the targets: see `verdicts_of`.
"""

from __future__ import annotations

import functools
import itertools
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.harness import ROUNDS, Findings, Timing, Verdict, interleaved, markdown, timed
from benchmarks.synthetic.studies import SHAPES, Shape, endless_steps, shapes_for, study_of
from teach_once.nets.networks.precision import autocast
from teach_once.nets.teacher.taps import as_is, read_stages
from teach_once.runtime.machine.devices import pick_device
from teach_once.train.engine.step import TrainContext, start_epoch
from teach_once.train.losses import cd, ce, gkd
from teach_once.train.outputs.teacher_outputs import NoTeacher
from teach_once.train.runs.study import Study
from teach_once.train.sessions.student import open_context
from teach_once.views.pixels.batches import ViewBatch

TITLE = "A training step"
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


def measure(device: str = "auto", shapes: str = "", rounds: int = 40) -> Findings:
    where, timings, verdicts = pick_device(device), {}, []
    for name, shape in shapes_for(where, shapes).items():
        # Short steps are measured more often, long ones less.
        factor = {"digits": 10.0, "cifar-56-20": 1.0, "cifar-110-32": 0.5}.get(name, 0.125)
        timings[name] = step_seconds(shape, where, max(5, int(rounds * factor)))
        verdicts += verdicts_of(name, timings[name], where)
    table = markdown(
        ["a step of", *timings],
        [
            [label, *(f"{t[row].format_ms()} ({_relative(t, row):.2f})" for t in timings.values())]
            for row, label in ROWS.items()
        ],
    )
    text = f", {where}. Medians of single steps that take turns, {ROUNDS}; in brackets relative to "
    return Findings(f"{text}the student alone.\n\n{table}", verdicts)


def _relative(timings: dict[str, Timing], row: str) -> float:
    return timings[row].ratio_to(timings["student"])


def verdicts_of(shape: str, timings: dict[str, Timing], device: torch.device) -> list[Verdict]:
    """The rows of the target table that the cost of a step decides."""
    t = {name: timing.mean for name, timing in timings.items()}
    bound = (t["teacher"] + t["memory"]) / t["memory"]
    epoch = 1.10 if device.type == "cuda" else 1.15
    cached_to_memory = timings["cached, closely"].ratio_to(timings["memory, closely"])
    live = f"{shape}: live ÷ cached, of the most possible ({bound:.2f})"
    alone = f"(connectors alone: {t['connectors'] / t['student']:.2f})"
    return [
        Verdict(f"{shape}: cached ÷ in memory", cached_to_memory, at_most=1.02),
        Verdict(live, t["live"] / t["cached"] / bound, at_least=0.95),
        Verdict(
            f"{shape}: cached ÷ student alone {alone}",
            _relative(timings, "cached"),
            at_most=epoch if shape == "cifar-56-20" else None,
        ),
    ]


def step_seconds(shape: Shape, device: torch.device, rounds: int) -> dict[str, Timing]:
    """Seconds of a step per row, and once more of the two that must be told apart closely."""
    with tempfile.TemporaryDirectory() as folder:
        rows = rows_of(study_of(shape, Path(folder), device), device)
        calls = {name: timed(functools.partial(next, row), device) for name, row in rows.items()}
        alternating = interleaved(calls, rounds)
        # Two per cent cannot be told from noise in a few rounds of seconds: these two take more.
        pair = {f"{name}, closely": calls[name] for name in ("memory", "cached")}
        return alternating | interleaved(pair, max(rounds, _CLOSE_ROUNDS))


class HeldTeacher(NoTeacher):
    """The teacher outputs of epoch 1, gathered before the clock starts and reused in each epoch."""

    def __init__(self, context: TrainContext) -> None:
        source, data = context.teacher, context.data.train
        order = start_epoch(context, 1)
        size = context.run.training.batch_size
        self._held = [
            {tap: values.clone() for tap, values in source.rows(batch).items()}
            for batch in data.batches([0], order, size)
        ]
        self._turn = itertools.cycle(range(len(self._held)))

    def rows(self, batch: ViewBatch) -> dict[str, Tensor]:
        return self._held[next(self._turn)]


def rows_of(study: Study, device: torch.device) -> dict[str, Iterator[None]]:
    """Endless steps of every row."""

    def context(method: str = METHOD, *, live: bool = False) -> TrainContext:
        return open_context(study.run(method, 0, live), device)

    memory = context()
    return {
        "student": endless_steps(context("ce")),
        "memory": endless_steps(replace(memory, teacher=HeldTeacher(memory))),
        "cached": endless_steps(context()),
        "live": endless_steps(context(live=True)),
        "original": original_steps(study, context(live=True)),
        "teacher": teacher_steps(context(live=True)),
        "connectors": connector_steps(context()),
    }


def teacher_steps(context: TrainContext) -> Iterator[None]:
    batch = _first_batch(context)
    while True:
        context.teacher.rows(batch)
        yield


def connector_steps(context: TrainContext) -> Iterator[None]:
    """Connectors and the CD loss on maps that were computed before."""
    train_state = context.train_state
    assert train_state.connectors is not None
    with (
        torch.no_grad(),
        autocast(train_state.precision, train_state.device),
        read_stages(train_state.network, train_state.stages, as_is) as maps,
    ):
        train_state.network(_first_batch(context).inputs)
    held = {stage: features.detach().requires_grad_() for stage, features in maps.items()}
    targets: list[Tensor] = []
    while True:
        with autocast(train_state.precision, train_state.device):
            means = train_state.connectors(held)
        targets = targets or [torch.zeros_like(mean) for mean in means]
        cd(means, targets).backward()  # type: ignore[no-untyped-call]
        for features in held.values():
            features.grad = None
        yield


def _first_batch(context: TrainContext) -> ViewBatch:
    data = context.data.train
    return next(data.batches([0], np.arange(len(data)), context.run.training.batch_size))


def original_steps(study: Study, context: TrainContext) -> Iterator[None]:
    """Workers that send float images one by one, the teacher in each step, a wait in each."""
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
                teacher = context.teacher.rows(batch)
                with autocast(train_state.precision, device):
                    logits = train_state.network(inputs)
                    means = train_state.connectors(maps) if train_state.connectors else []
                targets = [teacher[f"stage{number + 1}"] for number in range(len(means))]
                loss = ce(logits, batch.labels) + 6 * cd(means, targets)
                loss = loss + 0.1 * gkd(logits, teacher["logits"], teacher["correct"])
                train_state.optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                train_state.optimizer.step()
                loss.item()
                maps.clear()
                yield


def measure_profile(
    device: str = "auto",
    shape: str = "cifar-56-20",
    method: str = "cd+gkd",
    steps: int = 20,
    top: int = 15,
) -> Findings:
    """Where the time of a cached step goes: the top operators of torch's profiler."""
    where, activities = pick_device(device), [ProfilerActivity.CPU]
    if where.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with tempfile.TemporaryDirectory() as folder:
        study = study_of(SHAPES[shape], Path(folder), where)
        endless = endless_steps(open_context(study.run(method, 0), where))
        for _ in range(3):
            next(endless)
        with profile(activities=activities) as found:
            for _ in range(steps):
                next(endless)
    events = sorted(found.key_averages(), key=_self_time, reverse=True)
    total = sum(map(_self_time, events))
    rows = [
        [each.key, f"{us / 1e3 / steps:.2f}", f"{us / total:.1%}", f"{each.count / steps:.0f}"]
        for each in events[:top]
        for us in [_self_time(each)]
    ]
    table = markdown(["operator", "ms per step", "share", "calls per step"], rows)
    return Findings(f", {where}: {shape}, {method}\n\n{table}", title="")


def _self_time(event: object) -> float:
    """Microseconds in the operator itself, on the GPU if it ran there."""
    on_device = getattr(event, "self_device_time_total", 0)
    return float(on_device or getattr(event, "self_cpu_time_total", 0))
