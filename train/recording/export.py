"""Export a trained student: a plain state dict, a torch.export program, and their card.

student.pt     the network's state dict, for the constructor of its architecture
student.pt2    torch.export, for any batch size: normalized float32 (B, C, H, W) -> logits (B, K),
               or embedding (B, D) if no loss of the method reads logits
student.json   architecture, classes, normalization, metrics, origin, and checksums
student-ema.*  the same files for averaged weights, if the recipe has them

The weights are verified with the checksum in the run's summary, and the program must give the
network's logits on test images, up to rounding. The folder is renamed into place when it is
complete, so it never mixes two students. Errors are measured again but not compared with the run's,
because a few samples may change class on another device.
"""

from __future__ import annotations

import dataclasses
import io
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from teach_once.configs.commands import student_command
from teach_once.configs.schema import as_plain
from teach_once.nets.networks.archs import may_have_stem
from teach_once.nets.student import build_student, is_pair, thinner
from teach_once.nets.weights.files import load_weights
from teach_once.runtime.machine.devices import pick_device
from teach_once.runtime.safe.files import folder_written_aside
from teach_once.runtime.safe.safe_read import BadFile
from teach_once.runtime.safe.text import one_line
from teach_once.store.identity import file_sha256, identity_sha256
from teach_once.store.read.mirror import named_as
from teach_once.train.engine.comparison import Evaluator, MetricCount
from teach_once.train.engine.evaluation import evaluate
from teach_once.train.errors import TrainError
from teach_once.train.method.connectors import hint_stage
from teach_once.train.recording.exported import NAMES, card_document, verify_export
from teach_once.train.runs.evaluation import evaluator_of, num_outputs
from teach_once.train.runs.files import EMA, SUMMARY_FILE
from teach_once.train.runs.study import Run
from teach_once.train.terms import looked_at
from teach_once.views.pixels.batches import Pixels
from teach_once.views.pixels.resident import evaluation_pixels

# Largest difference of the program's logits from the network's, relative to the largest logit: both
# compute in float32, but may sum in another order.
_ROUNDING = 1e-3
_COMPARED_IMAGES = 256

Which = Literal["best", "last", "best-ema", "last-ema"]


def export_student(
    run: Run, which: Sequence[Which], folder: Path, *, device: str = "auto"
) -> list[dict[str, Any]]:
    """Write three files for each of these weights into a new `folder`; returns their cards.

    Files of averaged weights are called `student-ema`. An earlier export of the same run is
    replaced as a whole. Raises TrainError, also if the folder contains another run's export, and
    BadFile if it contains anything else.
    """
    _check_same_run(run, folder)
    weights = {each: _intact_weights(run, each) for each in which}
    with folder_written_aside(folder, NAMES) as aside:
        return [_exported(run, each, weights[each], aside, device) for each in which]


def _check_same_run(run: Run, folder: Path) -> None:
    """Raise TrainError if the folder contains the export of another run."""
    try:
        cards = verify_export(folder)
    except (BadFile, OSError):
        return  # no export, or a damaged one, which is replaced
    for card in cards:
        own = {"model": run.study.config.student.arch, "method": run.method, "seed": run.seed}
        own |= {"cache_sha256": identity_sha256(run.study.cache.identity)}
        own |= {"run_sha256": run.sha256}
        if other := [f"{key} {card.get(key)}" for key in own if card.get(key) != own[key]]:
            raise TrainError(
                f"{folder} contains the export of another run ({one_line(', '.join(other))}), "
                f"which would be lost",
                fix=f"choose another folder, or: rm -r {shlex.quote(str(folder))}",
            )


def _exported(run: Run, which: Which, weights: Path, folder: Path, device: str) -> dict[str, Any]:
    study, picked = run.study, pick_device(device)
    file = folder / ("student" + (EMA if which.endswith(EMA) else ""))
    plain_file, program_file = file.with_suffix(".pt"), file.with_suffix(".pt2")
    shutil.copyfile(weights, plain_file)
    _check_weights_file(plain_file, run, which)
    network = _loaded(run, plain_file).to(picked)
    test = evaluation_pixels(
        study.dataset.test, study.teacher.views, study.teacher.dataset.normalization, picked
    )
    evaluator = evaluator_of(run, network)
    metrics = evaluate(network, test, run.training.precision, picked, evaluator)
    plain = network.cpu().eval().to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    program = _written_program(plain, test, program_file)
    card = {
        **_origin(run, which),
        "input_shape": [test.shape[2], test.shape[0], test.shape[1]],
        "output": "logits" if evaluator.num_classes else "embedding",
        "output_size": _output_size(program, test),
        "metrics": metrics,  # measured again, on this device
        "program_metrics": _measure_program(program, test, evaluator),  # in float32
        "files_sha256": {each.name: file_sha256(each) for each in (plain_file, program_file)},
    }
    file.with_suffix(".json").write_bytes(card_document(card))
    return card


def weights_of(run: Run, when: Literal["best", "last"]) -> list[Which]:
    """Return a run's weights of that epoch: the network's, and their average if it has one."""
    averaged: Which = "best-ema" if when == "best" else "last-ema"
    return [when, averaged] if averaged in (run.summary or {}) else [when]


def _intact_weights(run: Run, which: Which) -> Path:
    """Return the weights file of a finished run. Raises TrainError unless it is intact."""
    if run.summary is None:
        raise TrainError(f"{run.folder} is not finished", fix=_command(run))
    weights = run.folder / f"{which}.pt"
    if not weights.is_file():
        raise TrainError(f"file {weights} not found", fix=_again(run))
    _check_weights_file(weights, run, which)
    return weights


def _check_weights_file(file: Path, run: Run, which: Which) -> None:
    """Raise TrainError unless the file contains the run's final weights."""
    name = f"{which}.pt"
    expected = ((run.summary or {}).get("files_sha256") or {}).get(name)
    if expected is None:
        raise TrainError(f"{run.folder / SUMMARY_FILE} has no sha256 of {name}", fix=_again(run))
    if file_sha256(file) != expected:
        raise TrainError(
            f"{run.folder / name} does not contain the final weights of this run: its sha256 "
            f"differs from that in {SUMMARY_FILE}",
            fix=_again(run),
        )


def _again(run: Run) -> str:
    return f"rm -r {shlex.quote(str(run.folder))} && {_command(run)}"


def _command(run: Run) -> str:
    study = run.study
    return student_command(
        study.config,
        study.teacher,
        run.method,
        run.seed,
        caches_dir=named_as(study.cache.path.parent),
        runs_dir=study.runs_dir,
    )


def _origin(run: Run, which: Which) -> dict[str, Any]:
    """Return the origin of an export for its card."""
    study, summary = run.study, run.summary
    assert summary is not None
    student = study.config.student
    return {
        "model": student.arch,
        **({"stem": student.stem} if may_have_stem(student.arch) else {}),
        "options": dict(student.options),
        **({"two_of": as_plain(thinner(student))} if is_pair(looked_at(run.terms)) else {}),
        "classes": list(study.dataset.class_names or ()),
        "normalization": as_plain(study.teacher.dataset.normalization),
        "shown": as_plain(study.teacher.views.eval_transform),
        "method": run.method,
        "seed": run.seed,
        "run_sha256": run.sha256,
        "epoch": summary[which].get("epoch", summary["epochs"]),
        "reported_metrics": summary[which].get("metrics", summary[which]),
        "cache": summary["cache"],
        "cache_sha256": summary["cache_sha256"],
    }


def _loaded(run: Run, weights: Path) -> nn.Module:
    study = run.study
    network = build_student(
        study.config.student,
        looked_at(run.terms),
        hint_stage(study.cache.taps),
        num_classes=num_outputs(run),
        image_shape=study.image_shape,
    )
    load_weights(network, weights)
    channels_last: nn.Module = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return channels_last


def _written_program(network: nn.Module, test: Pixels, path: Path) -> nn.Module:
    """Export the program, load it again and compare it with the network."""
    height, width, channels = test.shape
    example = torch.zeros(2, channels, height, width)
    batch = torch.export.Dim("batch", min=1, max=2**16)
    program = torch.export.export(network, (example,), dynamic_shapes=({0: batch},))
    archive = io.BytesIO()  # with a path, torch reports a full disk as another error
    torch.export.save(program, archive)
    path.write_bytes(archive.getbuffer())
    module: nn.Module = torch.export.load(path).module()
    _compare(module, network, test)
    return module


@torch.no_grad()
def _compare(program: nn.Module, network: nn.Module, test: Pixels) -> None:
    """Raise TrainError unless both give the same logits for the same images, up to rounding."""
    some = np.arange(min(len(test), _COMPARED_IMAGES))
    batch, *_ = test.batches([0], some, _COMPARED_IMAGES)
    images = batch.inputs.cpu()
    logits, theirs = network(images), program(images)
    difference = (theirs - logits).abs().max().item() / max(logits.abs().max().item(), 1e-12)
    if not difference <= _ROUNDING:
        raise TrainError(
            f"the exported program's logits differ from the network's by "
            f"{difference:.2g} of the largest logit, expected at most {_ROUNDING:.2g}",
            fix="use the run's best.pt or last.pt, and find code that depends on its input",
        )


@torch.no_grad()
def _output_size(program: nn.Module, test: Pixels) -> int:
    height, width, channels = test.shape
    return int(program(torch.zeros(1, channels, height, width)).shape[1])


@torch.no_grad()
def _measure_program(program: nn.Module, test: Pixels, evaluator: Evaluator) -> dict[str, float]:
    """Measure the program on the test images, as far as its outputs allow."""
    count = MetricCount(evaluator, len(test))
    for batch in test.batches([0], np.arange(len(test)), 256):
        outputs: Tensor = program(batch.inputs.cpu())
        on_host = dataclasses.replace(batch, labels=batch.labels.cpu())
        count.add(on_host, outputs, None if evaluator.num_classes else outputs)
    return count.values(torch.device("cpu"))
