"""Send a run's metrics to requested trackers, in addition to its metrics.jsonl.

Trackers are imported only on request. Their destination (a server, a project, offline) is set in
their own environment variables. A tracker that fails during training is disabled with a message; it
does not end the run. Does not import torch.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from rich.console import Console

from teach_once.runtime.command.program import pip_install
from teach_once.runtime.errors import UserError
from teach_once.runtime.safe.confined import opened_folder, path_of, write_inside
from teach_once.runtime.safe.safe_read import BadFile, parse_json, read_bounded
from teach_once.runtime.safe.text import one_line
from teach_once.store.identity import identity_sha256
from teach_once.train.errors import TrainError

if TYPE_CHECKING:
    from teach_once.train.engine.epoch_result import EpochResult
    from teach_once.train.engine.step import AnyRun

TRACKERS = ("tensorboard", "wandb", "mlflow")
# Package names for pip; MLflow is sufficient without its server.
_DISTRIBUTIONS = {"mlflow": "mlflow-skinny"}
_IDS_FILE = "trackers.json"  # {tracker: id of this run}, so that a resumed run continues it
_IDS_BYTES, _ID = 4096, re.compile(r"[\w-]{1,64}")
_PROJECT = "teach-once"


class Tracker(Protocol):
    """One run in one tracker."""

    where: str

    def log(self, epoch: int, figures: Mapping[str, float]) -> None: ...

    def close(self, *, is_finished: bool) -> None: ...


def check_trackers(names: Sequence[str]) -> None:
    """Raise TrainError if a tracker is unknown or its package is not installed."""
    for name in names:
        if name not in TRACKERS:
            raise TrainError(f"unknown tracker {name!r}", fix=f"use --logger {'|'.join(TRACKERS)}")
        if importlib.util.find_spec(name) is None:
            package = _DISTRIBUTIONS.get(name, name)
            raise TrainError(f"--logger {name}: not installed", fix=pip_install(package))


def epoch_scalars(result: EpochResult) -> dict[str, float]:
    """Return the metrics of an epoch by their names in trackers."""
    figures = {"loss/total": result.loss, "learning_rate": result.learning_rate}
    figures |= {f"loss/{name}": value for name, value in result.losses.items()}
    figures |= {f"weight/{name}": value for name, value in result.weights.items()}
    for prefix, tested in (("", result.tested), ("ema_", result.average)):
        for split, values in tested._asdict().items() if tested else ():
            figures |= {f"{prefix}{split}/{name}": v for name, v in (values or {}).items()}
    return figures


@contextmanager
def tracking(
    names: Sequence[str],
    run: AnyRun,
    first_epoch: int,
    console: Console | None,
    *,
    is_resumed: bool,
) -> Iterator[Callable[[EpochResult], None]]:
    """Open the trackers of a run; yields a function to call after each epoch.

    first_epoch: epoch at which the run starts or resumes. is_resumed: False creates a new run in
    each tracker (a run may be resumed within its first epoch). Raises TrainError if a tracker
    cannot be opened.
    """
    check_trackers(names)
    ids = _known_ids(run) if is_resumed else {}
    trackers: dict[str, Tracker] = {}
    is_finished = False
    try:
        for name in dict.fromkeys(names):
            trackers[name] = _opened(name, run, first_epoch, ids)
            if console is not None:
                console.print(f"tracked by {name}: {trackers[name].where}")
        if ids:
            place = f"{run.folder.name}/{_IDS_FILE}"
            write_inside(run.folder.parent, place, (json.dumps(ids) + "\n").encode())
        yield lambda result: _log(trackers, result, console)
        is_finished = True
    finally:
        for name, tracker in trackers.items():
            with _failure_said(name, trackers=None, console=console):
                tracker.close(is_finished=is_finished)


def _known_ids(run: AnyRun) -> dict[str, str]:
    """Read the ids that trackers assigned to the run earlier. Raises BadFile."""
    path = run.folder / _IDS_FILE
    try:
        ids = parse_json(read_bounded(path, _IDS_BYTES), path)
    except FileNotFoundError:
        return {}
    if not isinstance(ids, dict) or not all(_ID.fullmatch(str(each)) for each in ids.values()):
        raise BadFile(path, "does not contain one id per tracker", fix=f"rm {path}")
    return ids


def _opened(name: str, run: AnyRun, first_epoch: int, ids: dict[str, str]) -> Tracker:
    try:
        return _OPENERS[name](run, first_epoch, ids)
    except UserError:
        raise
    except Exception as error:
        raise TrainError(
            f"--logger {name}: {one_line(error, 600)}",
            fix=f"configure it, or remove --logger {name}",
        ) from error


def _log(trackers: dict[str, Tracker], result: EpochResult, console: Console | None) -> None:
    for name, tracker in list(trackers.items()):
        with _failure_said(name, trackers, console):
            tracker.log(result.epoch, epoch_scalars(result))


@contextmanager
def _failure_said(
    name: str, trackers: dict[str, Tracker] | None, console: Console | None
) -> Iterator[None]:
    """Print a tracker's error instead of raising it, and disable the tracker."""
    try:
        yield
    except Exception as error:
        if console is not None:
            console.print(
                f"{name} failed and is disabled for this run; metrics are still in "
                f"metrics.jsonl: {one_line(error)}"
            )
        if trackers is not None:
            del trackers[name]


class _Tensorboard:
    """TensorBoard events in the run's folder."""

    def __init__(self, run: AnyRun, first_epoch: int, ids: dict[str, str]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.where = f"tensorboard --logdir {run.folder / 'tensorboard'}"
        self._open = contextlib.ExitStack()
        folder = self._open.enter_context(_own_folder(run, "tensorboard"))
        # Hides events logged from here on before the run was interrupted.
        self._writer = SummaryWriter(str(path_of(folder)), purge_step=first_epoch)

    def log(self, epoch: int, figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(name, value, epoch)

    def close(self, *, is_finished: bool) -> None:
        self._writer.close()
        self._open.close()


class _Wandb:
    """A wandb run. WANDB_MODE=offline keeps it local; WANDB_PROJECT is its project."""

    def __init__(self, run: AnyRun, first_epoch: int, ids: dict[str, str]) -> None:
        import wandb

        with _own_folder(run, "wandb"):
            pass  # it is not a link; wandb writes to its path
        ids.setdefault("wandb", f"{identity_sha256(run.identity)[:8]}-{secrets.token_hex(4)}")
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", _PROJECT),
            group=run.folder.parent.name,
            name=run.folder.name,
            id=ids["wandb"],
            resume="allow",
            reinit="create_new",
            dir=run.folder,
            config=dict(run.identity),
            settings=wandb.Settings(silent=True),
        )
        self.where = str(Path(self._run.dir).parent if self._run.offline else self._run.url)

    def log(self, epoch: int, figures: Mapping[str, float]) -> None:
        self._run.log(dict(figures), step=epoch)

    def close(self, *, is_finished: bool) -> None:
        self._run.finish(exit_code=0 if is_finished else 1)


class _Mlflow:
    """An MLflow run. MLFLOW_TRACKING_URI is its server, MLFLOW_EXPERIMENT_NAME its experiment."""

    def __init__(self, run: AnyRun, first_epoch: int, ids: dict[str, str]) -> None:
        from mlflow.tracking import MlflowClient

        self._client: Any = MlflowClient()
        if "mlflow" in ids:
            self._client.update_run(ids["mlflow"], status="RUNNING")
        else:
            ids["mlflow"] = self._begun(run)
        self._id = ids["mlflow"]
        self.where = f"run {self._id} at {self._client.tracking_uri}"

    def _begun(self, run: AnyRun) -> str:
        from mlflow.entities import Param

        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", _PROJECT)
        found = self._client.get_experiment_by_name(name)
        experiment = found.experiment_id if found else self._client.create_experiment(name)
        title = f"{run.folder.parent.name}/{run.folder.name}"
        begun: str = self._client.create_run(experiment, run_name=title).info.run_id
        settings = {key: value for key, value in run.identity.items() if key != "cache"}
        params = [Param(key, str(value)[:500]) for key, value in flattened(settings).items()]
        self._client.log_batch(begun, params=params[:100])  # limit of a request
        return begun

    def log(self, epoch: int, figures: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        metrics = [Metric(name, value, now, epoch) for name, value in figures.items()]
        self._client.log_batch(self._id, metrics=metrics)

    def close(self, *, is_finished: bool) -> None:
        self._client.set_terminated(self._id, "FINISHED" if is_finished else "KILLED")


def _own_folder(run: AnyRun, name: str) -> AbstractContextManager[int]:
    """Create a folder in the run's folder if it is missing. Raises BadFile if it is a link."""
    return opened_folder(run.folder.parent, f"{run.folder.name}/{name}", create=True)


def flattened(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested settings: {"a": {"b": [1]}} -> {"a.b.0": 1}."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, (list, tuple)):
            value = {str(index): item for index, item in enumerate(value)}
        if isinstance(value, Mapping):
            flat |= flattened(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


_OPENERS: dict[str, Callable[[AnyRun, int, dict[str, str]], Tracker]] = {
    "tensorboard": _Tensorboard,
    "wandb": _Wandb,
    "mlflow": _Mlflow,
}
