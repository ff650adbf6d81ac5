"""Assign the samples of an epoch's batches to ranks.

A batch is first split into the parts of `training.gradient_accumulation`, then each part into one
slice per rank, so that batch norm and losses over several samples use the same samples as in one
process.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from teach_once.train.engine.ranks import Ranks
from teach_once.train.outputs.teacher_outputs import Ids
from teach_once.views.pixels.batches import ViewBatch, equal_parts


@dataclass(frozen=True)
class Slices:
    """The ranks' slices of an epoch's batches of `batch_size` samples in `num_parts` parts."""

    ranks: Ranks
    batch_size: int
    num_parts: int

    def of_epoch(self, order: Ids) -> Iterator[tuple[Ids, int]]:
        """Yield this rank's samples in order with its batch size: whole batches, then the rest.

        A single process yields all samples at once.
        """
        if self.ranks.is_alone:
            yield order, self.batch_size
            return
        whole = len(order) // self.batch_size * self.batch_size
        for samples, size in (
            (order[:whole], self.batch_size),
            (order[whole:], len(order) - whole),
        ):
            if len(samples):
                own = self._own(size)
                yield samples.reshape(-1, size)[:, own].ravel(), len(own)

    def samples(self, order: Ids) -> Ids:
        """Return this rank's samples of an epoch, in order."""
        return np.concatenate([ids for ids, _ in self.of_epoch(order)])

    def parts(self, own: ViewBatch, num_samples: int) -> list[tuple[ViewBatch, int]]:
        """Split this rank's slice of a batch of `num_samples` into parts.

        Returns each part with its size over all ranks.
        """
        if self.ranks.is_alone:
            return [(part, len(part.ids)) for part in own.split(self.num_parts)]
        sizes = [size for size in equal_parts(num_samples, self.num_parts) if size]
        pieces = own.cut([self.ranks.sizes(size)[self.ranks.rank] for size in sizes])
        return list(zip(pieces, sizes, strict=True))

    def _own(self, num_samples: int) -> Ids:
        """Select this rank's samples of a batch by their positions in it."""
        places, start = [], 0
        for size in equal_parts(num_samples, self.num_parts):
            places.append(np.arange(start, start + size)[self.ranks.slice_of(size)])
            start += size
        return np.concatenate(places)
