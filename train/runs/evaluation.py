"""How a run's network is evaluated: by its errors, and by comparison with its teacher.

The teacher's outputs of the test images are in an evaluation cache inside the study's cache; no
teacher runs.
"""

from __future__ import annotations

from torch import nn

from teach_once.nets.networks.classifier import classifiers_of
from teach_once.nets.networks.layout import TapError
from teach_once.train.engine.comparison import FEWEST_COMPARED, Evaluator
from teach_once.train.errors import TrainError
from teach_once.train.method.connectors import Connectors
from teach_once.train.runs.study import Run
from teach_once.train.runs.teachers import pass_command
from teach_once.train.terms import head_classes


def evaluator_of(run: Run, network: nn.Module, connectors: Connectors | None = None) -> Evaluator:
    """Return how the run's network is evaluated.

    connectors: those that are trained with the network, if there are any.

    Raises TrainError if it would have no metric: the images have no labels, or the method reads no
    logits, and the cache has no outputs of the test images.
    """
    study = run.study
    reference = study.reference
    try:
        classifiers = classifiers_of(network, study.image_shape)
    except TapError:  # a network without a single embedding
        classifiers = ()
    projector = connectors.projector if connectors is not None else None
    evaluator = Evaluator(
        has_labels=study.dataset.has_labels,
        num_classes=num_outputs(run),
        reference=reference,
        classifiers=classifiers,
        connect=projector,
    )
    if not (evaluator.counts_errors or evaluator.reads_embedding):
        raise _no_metric(run, evaluator)
    return evaluator


def num_outputs(run: Run) -> int:
    """Return the number of the student's logits; 0 if it has no classifier."""
    study = run.study
    return head_classes(run.method, run.terms, study.dataset.num_classes, study.cache.taps)


def _no_metric(run: Run, evaluator: Evaluator) -> TrainError:
    teacher = run.study.teachers[0]
    why = "its images have no labels" if not evaluator.has_labels else "no loss reads logits"
    if not evaluator.classifiers:
        return TrainError(
            f"{run}: as {why}, the student is evaluated by its embedding, but "
            f"{run.study.config.student.arch} has none",
            fix="choose another student.arch",
        )
    if (num_test := len(run.study.dataset.test)) < FEWEST_COMPARED:
        return TrainError(
            f"{run}: as {why}, the student is compared with its teacher on the test images: "
            f"found {num_test}, expected at least {FEWEST_COMPARED}",
            fix="use more images, or set a larger dataset.holdout_fraction in the teacher's file",
        )
    return TrainError(
        f"{run}: as {why}, the student is compared with its teacher on the test images, but "
        f"{teacher.cache.path} has no embeddings or channel means of them",
        fix=pass_command(teacher.config, teacher.cache.path.parent),
    )
