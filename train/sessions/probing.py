"""Probe a finished student: its embedding before and after training, and its teacher's.

The teacher's embeddings are in the cache, so no teacher runs. The result is in the run's folder and
depends on neither the run's identity nor its summary: a probe may be added, or changed, later.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from teach_once.configs.schema import as_plain
from teach_once.nets.networks.classifier import classifiers_of, embedding_read, read_embedding
from teach_once.nets.networks.layout import TapError
from teach_once.nets.teacher.taps import in_order
from teach_once.nets.weights.files import load_weights
from teach_once.nets.weights.start import start_student
from teach_once.runtime.command.options import Compute
from teach_once.runtime.machine.devices import pick_device
from teach_once.runtime.safe.files import write_atomically
from teach_once.store.errors import CacheError
from teach_once.store.identity import evaluation_identity
from teach_once.store.read.evaluation import PROBES, evaluation_name, open_evaluation
from teach_once.train.engine.evaluation import compute_logits, evaluation_batches, evaluation_mode
from teach_once.train.engine.probe import probe_accuracies
from teach_once.train.errors import TrainError
from teach_once.train.runs.files import PROBE_FILE, probe_document
from teach_once.train.runs.probes import RunProbe
from teach_once.train.runs.study import Run
from teach_once.train.runs.teachers import pass_command
from teach_once.train.sessions.student import fresh_network
from teach_once.views.datasets import Dataset
from teach_once.views.pixels.resident import evaluation_pixels
from teach_once.views.probe import check_disjoint

Embedded = tuple[Tensor, Tensor]  # embeddings (N, D) and labels (N,)


def measure_probe(probe: RunProbe, compute: Compute) -> Mapping[str, Any]:
    """Measure the probe of a finished run, and write the result into the run's folder.

    Raises TrainError, DatasetError or ArchError.
    """
    run, study = probe.run, probe.run.study
    check_disjoint(probe.train.train, probe.test.train)
    teacher = _of_teacher(probe)
    device = pick_device(compute.device)
    before, after = fresh_network(run), fresh_network(run)
    start = start_student(before, study.config, study.image_shape)
    load_weights(after, run.folder / "last.pt")

    def measured(network: nn.Module) -> dict[str, float]:
        network = network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        parts = [_embedded(run, network, part, compute) for part in (probe.train, probe.test)]
        return probe_accuracies(*parts[0], *parts[1])

    document = {
        **probe.images,
        "num_train": len(probe.train.train),
        "num_test": len(probe.test.train),
        "num_classes": probe.train.num_classes,
        "start": "random weights" if start is None else "pretrained weights",
        "before": measured(before),
        "after": measured(after),
        "teacher": probe_accuracies(*teacher[0], *teacher[1]),
    }
    write_atomically(run.folder / PROBE_FILE, probe_document(document, run.sha256))
    return document


def _of_teacher(probe: RunProbe) -> list[Embedded]:
    """Read the first teacher's embeddings of both parts from its cache."""
    cache, config = probe.run.study.cache, probe.run.study.teacher
    transform = as_plain(config.views.eval_transform)
    found = []
    for prefix, part in zip(PROBES, (probe.train, probe.test), strict=True):
        name = evaluation_name(evaluation_identity(cache.identity, part.digest, transform), prefix)
        try:
            opened = open_evaluation(cache.path, cache.identity, name)
        except CacheError:
            raise TrainError(
                f"{cache.path} has no teacher outputs of the probe's images",
                fix=pass_command(config, cache.path.parent),
            ) from None
        tap = "embedding" if "embedding" in opened.taps else in_order(opened.taps, "stage")[-1]
        assert opened.labels is not None
        values = torch.from_numpy(opened.read_view(0, [tap])[tap]).float()
        found.append((values, torch.from_numpy(opened.labels)))
    return found


def _embedded(run: Run, network: nn.Module, part: Dataset, compute: Compute) -> Embedded:
    study = run.study
    device, views = pick_device(compute.device), study.teacher.views
    normalization = study.teacher.dataset.normalization
    pixels = evaluation_pixels(part.train, views, normalization, device, compute.workers)
    try:
        classifiers = classifiers_of(network, study.image_shape)
    except TapError as error:
        raise TrainError(f"probe: {error.problem}", fix=error.fix) from None
    values: dict[str, Tensor] = {}
    embeddings, labels = [], []
    with evaluation_mode(network), read_embedding(network, classifiers, values):
        for batch in evaluation_batches(pixels):
            compute_logits(network, batch, run.training.precision, device)
            embeddings.append(embedding_read(values, classifiers).float())
            labels.append(batch.labels)
    return torch.cat(embeddings), torch.cat(labels)
