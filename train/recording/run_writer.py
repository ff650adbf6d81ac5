"""Write the files of a run, and resume a run from them.

run.json         identity of the run (config, method, seed, cache); written first
metrics.jsonl    one line per epoch
trackers.json    the run's ids in the requested trackers (`train.recording.tracking`)
checkpoint.pt    the state after the last epoch, or within one; deleted when the run is finished
last.pt best.pt  the student alone, as a plain state dict
last-ema.pt best-ema.pt  the same for its averaged weights, if the recipe has them
best.next.pt     a new best.pt until the checkpoint refers to it; likewise best-ema.next.pt
summary.json     written last: a run with a summary is finished

`train.runs.files` and `train.recording.checkpoint` define their content and verification. Nothing
is written through a link, because the folder may come from somebody else.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from teach_once.nets.weights.files import write_tensors
from teach_once.runtime.metrics import deciding_metric
from teach_once.runtime.safe.confined import (
    open_to_append,
    opened_folder,
    remove_inside,
    remove_leftovers,
    write_inside,
    written_inside,
)
from teach_once.runtime.safe.locks import Job, WriterLock
from teach_once.store.identity import file_sha256, identity_sha256
from teach_once.train.engine.epoch_result import EpochResult, SplitMetrics
from teach_once.train.engine.step import AnyRun
from teach_once.train.engine.train_state import TrainState
from teach_once.train.recording.checkpoint import (
    BestEpoch,
    Partial,
    RunProgress,
    build_checkpoint,
    check_metrics,
    read_checkpoint,
    restore,
    unusable,
)
from teach_once.train.runs.files import (
    BEST_NAMES,
    CHECKPOINT_FILE,
    EMA,
    METRICS_FILE,
    RUN_FILE,
    SUMMARY_FILE,
    figures_of,
    metrics_line,
    read_metrics,
    read_summary,
    run_document,
    summary_document,
)

_NEXT = ".next.pt"  # suffix of weights that the checkpoint does not refer to yet


class RunWriter:
    """The writer of one run's files; training resumes at `first_epoch` and `partial`.

    The caller must close it.
    """

    def __init__(self, run: AnyRun, train_state: TrainState, clock: Callable[[], float]) -> None:
        """Resume or start the run. clock: returns the run's seconds.

        Raises Busy if another process trains this run, and TrainError if its checkpoint is
        unusable.
        """
        self.folder, self._train_state = run.folder, train_state
        self._identity, self._sha256 = run.identity, identity_sha256(run.identity)
        self._clock = clock
        self.partial: Partial | None = None
        self.seconds = 0.0
        self.first_epoch = 1
        self.threads_before: int | None = None  # threads of the process that saved the checkpoint
        self.best: dict[str, BestEpoch] = {}  # by name of the weights
        self._epochs: list[dict[str, Any]] = []  # the metrics
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        with opened_folder(self.folder.parent, self.folder.name, create=True):
            pass  # not a link: its content is this run's
        self._lock = WriterLock(self.folder, Job())  # two processes must not train one run
        try:
            remove_leftovers(self.folder.parent, self.folder.name)
            if not self._resume():
                self._begin()
        except BaseException:
            self._lock.release()
            raise
        self._seconds_counted, self.saved_at = clock(), time.perf_counter()

    def save_partial(self, partial: Partial) -> None:
        """Save a checkpoint within an epoch."""
        self._count_seconds()
        self._save_checkpoint(partial.epoch - 1, partial)

    def save_epoch(self, result: EpochResult) -> None:
        """Append the epoch to the metrics and save a checkpoint."""
        self._count_seconds()
        self._append_metrics(result)
        self._keep_best("best", result.epoch, result.tested)
        if result.average is not None:
            self._keep_best(f"best{EMA}", result.epoch, result.average)
        self._save_checkpoint(result.epoch, None)
        self._promote_best()

    def _keep_best(self, name: str, epoch: int, tested: SplitMetrics) -> None:
        if (values := tested.deciding) is None:
            return
        metric, best = deciding_metric(values), self.best.get(name)
        if best is None or metric.is_better(values[metric.name], best.deciding):
            sha256 = self._write_tensors(f"{name}{_NEXT}", self._networks[name].state_dict())
            self.best[name] = BestEpoch(epoch, values[metric.name], sha256)

    @property
    def _networks(self) -> dict[str, nn.Module]:
        """Return the network and its average by the names of their files."""
        average = self._train_state.average
        networks = {"": self._train_state.network} | ({EMA: average.module} if average else {})
        return {f"{when}{kind}": networks[kind] for when in ("last", "best") for kind in networks}

    def finish(self, extra: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        """Write the last weights and the summary, delete the checkpoint; returns the summary.

        extra: returns additional entries of the summary.
        """
        said = extra()
        self._check_best_weights()
        summary = {
            "run_sha256": self._sha256,
            **figures_of(self._epochs),
            "files_sha256": {f"{name}.pt": self._settled(name) for name in self._networks},
            "seconds": self.seconds,
            **said,
        }
        self._write(SUMMARY_FILE, summary_document(summary))
        written = read_summary(self.folder, of_teacher="weights_sha256" in summary)
        assert written is not None  # keep the checkpoint unless the summary can be read back
        remove_inside(*self._inside(CHECKPOINT_FILE))
        return written

    def _settled(self, name: str) -> str:
        """Return the sha256 of a weights file; writes the file if it contains the last weights."""
        if name.startswith("last"):
            return self._write_tensors(f"{name}.pt", self._networks[name].state_dict())
        return self.best[name].weights_sha256

    def close(self) -> None:
        """Release the folder, whether the run is finished or not."""
        self._lock.release()

    def _inside(self, name: str) -> tuple[Path, str]:
        """Return (root, relative path) of a file for `safe.confined`; the root is not a link."""
        return self.folder.parent, f"{self.folder.name}/{name}"

    def _write(self, name: str, content: bytes) -> None:
        write_inside(*self._inside(name), content)

    def _write_tensors(self, name: str, content: dict[str, Any]) -> str:
        with written_inside(*self._inside(name)) as file:
            return write_tensors(content, file)

    def _append_metrics(self, result: EpochResult) -> None:
        epoch = result.metrics()
        with open_to_append(*self._inside(METRICS_FILE)) as file:
            file.write(metrics_line(epoch, self._sha256))
            file.flush()
            os.fsync(file.fileno())  # before the checkpoint that refers to it
        self._epochs.append(epoch)

    def _count_seconds(self) -> None:
        now = self._clock()
        self.seconds += now - self._seconds_counted
        self._seconds_counted = now

    def _save_checkpoint(self, epoch: int, partial: Partial | None) -> None:
        """Save the state after `epoch` whole epochs, with the finished steps of the next one."""
        progress = RunProgress(epoch, self.seconds, self.best, partial)
        content = build_checkpoint(self._sha256, progress, self._train_state)
        self._write_tensors(CHECKPOINT_FILE, content)
        self.saved_at = time.perf_counter()

    def _promote_best(self) -> None:
        """Rename new best weights, now that the checkpoint refers to them."""
        with opened_folder(self.folder.parent, self.folder.name) as folder:
            for name in self.best:
                with contextlib.suppress(FileNotFoundError):
                    source, target = f"{name}{_NEXT}", f"{name}.pt"
                    os.rename(source, target, src_dir_fd=folder, dst_dir_fd=folder)
            os.fsync(folder)

    def _check_best_weights(self) -> None:
        """Raise TrainError unless the best weights are those in the checkpoint."""
        for name, best in self.best.items():
            path = self.folder / f"{name}.pt"
            found = file_sha256(path) if path.is_file() else ""
            if found != best.weights_sha256:
                raise unusable(
                    self.folder / CHECKPOINT_FILE,
                    f"{path} has been changed or damaged since it was written: its sha256 differs "
                    f"from that in {CHECKPOINT_FILE}",
                )

    def _begin(self) -> None:
        # With a new run.json, another run's checkpoint would be mistaken for this run's.
        remove_inside(*self._inside(CHECKPOINT_FILE))
        self._remove_next_best()
        self._write(RUN_FILE, run_document(self._identity))
        self._write(METRICS_FILE, b"")

    def _resume(self) -> bool:
        """Load this run's checkpoint and truncate the metrics to it; False if there is none.

        Metrics are flushed to disk before the checkpoint that refers to them. Raises TrainError if
        they are missing, instead of silently ignoring the checkpoint.
        """
        path = self.folder / CHECKPOINT_FILE
        if (state := read_checkpoint(path, self._sha256)) is None:
            return False
        epochs = read_metrics(self.folder, self._sha256, first=state["epoch"]) or []
        if (found := len(epochs)) < state["epoch"]:
            raise unusable(
                path,
                f"{self.folder / METRICS_FILE} has {found:,} of the {state['epoch']:,} epochs that "
                f"{CHECKPOINT_FILE} requires: restore the file, or",
            )
        progress = restore(state, self._train_state, path)
        check_metrics(progress, epochs, self._identity["training"]["epochs"], path)
        self.first_epoch = progress.epoch + 1
        self.seconds, self.best = progress.seconds, dict(progress.best)
        self.partial, self._epochs = progress.partial, epochs
        self.threads_before = state["threads"]
        self._settle_best()
        lines = [metrics_line(epoch, self._sha256) for epoch in epochs]
        self._write(METRICS_FILE, b"".join(lines))
        return True

    def _settle_best(self) -> None:
        """Finish renaming the best weights if a kill interrupted it after the checkpoint."""
        for name, best in self.best.items():
            path = self.folder / f"{name}{_NEXT}"
            if not path.is_file() or file_sha256(path) != best.weights_sha256:
                remove_inside(*self._inside(path.name))
        self._promote_best()
        self._remove_next_best()
        self._check_best_weights()

    def _remove_next_best(self) -> None:
        for name in BEST_NAMES:
            remove_inside(*self._inside(f"{name}{_NEXT}"))
