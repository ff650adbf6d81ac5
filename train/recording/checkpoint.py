"""The checkpoint of a run: its content, and the checks before a run resumes from it.

A checkpoint is a plain dict of tensors and numbers, with a checksum over its content and the run's
identity. When it is read, every number must have its type and range, every tensor must have the
run's shape and dtype, and the best epoch must agree with the metrics. The fused optimizer does not
check shapes, and wrong numbers would be trained on silently.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from teach_once.nets.networks.archs import ArchError
from teach_once.nets.weights.files import mismatch_with, read_tensors
from teach_once.runtime.safe.safe_read import BadFile
from teach_once.runtime.safe.text import one_line
from teach_once.train.engine.train_state import TrainState
from teach_once.train.errors import TrainError
from teach_once.train.runs.files import (
    BEST_NAMES,
    METRICS_FILE,
    Count,
    Seconds,
    Sha256,
    best_of,
    deciding_value,
    prefix_of,
)

_CHECKSUM = "content_sha256"
_MOST_DEPTH = 8
_SHOWN = 5


@dataclass(frozen=True)
class Partial:
    """An epoch with `step` finished steps. Tensors are float32, on the host."""

    epoch: int
    step: int
    step_losses: Tensor
    sums: dict[str, Tensor]
    train_seconds: float


@dataclass(frozen=True)
class BestEpoch:
    """The best epoch, and the value of the metric that chose it (on validation, else on test).

    weights_sha256: sha256 of its weights file.
    """

    epoch: int
    deciding: float
    weights_sha256: str


@dataclass(frozen=True)
class RunProgress:
    """The progress of a run: `epoch` finished epochs, and the finished steps of the next one."""

    epoch: int
    seconds: float
    best: Mapping[str, BestEpoch]  # by name of the weights file, "best" or "best-ema"
    partial: Partial | None


class _Partial(BaseModel):
    model_config = ConfigDict(
        strict=True, extra="forbid", allow_inf_nan=False, arbitrary_types_allowed=True
    )
    epoch: Count
    step: Annotated[int, Field(ge=1, le=2**31 - 1)]
    step_losses: Tensor
    sums: dict[str, Tensor]
    train_seconds: Seconds


_Best = tuple[Count, float]


class _Checkpoint(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
    run_sha256: Sha256
    epoch: Count
    seconds: Seconds
    threads: Count
    best: _Best | None
    best_ema: _Best | None = Field(default=None, alias="best-ema")
    best_sha256: dict[str, Sha256]
    partial: _Partial | None
    network: dict[str, Any]
    connectors: dict[str, Any]
    optimizer: dict[str, Any]
    scaler: dict[str, Any]
    average: dict[str, Any]
    content_sha256: Sha256


def build_checkpoint(
    run_sha256: str, progress: RunProgress, train_state: TrainState
) -> dict[str, Any]:
    """Build a checkpoint's document and tensors."""
    state = {
        "run_sha256": run_sha256,
        "epoch": progress.epoch,
        "seconds": progress.seconds,
        "threads": torch.get_num_threads(),
        "best": None,
        **{name: [best.epoch, best.deciding] for name, best in progress.best.items()},
        "best_sha256": {name: best.weights_sha256 for name, best in progress.best.items()},
        "partial": dataclasses.asdict(progress.partial) if progress.partial else None,
        **train_state.state_dict(),
    }
    return {**state, _CHECKSUM: checkpoint_digest(state)}


def checkpoint_digest(state: Mapping[str, Any]) -> str:
    """Hash a checkpoint without the optimizer's settings, which are never read from it."""
    covered = {key: value for key, value in state.items() if key != _CHECKSUM}
    return content_sha256(covered | {"optimizer": state["optimizer"]["state"]})


def read_checkpoint(path: Path, run_sha256: str) -> dict[str, Any] | None:
    """Read a run's checkpoint and check the type and range of each number.

    Returns None if the file is missing or belongs to another run. Raises TrainError, which explains
    how to restart the run, if it is damaged.
    """
    try:
        state = read_tensors(path, follow=False)
    except (ArchError, BadFile) as error:
        if not path.exists() and not path.is_symlink():
            return None
        raise unusable(path, str(error).partition("\n")[0]) from None
    try:
        _Checkpoint.model_validate(_with_tuples(state))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = one_line(".".join(map(str, first["loc"])))
        raise unusable(path, f"{one_line(path)}: {field}: {one_line(first['msg'])}") from None
    return state if state["run_sha256"] == run_sha256 else None


def restore(state: Mapping[str, Any], train_state: TrainState, path: Path) -> RunProgress:
    """Load a checkpoint from `read_checkpoint` into the train state. Raises TrainError."""
    if different := list(_differences_to(train_state, state)):
        more = f"\n  and {len(different) - _SHOWN} more" if len(different) > _SHOWN else ""
        shown = "\n  ".join(different[:_SHOWN])
        raise unusable(path, f"{one_line(path)} does not fit this run:\n  {shown}{more}")
    partial = state["partial"] and _partial(state["partial"], state["epoch"], path)
    if state[_CHECKSUM] != checkpoint_digest(state):
        raise unusable(
            path, f"{one_line(path)} has been changed or damaged: its checksum does not match"
        )
    train_state.load_state_dict(state)
    return RunProgress(
        state["epoch"],
        float(state["seconds"]),
        {
            name: _best(state[name], state["best_sha256"][name])
            for name in BEST_NAMES
            if state.get(name) is not None
        },
        partial,
    )


def check_metrics(
    progress: RunProgress, epochs: Sequence[Mapping[str, Any]], last: int, path: Path
) -> None:
    """Raise TrainError unless a checkpoint's best epochs agree with the run's metrics.

    epochs: metrics of as many epochs as the checkpoint has. last: number of the run's last epoch.
    """
    for name in BEST_NAMES:
        prefix, best = prefix_of(name), progress.best.get(name)
        found = best_of(epochs, prefix)
        expected = found and _best(
            [found["epoch"], deciding_value(found, prefix)],
            best.weights_sha256 if best else "",
        )
        if best != expected:
            raise unusable(
                path,
                f"{one_line(path)} has the best epoch {best}, but in {METRICS_FILE} it is "
                f"{expected}",
            )
    if progress.epoch > last or (progress.partial and progress.epoch == last):
        raise unusable(path, f"{one_line(path)} has epoch {progress.epoch:,} of {last:,}")


def _best(found: Sequence[Any], weights_sha256: str) -> BestEpoch:
    epoch, deciding = found
    return BestEpoch(epoch, float(deciding), weights_sha256)


def _with_tuples(state: dict[str, Any]) -> dict[str, Any]:
    lists = {name: state[name] for name in BEST_NAMES if isinstance(state.get(name), list)}
    return state | {name: tuple(value) for name, value in lists.items()}


def _partial(found: Mapping[str, Any], epochs: int, path: Path) -> Partial:
    partial = Partial(**found)
    losses, total = (torch.empty(shape, device="meta") for shape in ((partial.step,), ()))
    wrong = [
        mismatch_with(losses, partial.step_losses, exactly=True),
        *(mismatch_with(total, each, exactly=True) for each in partial.sums.values()),
        "" if partial.epoch == epochs + 1 else f"is of epoch {partial.epoch:,} after {epochs:,}",
    ]
    if problem := next(filter(None, wrong), ""):
        raise unusable(path, f"{one_line(path)}: the unfinished epoch {problem}")
    sums = {name: value.clone() for name, value in partial.sums.items()}
    return dataclasses.replace(partial, step_losses=partial.step_losses.clone(), sums=sums)


def _differences_to(train_state: TrainState, state: Mapping[str, Any]) -> Iterator[str]:
    """Yield the parts of a checkpoint that do not fit the train state."""
    own = train_state.state_dict()
    for part in ("network", "connectors", "scaler", "average"):
        yield from _differences(own[part], state.get(part, {}), part)
    yield from _differences_of_optimizer(
        train_state, own["optimizer"], state["optimizer"].get("state")
    )


def _differences_of_optimizer(
    train_state: TrainState, own: Mapping[str, Any], found: object
) -> Iterator[str]:
    """Yield the differences of the optimizer's state.

    SGD's state exists from the start. AdamW's state starts with a parameter's first gradient.
    """
    if isinstance(train_state.optimizer, torch.optim.SGD):
        yield from _differences(own["state"], found, "optimizer")
        return
    parameters = dict(enumerate(train_state.parameters()))
    begun = found if isinstance(found, dict) else {}
    expected = {
        index: {"step": torch.zeros(()), "exp_avg": parameter, "exp_avg_sq": parameter}
        for index, parameter in parameters.items()
        if index in begun
    }
    yield from _differences(expected, found, "optimizer")


def _differences(own: object, found: object, where: str) -> Iterator[str]:
    if not isinstance(own, Mapping):
        if what := mismatch_with(own, found, exactly=True):
            yield f"{where} {what}"
        elif isinstance(found, float) and not math.isfinite(found):
            yield f"{where} is {found}"
        return
    if not isinstance(found, dict):
        yield f"{where} is a {type(found).__name__}, expected a dict"
        return
    yield from (f"{where} lacks {key}" for key in own if key not in found)
    yield from (f"{where} has an unknown {one_line(key)}" for key in found if key not in own)
    for key in own:
        if key in found:
            yield from _differences(own[key], found[key], f"{where}.{key}")


def content_sha256(content: Mapping[str, Any]) -> str:
    """Hash every key, number and tensor, including dtypes and shapes. Raises ValueError."""
    digest = hashlib.sha256()
    for piece in _pieces(content, 0):
        digest.update(piece)
    return digest.hexdigest()


def _pieces(value: object, depth: int) -> Iterator[bytes | memoryview]:
    if depth > _MOST_DEPTH:
        raise ValueError("nesting is too deep")
    if isinstance(value, Tensor):
        yield f"tensor {value.dtype} {tuple(value.shape)};".encode()
        yield value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
    elif isinstance(value, Mapping):
        yield f"dict {len(value)};".encode()
        for key, item in value.items():
            yield from _pieces(key, depth + 1)
            yield from _pieces(item, depth + 1)
    elif isinstance(value, list | tuple):
        yield f"list {len(value)};".encode()
        for item in value:
            yield from _pieces(item, depth + 1)
    else:
        yield f"{type(value).__name__} {value!r};".encode()


def check_steps(partial: Partial, losses: Sequence[str], num_steps: int, path: Path) -> None:
    """Raise TrainError unless an unfinished epoch has this run's losses and remaining steps.

    losses: active in the epoch. num_steps: steps in an epoch.
    """
    if set(partial.sums) != set(losses):
        found, expected = (", ".join(sorted(each)) for each in (partial.sums, losses))
        raise unusable(
            path,
            f"{one_line(path)}: the unfinished epoch has the losses {one_line(found)}, expected "
            f"{expected}",
        )
    if partial.step >= num_steps:
        raise unusable(
            path, f"{one_line(path)} has step {partial.step:,} of an epoch of {num_steps:,}"
        )


def unusable(path: Path, problem: str) -> TrainError:
    """Return the error for a checkpoint from which the run cannot resume."""
    return TrainError(problem, fix=f"rm {shlex.quote(str(path))}  # the run starts again")
