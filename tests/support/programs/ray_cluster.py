"""A local Ray cluster: a head without workers, and nodes of one CPU each."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.support.programs.processes import Started, start

_STORE_BYTES = 80 * 2**20
_SECONDS = 300.0


class Nodes:
    """The worker nodes of the cluster."""

    def __init__(self, cluster: Any, number: int) -> None:
        self._cluster = cluster
        self.address: str = cluster.address
        self.alive: list[Any] = []
        self.restore(number)

    def add(self) -> None:
        self.alive.append(self._cluster.add_node(num_cpus=1, object_store_memory=_STORE_BYTES))

    def remove(self) -> None:
        """Kill the oldest node without warning."""
        self._cluster.remove_node(self.alive.pop(0), allow_graceful=False)

    def restore(self, number: int = 2) -> None:
        """Add missing nodes, and wait until the cluster has noticed dead ones."""
        while len(self.alive) < number:
            self.add()
        self._cluster.wait_for_nodes(timeout=120)


@contextmanager
def cluster_of(number: int) -> Iterator[Nodes]:
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 0, "object_store_memory": _STORE_BYTES, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        yield Nodes(cluster, number)
    finally:
        cluster.shutdown()


started = start  # `python -m` these words, in the background


def wait_until(condition: Callable[[], bool], process: Started) -> None:
    """Wait until the condition holds; fails if the process ends first."""
    deadline = time.monotonic() + _SECONDS
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def journal_lines(caches: Path) -> list[str]:
    files = sorted(caches.glob("*/journal/*.jsonl"))
    return [line for file in files for line in file.read_text().splitlines()]
