"""Connecting to a Ray cluster, and the number of workers on its nodes."""

from __future__ import annotations

from typing import Any

import pytest

from teach_once.runtime.command.ray import ClusterError, Resources, connect


class NoCluster:
    """Ray where no cluster runs."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def init(self, address: str, **options: Any) -> None:
        self.asked.append(address)
        if address != "local":
            raise ConnectionError(f"nothing at {address}")


@pytest.fixture(autouse=True)
def without_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def test_auto_is_this_machine_alone_where_no_cluster_runs() -> None:
    ray = NoCluster()
    assert connect(ray, "auto")
    assert ray.asked == ["auto", "local"]


def test_local_asks_for_no_cluster() -> None:
    ray = NoCluster()
    assert connect(ray, "local")
    assert ray.asked == ["local"]


@pytest.mark.parametrize("address", ["10.0.0.1:6379", "auto"])
def test_an_address_at_which_no_cluster_answers_is_an_error(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    with pytest.raises(ClusterError, match=r"cluster at 10\.0\.0\.1:6379.*\n  fix: start one"):
        connect(NoCluster(), address)


@pytest.mark.parametrize(
    ("cpus", "gpus", "fitting"),
    [(1, 0.0, 8), (3, 0.0, 2), (1, 1.0, 4), (4, 1.0, 2), (1, 0.5, 8), (1, 0.3, 8), (1, 4.0, 1)],
)
def test_a_node_of_eight_cores_and_four_gpus_has_room_for(
    cpus: int, gpus: float, fitting: int
) -> None:
    assert Resources(cpus, gpus).fitting({"CPU": 8.0, "GPU": 4.0}) == fitting


def test_a_node_without_gpus_has_room_for_no_worker_that_needs_one() -> None:
    assert Resources(1, 0.5).fitting({"CPU": 8.0}) == 0
