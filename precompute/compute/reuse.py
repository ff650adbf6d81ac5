"""Copy the records of unchanged samples from the cache of another state of the dataset.

A record depends on its sample's bytes, label and number, because views are sampled by number.
Therefore only samples with the same three can be reused, and only in whole blocks, because codes
are relative to a block. If samples were added or removed, these are all blocks before the first
such sample, since all later numbers have shifted. If images were changed in place, these are all
blocks without a changed image. Nothing can be reused if views are mixed, because any sample may be
the partner of another, or if batch norm was recalibrated on all samples.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from teach_once.precompute.compute.setup import Setup
from teach_once.runtime.command.program import program_text
from teach_once.store.errors import CacheMismatch
from teach_once.store.format.manifest import Manifest
from teach_once.store.format.spec import SAMPLE_DIGEST, Block
from teach_once.store.identity import Identity, differences
from teach_once.store.inspect.find import has_manifest, other_dataset_state
from teach_once.store.read.reader import TeacherCache
from teach_once.store.write.destination import Destination
from teach_once.store.write.pending_blocks import Work
from teach_once.views.identity import preview_views
from teach_once.views.splits import describe_change, is_other_dataset, same_labels


def reason_against(setup: Setup, old: TeacherCache) -> str | None:
    """Return why no record of `old` can be reused in this setup's cache; None if some can."""
    others = [each.field for each in differences(setup.identity, old.identity)]
    if set(others) - {"dataset.digest"}:
        return f"it differs in {', '.join(others)}"
    if _depends_on_all_samples(old.identity):
        return "its records depend on all samples (mixed views or recalibrated batch norm)"
    return None


def check_reusable(setup: Setup, old: TeacherCache) -> None:
    """Raise CacheMismatch if no record of `old` can be reused."""
    if (reason := reason_against(setup, old)) is not None:
        raise _nothing_carried(old, reason)


def opened_to_carry(path: Path | None, setup: Setup) -> TeacherCache | None:
    """Open the cache at `path` and check that its records can be reused. Raises CacheError."""
    if path is None:
        return None
    old = TeacherCache.open(path)
    check_reusable(setup, old)
    return old


def format_dataset_change(setup: Setup, caches: Path, words: Sequence[str]) -> str:
    """Describe how the dataset differs from the latest cache's, when a new cache is started.

    Includes the command that reuses records. words: config and overrides of this command. Returns
    "" if the cache exists, or if no other cache differs only in its samples.
    """
    if has_manifest(setup.path):
        return ""
    if (old := other_dataset_state(caches, setup.identity)) is None:
        return ""
    names, theirs = setup.dataset.class_names, old.class_names
    if is_other_dataset(setup.dataset.train, names, old.labels, old.sample_digest, theirs):
        return ""
    change = describe_change(setup.dataset.train, old.labels, old.sample_digest)
    if (reason := reason_against(setup, old)) is not None:
        remedy = f"none of its records can be reused: {reason}"
    else:
        again = shlex.join(["--caches", str(caches), *words, "--reuse-from", str(old.path)])
        remedy = f"to reuse unchanged records: {program_text('precompute')} {again}"
    return f"the dataset has changed since {old.path} was made: {change}\n  {remedy}"


def _nothing_carried(old: TeacherCache, reason: str) -> CacheMismatch:
    return CacheMismatch(f"no record of {old.path} can be reused: {reason}")


def _depends_on_all_samples(identity: Identity) -> bool:
    mixes = identity["views"]["augment"].get("mix") is not None
    return mixes or identity["teacher"]["bn"] == "recalibrated"


class Carrier:
    """Copies reusable records of the cache `old`, and caches which blocks are unchanged."""

    def __init__(self, setup: Setup, old: TeacherCache) -> None:
        self.old, self._setup = old, setup
        self._unchanged: dict[int, bool] = {}  # by block number

    def carry_over(self, writer: Destination) -> list[Work]:
        """Commit the unchanged blocks of the writer's work; returns the remaining work.

        Raises CacheMismatch if none can be copied.
        """
        self.check_same_blocks(writer.manifest)
        left = []
        for item in writer.work:
            if self.holds(item, writer.manifest):
                writer.copy_block(item, self.old.source)
            else:
                left.append(item)
        return left

    def check_same_blocks(self, manifest: Manifest) -> None:
        """Raise CacheMismatch if no block can be copied into a cache with this manifest."""
        check_reusable(self._setup, self.old)
        if self.old.manifest.block_rows != manifest.block_rows:
            raise _nothing_carried(self.old, "its block size differs")
        shown = preview_views(self._setup.dataset.train, self._setup.config.views)
        if not np.array_equal(shown, self.old.preview):
            reason = "sample 0 has changed, or images are now decoded differently"
            raise _nothing_carried(self.old, reason)

    def holds(self, item: Work, manifest: Manifest) -> bool:
        """Return True if the old cache has these records, in the form required by `manifest`."""
        return (
            item.block.view < self.old.num_views
            and all(
                self.old.taps.get(tap) == manifest.taps[tap]
                for tap in set(item.taps) - {SAMPLE_DIGEST}
            )
            and self._is_unchanged(item.block)
        )

    def _is_unchanged(self, block: Block) -> bool:
        """Return True if all samples of the block have the same bytes and labels as before."""
        if block.index not in self._unchanged:
            self._unchanged[block.index] = self._compared(block)
        return self._unchanged[block.index]

    def _compared(self, block: Block) -> bool:
        train, digests = self._setup.dataset.train, self.old.sample_digest
        if self.old.manifest.block(block.view, block.index) != block:
            return False  # the last block of a view, whose size differs
        ids = np.arange(block.start, block.stop)
        pair = train.labels, self.old.labels
        labels, before = (None if each is None else each[ids] for each in pair)
        return same_labels(labels, before) and np.array_equal(train.read_digests(ids), digests[ids])
