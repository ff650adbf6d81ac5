"""Run tasks on the nodes of a Ray cluster: connection, number of workers, results.

Ray queues the tasks, assigns them to nodes, and reassigns tasks of a dead node. Every node must see
the same folders under the same paths, including this project and its environment. A task returns
the project's own errors as data, so that they keep their type and are not retried.

Ray sends pickles between its processes: trust a cluster only as far as the user's own shell.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

from rich.console import Console

from teach_once.runtime.command.frame import disk_refusal
from teach_once.runtime.errors import Stopped, UserError
from teach_once.runtime.machine.resources import Share, sharing_machine, usable_cores

NAMESPACE = "teach-once"
INSTALL = "make env-cluster; without make: pip install -r requirements-cluster.txt"
_STORE_BYTES = 100 * 2**20  # results are small; Ray's default is 30 % of the memory
Ref = Any  # a Ray ObjectRef


class ClusterError(UserError):
    """A cluster that cannot be reached or used, or an error of one of its workers."""


@dataclass(frozen=True)
class Resources:
    """Resources of a node that one worker needs; a worker does one task at a time."""

    cpus: int = 1
    gpus: float = 0.0

    def fitting(self, node: Mapping[str, float]) -> int:
        """Return the number of workers that fit on a node with these resources."""
        by_cpu = int(node.get("CPU", 0.0)) // self.cpus
        if not self.gpus:
            return by_cpu
        on_each = int(1 / self.gpus) if self.gpus < 1 else 1 / self.gpus
        return min(by_cpu, int(node.get("GPU", 0.0) * on_each))

    def __str__(self) -> str:
        return f"{self.cpus} CPU{'s' * (self.cpus > 1)}" + f" and {self.gpus:g} GPU" * bool(
            self.gpus
        )


class Failure(NamedTuple):
    """The reason why a task failed.

    kind: name of the error. is_bug: the error is unexpected, and `problem` is its traceback.
    """

    kind: str
    problem: str
    fix: str | None
    is_bug: bool = False
    stopped_by: int | None = None  # number of the signal


@dataclass(frozen=True)
class WorkingFolder:
    """The folder of a program, with what workers need to find the same files and modules."""

    folder: str
    modules: tuple[str, ...]

    @classmethod
    def here(cls) -> WorkingFolder:
        return cls(os.getcwd(), tuple(path for path in sys.path if path))

    def enter(self) -> None:
        """Change to the folder in a worker process. Raises ClusterError if the node lacks it."""
        try:
            os.chdir(self.folder)
        except OSError as error:
            raise ClusterError(
                f"{self.folder}: {error.strerror}",
                fix="start the command in a folder that all nodes share",
            ) from None
        sys.path += [path for path in self.modules if path not in sys.path]


class Cluster:
    """A connection to a Ray cluster. A context manager: tasks still running at the end are lost.

    gpus: GPUs per worker; None: one if the cluster has any.
    """

    def __init__(self, address: str, console: Console, *, cpus: int, gpus: float | None) -> None:
        self._ray = imported_ray()
        self.is_local = connect(self._ray, address)
        try:
            if gpus is None:
                gpus = 1.0 if any("GPU" in node for node in self._nodes()) else 0.0
            self.resources = Resources(cpus, gpus)
            if not self.num_workers:
                raise ClusterError(
                    f"no node of the cluster has {self.resources}: {_format_nodes(self._nodes())}",
                    fix="reduce the resources per worker, or add nodes",
                )
            self._task = self._ray.remote(
                num_cpus=cpus, num_gpus=gpus, max_retries=-1, max_calls=0
            )(_answer)
        except BaseException:
            self._ray.shutdown()
            raise
        where = "cluster"
        if self.is_local:
            where = f"{'no cluster is running: ' * (address == 'auto')}this machine alone"
        console.print(f"Ray: {where}, {self.format_workers()} of {self.resources} each")

    @property
    def num_workers(self) -> int:
        """Return how many tasks the live nodes can run at once."""
        return sum(map(self.resources.fitting, self._nodes()))

    def format_workers(self) -> str:
        number = self.num_workers
        return f"{number} worker{'s' * (number != 1)}"

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Ref:
        """Queue a call of a module-level function."""
        return self._task.remote(WorkingFolder.here(), self.resources.cpus, function, *arguments)

    def done(self, refs: Iterable[Ref], seconds: float) -> list[Ref]:
        """Return the tasks that have ended; waits up to `seconds` for the first one."""
        refs = list(refs)
        ready, _ = self._ray.wait(refs, num_returns=len(refs), timeout=0)
        if not ready and refs:
            ready, _ = self._ray.wait(refs, num_returns=1, timeout=seconds)
        return list(ready)

    def result(self, ref: Ref) -> Any:
        """Wait for a task; returns its result or its `Failure`. Raises ClusterError if lost."""
        try:
            return self._ray.get(ref)
        except self._ray.exceptions.RayError as error:
            raise ClusterError(
                f"a worker of the cluster could not run its task: {type(error).__name__}: "
                f"{str(error).strip().splitlines()[0]}",
                fix=f"give every node this folder and this environment ({INSTALL})",
            ) from None

    def wait_for(self, ref: Ref) -> Any:
        """Wait for a task and return its result. Raises ClusterError or as `raise_failure`."""
        return raise_failure(self.result(ref))

    def cancel(self, refs: Iterable[Ref], *, at_once: bool) -> None:
        """Drop queued tasks and interrupt running ones; at_once: kill their processes.

        Ended tasks are skipped: Ray 2.60 may abort this process if a task is canceled while its
        result is being recorded ("Tried to complete task that was not pending").
        """
        refs = set(refs)
        for ref in refs.difference(self.done(refs, 0)):
            self._ray.cancel(ref, force=at_once)

    def _nodes(self) -> list[Mapping[str, float]]:
        return [node["Resources"] for node in self._ray.nodes() if node["Alive"]]

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self._ray.shutdown()


def raise_failure(answer: Any) -> Any:
    """Return the answer. Raises ClusterError, Stopped, or RuntimeError for a bug, for a Failure."""
    if not isinstance(answer, Failure):
        return answer
    if answer.stopped_by is not None:
        raise Stopped(answer.stopped_by, answer.problem)
    if answer.is_bug:
        raise RuntimeError(f"in a worker of the cluster:\n{answer.problem}")
    raise ClusterError(answer.problem, fix=answer.fix)


def imported_ray() -> Any:
    """Import Ray. Raises ClusterError if it is not installed."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray reads it on import
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
    except ImportError:
        raise ClusterError("Ray is not installed", fix=INSTALL) from None
    return cast(Any, ray)


def connect(ray: Any, address: str) -> bool:
    """Connect to a cluster; returns True if one was started on this machine only.

    That happens for `local`, and for `auto` if no cluster is found. RAY_ADDRESS overrides `auto`.
    Raises ClusterError if the cluster cannot be reached.
    """
    quiet = {"namespace": NAMESPACE, "log_to_driver": False, "logging_level": "ERROR"}
    if address == "auto":
        address = os.environ.get("RAY_ADDRESS") or address
    if address != "local":
        try:
            ray.init(address=address, **quiet)
            return False
        except ConnectionError as error:
            if address != "auto":
                raise _unreachable(address, error) from None
        except (RuntimeError, ValueError) as error:  # another version or an invalid address
            raise _unreachable(address, error) from None
    ray.init(
        address="local",
        num_cpus=usable_cores(),
        object_store_memory=_STORE_BYTES,
        include_dashboard=False,
        **quiet,
    )
    return True


def _unreachable(address: str, error: Exception) -> ClusterError:
    return ClusterError(
        f"cannot connect to a Ray cluster at {address}: {_last_line(error)}",
        fix="start one with `ray start --head` and use the address that it prints, or use auto",
    )


def _last_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1].strip() if lines else type(error).__name__


def _format_nodes(nodes: Sequence[Mapping[str, float]]) -> str:
    shown = (f"{int(n.get('CPU', 0))} CPUs, {int(n.get('GPU', 0))} GPUs" for n in nodes)
    return "; ".join(shown) or "it has no nodes"


def _answer(place: WorkingFolder, cpus: int, function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in a worker process; returns its result or the Failure."""
    try:
        place.enter()
        with sharing_machine(Share(0, max(usable_cores() // cpus, 1))):
            return function(*arguments)
    except UserError as error:
        return Failure(type(error).__name__, error.problem, error.fix)
    except OSError as error:
        if (refusal := disk_refusal(error)) is None:
            return _bug(error)
        return Failure(type(error).__name__, refusal.problem, refusal.fix)
    except Stopped as stopped:
        return Failure("Stopped", str(stopped), None, stopped_by=stopped.exit_code - 128)
    except Exception as error:
        return _bug(error)


def _bug(error: Exception) -> Failure:
    return Failure(type(error).__name__, traceback.format_exc(), None, is_bug=True)
