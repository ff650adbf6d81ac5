"""Several teachers as one: what a step is given of them, from caches or from networks in the loop.

Logits are the logarithm of the weighted mean of the teachers' probabilities, so that every loss on
logits applies; `correct` is decided on that mean. The stages of the second teacher are numbered
behind those of the first, and so on; means are scaled by the square root of the teacher's weight,
on both sides, so that a sum of squared differences counts each teacher by its weight.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from teach_once.configs.schema import Normalisation
from teach_once.nets.teacher.taps import in_order
from teach_once.train.method.ensemble_taps import number_stages
from teach_once.train.outputs.teacher_outputs import Ids, TeacherSource
from teach_once.views.pixels.batches import ViewBatch


class TeacherEnsemble:
    """The outputs of several sources as one; `TeacherSource`."""

    def __init__(
        self,
        sources: Sequence[TeacherSource],
        weights: Sequence[float],
        num_stages: Sequence[int],
        normalisations: Sequence[Normalisation] = (),
    ) -> None:
        """normalisations: of each teacher, where networks run on the student's inputs, which have
        the first one's; empty where outputs are read from caches.
        """
        self._sources, self._weights = sources, weights
        self._stages = number_stages(num_stages)
        self._normalisations = normalisations
        self._rescalings: dict[tuple[int, torch.device], tuple[Tensor, ...]] = {}
        self.where = "; ".join(dict.fromkeys(source.where for source in sources))

    def order(self, seed: int, epoch: int, num_samples: int) -> Ids:
        return self._sources[0].order(seed, epoch, num_samples)

    def start_epoch(self, epoch: int, order: Ids) -> None:
        for source in self._sources:
            source.start_epoch(epoch, order)

    def close(self) -> None:
        for source in self._sources:
            source.close()

    def outputs(self, batch: ViewBatch) -> dict[str, Tensor]:
        """As those of one teacher; logits float32, `correct` uint8."""
        of_each = [
            source.outputs(self._as_shown(batch, number))
            for number, source in enumerate(self._sources)
        ]
        merged: dict[str, Tensor] = {}
        if "logits" in of_each[0]:
            merged["logits"] = mean_log_probabilities([o["logits"] for o in of_each], self._weights)
            merged["correct"] = (merged["logits"].argmax(dim=1) == batch.labels).to(torch.uint8)
        for outputs, names, weight in zip(of_each, self._stages, self._weights, strict=True):
            for stage in in_order(outputs, "stage"):
                merged[names[stage]] = outputs[stage].float() * math.sqrt(weight)
        return merged

    def _as_shown(self, batch: ViewBatch, number: int) -> ViewBatch:
        """The batch with the normalisation of teacher `number`."""
        if not self._normalisations or self._normalisations[number] == self._normalisations[0]:
            return batch
        mean, std, their_mean, their_std = self._rescaling(number, batch.inputs.device)
        return replace(batch, inputs=(batch.inputs * std + mean - their_mean) / their_std)

    def _rescaling(self, number: int, device: torch.device) -> tuple[Tensor, ...]:
        """Mean and std of the first teacher and of teacher `number`, each (1, C, 1, 1).

        Copied to the device once, since copying numbers there in each step would wait for it.
        """
        if (number, device) not in self._rescalings:
            ours, theirs = self._normalisations[0], self._normalisations[number]
            self._rescalings[number, device] = tuple(
                torch.tensor(values, device=device).reshape(1, -1, 1, 1)
                for values in (ours.mean, ours.std, theirs.mean, theirs.std)
            )
        return self._rescalings[number, device]


def mean_log_probabilities(logits: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """log of the weighted mean of softmax(logits): each (B, K) -> (B, K) float32."""
    total = sum(weights)
    weighted = [
        F.log_softmax(each.float(), dim=1) + math.log(weight / total)
        for each, weight in zip(logits, weights, strict=True)
    ]
    return torch.logsumexp(torch.stack(weighted), dim=0)
