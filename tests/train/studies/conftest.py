"""Fixtures of studies in several processes."""

from __future__ import annotations

import multiprocessing
from multiprocessing.context import BaseContext

import pytest


@pytest.fixture
def forks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes are forks of one that has imported torch: seconds less for each than by spawn."""
    context_of = multiprocessing.get_context

    def forking(method: str | None = None) -> BaseContext:
        return context_of("forkserver" if method == "spawn" else method)

    monkeypatch.setattr(multiprocessing, "get_context", forking)
