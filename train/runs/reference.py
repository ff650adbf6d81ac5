"""The teachers' outputs of the test images, from the evaluation caches inside their caches.

With several teachers, a student is compared with their mean probabilities and with the weighted
mean of the cosines of their embeddings.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from teach_once.configs.schema import as_plain
from teach_once.nets.teacher.taps import in_order
from teach_once.store.errors import CacheError
from teach_once.store.format.spec import Block
from teach_once.store.identity import evaluation_identity
from teach_once.store.read.evaluation import evaluation_name, open_evaluation
from teach_once.store.read.reader import TeacherCache
from teach_once.train.engine.comparison import TeacherReference
from teach_once.train.runs.teachers import StudyTeacher


def read_reference(teachers: Sequence[StudyTeacher], test_digest: str) -> TeacherReference | None:
    """Read the teachers' outputs of the test images with this digest; None if one has none."""
    read: list[dict[str, Tensor]] = []
    for teacher in teachers:
        cache, transform = teacher.cache, as_plain(teacher.config.views.eval_transform)
        name = evaluation_name(evaluation_identity(cache.identity, test_digest, transform))
        try:
            read.append(_test_outputs(open_evaluation(cache.path, cache.identity, name)))
        except CacheError:
            return None
    weights = [teacher.weight for teacher in teachers]
    return TeacherReference(
        _common_logits([each.get("logits") for each in read], weights),
        _common_embedding([each.get("embedding") for each in read], weights),
        is_pre_logits=len(teachers) == 1 and "embedding" in teachers[0].cache.taps,
    )


def _test_outputs(evaluation: TeacherCache) -> dict[str, Tensor]:
    """Return the logits of a cache's samples, and their embeddings or else last channel means."""
    taps = evaluation.taps
    last = in_order(taps, "stage")[-1:]
    sources = {
        "logits": "logits",
        "embedding": "embedding" if "embedding" in taps else "".join(last),
    }
    names = {name: tap for name, tap in sources.items() if tap in taps}
    blocks = [evaluation.read_block(each, list(names.values())) for each in _blocks(evaluation)]
    return {
        name: torch.from_numpy(np.concatenate([block[tap] for block in blocks])).float()
        for name, tap in names.items()
    }


def _blocks(cache: TeacherCache) -> list[Block]:
    return [cache.manifest.block(0, index) for index in range(cache.manifest.blocks_per_view)]


def _common_logits(of_each: Sequence[Tensor | None], weights: Sequence[float]) -> Tensor | None:
    """Return logits whose probabilities are the weighted mean of the teachers'; (N, K)."""
    logits = [each for each in of_each if each is not None]
    if len(logits) < len(weights):
        return None
    if len(logits) == 1:
        return logits[0]
    parts = [F.log_softmax(own, 1) + math.log(w) for own, w in zip(logits, weights, strict=True)]
    return torch.stack(parts).logsumexp(dim=0)


def _common_embedding(of_each: Sequence[Tensor | None], weights: Sequence[float]) -> Tensor | None:
    """Return vectors whose cosines are the weighted mean of those of the teachers' embeddings."""
    embeddings = [each for each in of_each if each is not None]
    if len(embeddings) < len(weights):
        return None
    if len(embeddings) == 1:
        return embeddings[0]
    parts = [F.normalize(own) * math.sqrt(w) for own, w in zip(embeddings, weights, strict=True)]
    return torch.cat(parts, dim=1)
