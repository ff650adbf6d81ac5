"""What a run leaves on disk, and how it is resumed.

run.json         what the run is (config, method, seed, cache); written first
metrics.jsonl    one line per epoch
tensorboard/     the same as events
checkpoint.pt    the state after the last epoch, or within one; deleted when the run is finished
last.pt best.pt  the student alone, as a plain state dict
last-ema.pt best-ema.pt  the same of its averaged weights, where the recipe has them
summary.json     written last: a run that has one is finished
"""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Self

from torch import Tensor, nn

from nets.archs import ArchError
from nets.error_rates import ErrorRates
from nets.weights import read_tensors, save_atomically
from runtime.errors import Stopped
from runtime.files import write_atomically
from runtime.locks import Job, WriterLock
from runtime.signals import StopRequest
from store.identity import canonical_json, file_sha256, identity_sha256
from train import TrainError
from train.learner import Learner
from train.runs import CHECKPOINT_FILE, METRICS_FILE, RUN_FILE, SUMMARY_FILE
from train.step import AnyRun


class Tested(NamedTuple):
    """Errors on the test and the validation split; None where there was no test, or is no split."""

    errors: ErrorRates | None
    validation: ErrorRates | None

    @property
    def deciding(self) -> ErrorRates | None:
        """The errors that the best epoch is chosen by."""
        return self.errors if self.validation is None else self.validation


@dataclass(frozen=True)
class EpochResult:
    """The outcome of an epoch. Losses are means over its samples, before their weights."""

    epoch: int
    loss: float
    losses: dict[str, float]
    weights: dict[str, float]
    errors: ErrorRates | None  # on the test split; None in epochs without a test
    validation: ErrorRates | None
    average: Tested | None  # of the averaged weights, where the recipe has them
    learning_rate: float
    num_samples: int
    train_seconds: float  # the steps, the teacher's outputs at hand
    wait_seconds: float  # for the feed, before the first step
    evaluate_seconds: float
    step_losses: list[float] = field(repr=False)

    @property
    def seconds(self) -> float:
        return self.wait_seconds + self.train_seconds + self.evaluate_seconds

    @property
    def images_per_second(self) -> float:
        return self.num_samples / max(self.train_seconds, 1e-9)


@dataclass(frozen=True)
class Partial:
    """An epoch of which `step` steps are done. Tensors are float32, on the host."""

    epoch: int
    step: int
    step_losses: Tensor
    sums: dict[str, Tensor]
    train_seconds: float


EMA = "-ema"  # ends the names of averaged weights


@dataclass(frozen=True)
class BestEpoch:
    """The epoch with the lowest `deciding` error (validation, else test), and its test errors."""

    epoch: int
    deciding: float
    top1: float
    top5: float


class RunRecorder:
    """Writes the files of one run; `first_epoch` and `partial` say where training resumes.

    checkpoint_minutes: between checkpoints within an epoch. stop: a request to save one and to end.
    To be closed, or used as a context. Raises Busy where another process trains this run.
    """

    def __init__(
        self,
        run: AnyRun,
        learner: Learner,
        *,
        checkpoint_minutes: float = 10.0,
        stop: StopRequest | None = None,
    ) -> None:
        self.folder, self._learner = run.folder, learner
        self._identity, self._sha256 = run.identity, identity_sha256(run.identity)
        self._checkpoint_seconds, self._stop = 60 * checkpoint_minutes, stop
        self.partial: Partial | None = None
        self.seconds = 0.0
        self.first_epoch = 1
        self.best: dict[str, BestEpoch] = {}  # by the name of the weights
        self.last: dict[str, Any] = {}  # the metrics of the last epoch
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = WriterLock(self.folder, Job())  # two processes must not train one run
        try:
            if not self._resume():
                self._begin()
            self._events = self._open_events()
        except BaseException:
            self._lock.release()
            raise
        self._seconds_counted = self._saved = time.perf_counter()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def is_due(self) -> bool:
        """Whether to save a checkpoint now, within an epoch."""
        is_stopped = self._stop is not None and self._stop.signal_number is not None
        return is_stopped or time.perf_counter() - self._saved >= self._checkpoint_seconds

    def save(self, partial: Partial) -> None:
        """Save a checkpoint within an epoch. Raises Stopped if asked to end."""
        self._count_seconds()
        self._save_checkpoint(partial.epoch - 1, partial)
        self._end_if_asked(f"in epoch {partial.epoch} after step {partial.step:,}")

    def end_if_asked(self, epoch: int) -> None:
        """Raise Stopped if asked to end; the epoch is saved."""
        self._end_if_asked(f"after epoch {epoch}")

    def _end_if_asked(self, where: str) -> None:
        if self._stop is not None and self._stop.signal_number is not None:
            message = f"stopped {where}; the same command resumes there"
            raise Stopped(self._stop.signal_number, message)

    def epoch_done(self, result: EpochResult) -> None:
        """Append the epoch to the metrics and save a checkpoint."""
        self._count_seconds()
        self._keep_best("best", result.epoch, Tested(result.errors, result.validation))
        if result.average is not None:
            self._keep_best(f"best{EMA}", result.epoch, result.average)
        self.last = self._append_metrics(result)
        self._append_events(result)
        self._save_checkpoint(result.epoch, None)

    def _keep_best(self, name: str, epoch: int, tested: Tested) -> None:
        errors, deciding, best = tested.errors, tested.deciding, self.best.get(name)
        if errors and deciding and (best is None or deciding.top1 < best.deciding):
            self.best[name] = BestEpoch(epoch, deciding.top1, errors.top1, errors.top5)
            save_atomically(self._networks[name].state_dict(), self.folder / f"{name}.pt")

    @property
    def _networks(self) -> dict[str, nn.Module]:
        """By the names of their files."""
        average = self._learner.average
        networks = {"": self._learner.network} | ({EMA: average.module} if average else {})
        return {f"{when}{kind}": networks[kind] for when in ("last", "best") for kind in networks}

    def finish(self, extra: Mapping[str, Any]) -> dict[str, Any]:
        """Write the last weights and the summary, delete the checkpoint; returns the summary."""
        names = list(self._networks)
        for name in names:
            if name.startswith("last"):
                save_atomically(self._networks[name].state_dict(), self.folder / f"{name}.pt")
        files = [f"{name}.pt" for name in names]
        summary = {
            "run_sha256": self._sha256,
            "epochs": self.last["epoch"],
            **{name: self._errors_of(name) for name in names},
            "files_sha256": {file: file_sha256(self.folder / file) for file in files},
            "seconds": self.seconds,
            **extra,
        }
        _write_json(self.folder / SUMMARY_FILE, summary)
        (self.folder / CHECKPOINT_FILE).unlink(missing_ok=True)
        return summary

    def _errors_of(self, name: str) -> dict[str, Any]:
        """Of the weights with that name, as the summary has them."""
        if name.startswith("last"):
            prefix = "ema_" if name.endswith(EMA) else ""
            return {key: self.last[prefix + key] for key in ("top1_error", "top5_error")}
        best = self.best[name]
        return {
            "epoch": best.epoch,
            "chosen_on": "test" if self.last["validation_top1_error"] is None else "validation",
            "top1_error": best.top1,
            "top5_error": best.top5,
        }

    def close(self) -> None:
        """Release the folder, whether the run is finished or not."""
        self._events.close()
        self._lock.release()

    def _append_metrics(self, result: EpochResult) -> dict[str, Any]:
        line = {
            "epoch": result.epoch,
            "loss": result.loss,
            "losses": result.losses,
            "weights": result.weights,
            "top1_error": result.errors and result.errors.top1,
            "top5_error": result.errors and result.errors.top5,
            "validation_top1_error": result.validation and result.validation.top1,
            **_average_metrics(result.average),
            "learning_rate": result.learning_rate,
            "train_seconds": result.train_seconds,
            "wait_seconds": result.wait_seconds,
        }
        with (self.folder / METRICS_FILE).open("a") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())  # before the checkpoint that counts on it
        return line

    def _append_events(self, result: EpochResult) -> None:
        scalars = {"loss/total": result.loss, "learning_rate": result.learning_rate}
        scalars |= {f"loss/{name}": value for name, value in result.losses.items()}
        scalars |= {f"weight/{name}": value for name, value in result.weights.items()}
        averaged = result.average.errors if result.average else None
        for prefix, errors in (("", result.errors), ("ema_", averaged)):
            if errors is not None:
                scalars |= {f"error/{prefix}top1": errors.top1, f"error/{prefix}top5": errors.top5}
        for name, value in scalars.items():
            self._events.add_scalar(name, value, result.epoch)

    def _count_seconds(self) -> None:
        now = time.perf_counter()
        self.seconds += now - self._seconds_counted
        self._seconds_counted = now

    def _save_checkpoint(self, epoch: int, partial: Partial | None) -> None:
        """Save the state after `epoch` whole epochs, with what is done of the next one."""
        state = {
            "run_sha256": self._sha256,
            "epoch": epoch,
            "seconds": self.seconds,
            "best": None,
            **{name: list(dataclasses.astuple(best)) for name, best in self.best.items()},
            "partial": dataclasses.asdict(partial) if partial else None,
            **self._learner.state_dict(),
        }
        save_atomically(state, self.folder / CHECKPOINT_FILE)
        self._saved = time.perf_counter()

    def _begin(self) -> None:
        # Another run's checkpoint would pass for one of this run as soon as run.json says so.
        (self.folder / CHECKPOINT_FILE).unlink(missing_ok=True)
        _write_json(self.folder / RUN_FILE, self._identity)
        (self.folder / METRICS_FILE).write_text("")

    def _resume(self) -> bool:
        """Load this run's checkpoint and cut the metrics back to it; False where there is none.

        A checkpoint without the metrics of all its epochs counts as none.
        """
        path = self.folder / CHECKPOINT_FILE
        if not path.is_file():
            return False
        try:
            state = read_tensors(path)
        except ArchError as error:
            fix = f"rm {shlex.quote(str(path))}  # the run starts again"
            raise TrainError(str(error), fix=fix) from None
        metrics = self.folder / METRICS_FILE
        lines = metrics.read_text().splitlines(keepends=True) if metrics.is_file() else []
        if state.get("run_sha256") != self._sha256 or len(lines) < int(state["epoch"]):
            return False
        self._learner.load_state_dict(state)
        self.first_epoch = int(state["epoch"]) + 1
        self.seconds = float(state["seconds"])
        for name in self._networks:
            if name.startswith("best") and state.get(name) is not None:
                epoch, *errors = state[name]
                self.best[name] = BestEpoch(int(epoch), *map(float, errors))
        if state["partial"] is not None:
            self.partial = Partial(**state["partial"])
        lines = lines[: self.first_epoch - 1]
        self.last = json.loads(lines[-1]) if lines else {}
        write_atomically(metrics, "".join(lines).encode())
        return True

    def _open_events(self) -> Any:
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(str(self.folder / "tensorboard"), purge_step=self.first_epoch)


def _average_metrics(average: Tested | None) -> dict[str, Any]:
    if average is None:
        return {}
    errors, validation = average
    return {
        "ema_top1_error": errors and errors.top1,
        "ema_top5_error": errors and errors.top5,
        "ema_validation_top1_error": validation and validation.top1,
    }


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    pretty = json.dumps(json.loads(canonical_json(content)), indent=1) + "\n"
    write_atomically(path, pretty.encode())
