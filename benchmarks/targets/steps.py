"""The cost of a training step with teacher outputs cached, in memory, or computed in the loop.

Compared with the student alone, and with the original trainer: a DataLoader with workers, the
teacher in the loop, `.item()` in every step. Single steps of all rows alternate. `ROWS` lists the
rows, and `verdicts_of` the targets.
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
from torch.profiler import profile
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.harness import ROUNDS, Findings, Timing, Verdict, interleaved, table_of, timed
from benchmarks.synthetic.studies import SHAPES, Shape, endless_steps, shapes_for, study_of
from teach_once.nets.networks.precision import autocast
from teach_once.nets.teacher.taps import as_is, read_stages
from teach_once.runtime.machine.devices import pick_device
from teach_once.store.format.spec import cut_rows
from teach_once.train.engine.step import TrainContext, start_epoch
from teach_once.train.losses import cd, ce, gkd
from teach_once.train.outputs.cached_teacher import as_tensor, expand_logits
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
    "expanding": "expanding a batch of truncated logits alone",
}
_CLOSE_ROUNDS = 24
_TOP = {10: 4, 100: 8, 1000: 32}  # classes -> logits that are stored
# Short steps are measured more often, long ones less.
_ROUNDS_OF_SHAPE = {"digits": 10.0, "cifar-56-20": 1.0, "cifar-110-32": 0.5}
Rows = dict[str, Timing]


def measure(device: str = "auto", shapes: str = "", rounds: int = 40) -> Findings:
    where, timings, verdicts = pick_device(device), dict[str, Rows](), list[Verdict]()
    for name, shape in shapes_for(where, shapes).items():
        factor = _ROUNDS_OF_SHAPE.get(name, 0.125)
        timings[name] = step_seconds(shape, where, max(5, int(rounds * factor)))
        verdicts += verdicts_of(name, timings[name], where)
    cells = {
        name: {row: f"{t[row].format_ms()} ({t[row].ratio_to(t['student']):.2f})" for row in ROWS}
        for name, t in timings.items()
    }
    text = f", {where}. Medians of single steps that take turns, {ROUNDS}; in brackets relative to "
    text += f"the student alone.\n\n{table_of('a step of', ROWS, cells, str)}"
    return Findings(text, verdicts)


def verdicts_of(shape: str, timings: Rows, device: torch.device) -> list[Verdict]:
    """Return the verdicts that depend on the cost of a step."""
    t = {name: timing.mean for name, timing in timings.items()}
    bound = (t["teacher"] + t["memory"]) / t["memory"]
    student, cached = timings["student"], timings["cached"]
    in_memory = timings["cached, closely"].ratio_to(timings["memory, closely"])
    live = f"{shape}: live ÷ cached, of the most possible ({bound:.2f})"
    alone = (
        f"{shape}: cached ÷ student alone (connectors alone: {t['connectors'] / t['student']:.2f})"
    )
    most = None if shape != "cifar-56-20" else 1.10 if device.type == "cuda" else 1.15
    expanding = timings["expanding"].ratio_to(cached)
    return [
        Verdict(f"{shape}: cached ÷ in memory", in_memory, at_most=1.02),
        Verdict(live, t["live"] / t["cached"] / bound, at_least=0.95),
        Verdict(alone, cached.ratio_to(student), at_most=most),
        Verdict(f"{shape}: expanding truncated logits ÷ cached", expanding, at_most=0.01),
    ]


def step_seconds(shape: Shape, device: torch.device, rounds: int) -> Rows:
    """Time a step of each row, and again the two rows that must be compared closely."""
    with tempfile.TemporaryDirectory() as folder:
        rows = rows_of(study_of(shape, Path(folder), device), device)
        calls = {name: timed(functools.partial(next, row), device) for name, row in rows.items()}
        alternating = interleaved(calls, rounds)
        # A few rounds do not resolve two percent: these two rows take more.
        pair = {f"{name}, closely": calls[name] for name in ("memory", "cached")}
        return alternating | interleaved(pair, max(rounds, _CLOSE_ROUNDS))


class LoadedTeacher(NoTeacher):
    """The teacher outputs of epoch 1, loaded before the clock starts and reused in each epoch."""

    def __init__(self, context: TrainContext) -> None:
        size = context.run.training.batch_size
        batches = context.data.train.batches([0], start_epoch(context, 1), size)
        rows = map(context.teacher.rows, batches)
        loaded = [{tap: values.clone() for tap, values in each.items()} for each in rows]
        self._epochs = itertools.cycle(loaded)

    def rows(self, batch: ViewBatch) -> dict[str, Tensor]:
        return next(self._epochs)


def rows_of(study: Study, device: torch.device) -> dict[str, Iterator[None]]:
    """Return endless steps of every row."""

    def context(method: str = METHOD, *, live: bool = False) -> TrainContext:
        return open_context(study.run(method, 0, live), device)

    memory = context()
    return {
        "student": endless_steps(context("ce")),
        "memory": endless_steps(replace(memory, teacher=LoadedTeacher(memory))),
        "cached": endless_steps(context()),
        "live": endless_steps(context(live=True)),
        "original": original_steps(study, context(live=True)),
        "teacher": teacher_steps(context(live=True)),
        "connectors": connector_steps(context()),
        "expanding": expansions(context(), study.dataset.num_classes),
    }


def teacher_steps(context: TrainContext) -> Iterator[None]:
    batch = _first_batch(context)
    while True:
        context.teacher.rows(batch)
        yield


def expansions(context: TrainContext, num_classes: int) -> Iterator[None]:
    """Compute (B, K) logits from the k largest and the rest, as a truncating cache does."""
    batch_size = len(_first_batch(context).inputs)
    logits = np.random.default_rng(0).normal(size=(batch_size, num_classes)).astype(np.float32)
    device = context.train_state.device
    parts = map(as_tensor, cut_rows(logits, _TOP[num_classes]).values())
    values, classes, rest = (part.to(device) for part in parts)
    while True:
        expand_logits(values, classes, rest, num_classes)
        yield


def connector_steps(context: TrainContext) -> Iterator[None]:
    """Run connectors and the CD loss on precomputed maps."""
    state = context.train_state
    assert state.connectors is not None
    precise = functools.partial(autocast, state.precision, state.device)
    with (
        torch.no_grad(),
        precise(),
        read_stages(state.network, state.stages, as_is) as maps,
    ):
        state.network(_first_batch(context).inputs)
    features = {stage: each.detach().requires_grad_() for stage, each in maps.items()}
    while True:
        with precise():
            means = state.connectors(features)
        cd(means, list(map(torch.zeros_like, means))).backward()  # type: ignore[no-untyped-call]
        for each in features.values():
            each.grad = None
        yield


def _first_batch(context: TrainContext) -> ViewBatch:
    data = context.data.train
    return next(data.batches([0], np.arange(len(data)), context.run.training.batch_size))


def original_steps(study: Study, context: TrainContext) -> Iterator[None]:
    """Train with workers that send single float images, the live teacher, and a wait per step."""
    state, device = context.train_state, context.train_state.device
    images = torch.from_numpy(study.dataset.train.images).permute(0, 3, 1, 2).float() / 255
    data = TensorDataset(images, torch.from_numpy(study.dataset.train.labels))
    size = context.run.training.batch_size
    loader = DataLoader(data, size, shuffle=True, num_workers=2, persistent_workers=True)
    state.network.train()
    with read_stages(state.network, state.stages, as_is) as maps:
        for pixels, labels in itertools.chain.from_iterable(itertools.repeat(loader)):
            inputs = pixels.to(device, memory_format=torch.channels_last)
            batch = ViewBatch(0, labels, labels, inputs, labels.to(device))
            teacher = context.teacher.rows(batch)
            with autocast(state.precision, device):
                logits = state.network(inputs)
                means = state.connectors(maps) if state.connectors else []
            targets = [teacher[f"stage{number + 1}"] for number in range(len(means))]
            loss = ce(logits, batch.labels) + 6 * cd(means, targets)
            loss = loss + 0.1 * gkd(logits, teacher["logits"], teacher["correct"])
            state.optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            state.optimizer.step()
            loss.item()
            maps.clear()
            yield


def measure_profile(
    device: str = "auto",
    shape: str = "cifar-56-20",
    method: str = METHOD,
    steps: int = 20,
    top: int = 15,
) -> Findings:
    """Print the operators in which a cached step spends its time, by torch's profiler."""
    where = pick_device(device)
    with tempfile.TemporaryDirectory() as folder:
        study = study_of(SHAPES[shape], Path(folder), where)
        endless = endless_steps(open_context(study.run(method, 0), where))
        list(itertools.islice(endless, 3))
        with profile() as found:
            list(itertools.islice(endless, steps))
    column = "self_device_time_total" if where.type == "cuda" else "self_cpu_time_total"
    table = found.key_averages().table(sort_by=column, row_limit=top)
    return Findings(f", {where}: {steps} steps of {shape}, {method}\n\n{table}", title="")
