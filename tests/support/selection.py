"""Select the tests of `make test-quick`, groups that share a worker, and the first to start.

python -m tests.support.selection      print the files of test-quick; collecting all takes longer
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from xdist.scheduler import LoadScopeScheduling

# The losses, the records, the draws, a run that resumes: what most changes touch, in seconds each.
QUICK = {
    *("test_layout", "test_imports", "test_configs", "test_identity", "test_seeds", "test_draws"),
    *("test_losses", "test_terms", "test_schedule", "test_store", "test_format"),
    *("test_quantize", "test_topk", "test_augment", "test_cached_teacher", "test_teacher_outputs"),
    *("test_taps", "test_maps", "test_train", "test_checkpoints", "test_recorder", "test_report"),
    *("test_files", "test_certify", "test_commit_log_contract", "test_place_contract"),
}

# Tests of these files that take seconds: they compile networks, or start processes.
NOT_QUICK = {
    "test_compiled_runs_after_one_another_read_the_maps_that_each_needs",
    "test_training_to_its_first_update_loads_no_compiler_and_no_library_that_few_need",
    "test_every_loss_trains_from_the_cache_as_from_the_live_teacher",
}

# A worker runs a file's tests one after the other, so that what they share is made once. So does it
# with the files of a group: they share what a session makes once (a trained checkout), or must not
# run beside one another (two Ray clusters would join).
GROUPS = {
    **dict.fromkeys(("test_cluster", "test_cluster_pass", "test_cluster_study"), "ray"),
    **dict.fromkeys(("test_documents", "test_make"), "checkout"),
}

# What takes longest starts first, so that no worker is left alone with it at the end.
FIRST = ("test_documents", "test_make", "test_cluster_pass", "test_cluster_study", "test_cluster")
FIRST += ("test_strangers", "test_packaging", "test_together", "test_commands", "test_bucket_pass")
FIRST += ("test_ranks", "test_ranks_signals", "test_train", "test_samples", "test_commit")
FIRST += ("test_faults", "test_recipes", "test_families", "test_precompute", "test_ablation")
FIRST += ("test_nets", "test_export", "test_remedies", "test_store_commands", "test_benchmarks")
FIRST += ("test_distillation_dataset", "test_pack_shards", "test_remote_faults", "test_runs")


def arrange(items: list[pytest.Item]) -> None:
    """Mark the quick tests, and put the longest files first."""
    for item in items:
        is_quick = item.path.stem in QUICK and item.name not in NOT_QUICK
        if is_quick and item.get_closest_marker("long") is None:
            item.add_marker("quick")
    items.sort(key=lambda item: _turn(item.path, FIRST))


def _turn(file: Path, first: Sequence[str]) -> int:
    return first.index(file.stem) if file.stem in first else len(first)


class ByGroup(LoadScopeScheduling):
    """Hands whole groups of files to the workers, in the order in which tests were collected.

    xdist's own loadgroup reads a mark, which pytest 9.2 no longer carries into a test's id: there
    it deals single tests out, and every worker makes everything once more.
    """

    def _split_scope(self, nodeid: str) -> str:
        name = Path(nodeid.partition("::")[0]).stem
        return GROUPS.get(name, name)


if __name__ == "__main__":
    files = sorted(file for file in Path("tests").rglob("test_*.py") if file.stem in QUICK)
    assert {file.stem for file in files} == QUICK, "a file of QUICK was renamed"
    print(*files)
