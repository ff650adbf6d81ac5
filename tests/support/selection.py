"""Which tests `make test-quick` runs, which share a worker of xdist, and which start first."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

# The losses, the records, the draws, a run that resumes: what most changes touch, in seconds each.
QUICK = {
    *("test_layout", "test_imports", "test_configs", "test_identity", "test_seeds", "test_draws"),
    *("test_losses", "test_terms", "test_schedule", "test_commit", "test_store", "test_format"),
    *("test_quantise", "test_topk", "test_augment", "test_feed", "test_taps", "test_maps"),
    *("test_train", "test_checkpoints", "test_runs", "test_report", "test_files", "test_certify"),
}

# Files of a group run in one worker, one after the other: they share what a session makes once
# (a trained checkout), or must not run beside one another (two Ray clusters would join).
GROUPS = {
    **dict.fromkeys(("test_cluster", "test_cluster_pass", "test_cluster_study"), "ray"),
    **dict.fromkeys(("test_documents", "test_make"), "checkout"),
}

# What takes longest starts first, so that no worker is left alone with it at the end.
FIRST = ("test_documents", "test_make", "test_cluster_pass", "test_cluster_study", "test_cluster")
FIRST += ("test_recipes", "test_train", "test_strangers", "test_benchmarks", "test_ranks_signals")


def arrange(items: list[pytest.Item]) -> None:
    """Mark each test's group and whether it is quick; put the longest files first."""
    for item in items:
        name = item.path.stem
        item.add_marker(pytest.mark.xdist_group(GROUPS.get(name, name)))
        if name in QUICK and item.get_closest_marker("long") is None:
            item.add_marker("quick")
    items.sort(key=lambda item: _turn(item.path, FIRST))


def _turn(file: Path, first: Sequence[str]) -> int:
    return first.index(file.stem) if file.stem in first else len(first)
