"""Strict reading of a run's text files: run.json, metrics.jsonl and summary.json.

Each has a checksum over its content and its run's identity, and the metrics of a summary are
recomputed from metrics.jsonl. A flipped bit, a file of another run or an edited number is an error
that names the file. Does not import torch.
"""

from __future__ import annotations

import io
import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from teach_once.runtime.metrics import PROBED, Values, check_values, deciding_metric
from teach_once.runtime.safe.safe_read import BadFile, open_regular, parse_json, read_bounded
from teach_once.runtime.safe.text import one_line
from teach_once.store.identity import canonical_json, identity_sha256

EMA = "-ema"  # suffix of the names of averaged weights
BEST_NAMES = ("best", f"best{EMA}")


def prefix_of(name: str) -> str:
    """Return the prefix of the metrics' keys for the errors of weights `name` ("best-ema")."""
    return "ema_" if name.endswith(EMA) else ""


def best_of(metrics: Sequence[Mapping[str, Any]], prefix: str = "") -> Mapping[str, Any] | None:
    """Return the best epoch by its deciding metric (first on ties); None if untested."""
    best: Mapping[str, Any] | None = None
    for epoch in metrics:
        if (value := deciding_value(epoch, prefix)) is None:
            continue
        metric = deciding_metric(_deciding_values(epoch, prefix))
        if best is None or metric.is_better(value, deciding_value(best, prefix) or 0.0):
            best = epoch
    return best


def deciding_value(epoch: Mapping[str, Any], prefix: str = "") -> float | None:
    """Return the value that selects the best epoch, of validation, else of test; or None."""
    if not (values := _deciding_values(epoch, prefix)):
        return None
    return values[deciding_metric(values).name]


def _deciding_values(epoch: Mapping[str, Any], prefix: str) -> Values:
    return epoch.get(f"{prefix}validation") or epoch.get(f"{prefix}test") or {}


def figures_of(metrics: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the entries of a summary for these epochs; the last epoch must have been tested."""
    last = metrics[-1]
    figures: dict[str, Any] = {"epochs": last["epoch"]}
    for kind in ("", EMA):
        prefix = prefix_of(kind)
        if (best := best_of(metrics, prefix)) is not None:
            chosen_on = "test" if last[f"{prefix}validation"] is None else "validation"
            figures[f"last{kind}"] = last[f"{prefix}test"]
            figures[f"best{kind}"] = {
                "epoch": best["epoch"],
                "chosen_on": chosen_on,
                "metrics": best[f"{prefix}test"],
            }
    return figures


RUN_FILE = "run.json"
SUMMARY_FILE = "summary.json"
PROBE_FILE = "probe.json"
METRICS_FILE = "metrics.jsonl"
CHECKPOINT_FILE = "checkpoint.pt"

_MOST_BYTES = 4 * 2**20  # size of run.json and summary.json
_MOST_LINE_BYTES = 64 * 2**10
_CHECKSUM = "content_sha256"
_LINE_DIGITS = 16  # digits of a sha256

Count = Annotated[int, Field(ge=0, le=2**31 - 1)]
Seed = Annotated[int, Field(ge=0, lt=2**64)]
Metrics = Annotated[dict[str, float], AfterValidator(check_values)]
Seconds = Annotated[float, Field(ge=0, le=1e11)]
Text = Annotated[str, Field(max_length=1000)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
File = Literal["last.pt", "best.pt", "last-ema.pt", "best-ema.pt"]


class _Document(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


# ---- run.json


class _Epochs(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")
    epochs: Annotated[int, Field(ge=1, le=2**31 - 1)]


class _Run(BaseModel):
    """The fields of an identity that readers use; others are only compared."""

    model_config = ConfigDict(strict=True, extra="allow")
    run_sha256: Sha256
    training: _Epochs
    seed: Seed = 0  # a teacher's seed is in its training block
    num_views: Count = 0
    teacher_outputs: Literal["cache", "live"] = "cache"
    terms: list[dict[str, Any]] = []
    cache: dict[str, Any] = {}


def run_document(identity: Mapping[str, Any]) -> bytes:
    """Build the bytes of run.json."""
    return _pretty({**identity, "run_sha256": identity_sha256(identity)})


def read_run(folder: Path) -> dict[str, Any] | None:
    """Read the identity of a folder's run; None if it has no run.json. Raises BadFile."""
    if (content := _read(folder / RUN_FILE, _Run)) is None:
        return None
    if content.pop("run_sha256") != identity_sha256(content):
        raise _unlike_its_checksum(folder / RUN_FILE)
    return content


# ---- metrics.jsonl


class _Epoch(_Document):
    epoch: Count
    loss: float
    losses: dict[Text, float]
    weights: dict[Text, float]
    test: Metrics | None
    validation: Metrics | None
    ema_test: Metrics | None = None  # of averaged weights, if the recipe has them
    ema_validation: Metrics | None = None
    learning_rate: Annotated[float, Field(ge=0)]
    train_seconds: Seconds
    wait_seconds: Seconds
    check: Text


def metrics_line(epoch: Mapping[str, Any], run_sha256: str) -> bytes:
    """Build a line of metrics.jsonl, with its checksum."""
    return json.dumps({**epoch, "check": _line_check(epoch, run_sha256)}).encode() + b"\n"


def read_metrics(
    folder: Path, run_sha256: str, *, first: int | None = None
) -> list[dict[str, Any]] | None:
    """Read the epochs of a run; None if the file is missing.

    first: number of epochs to read; the rest may be truncated. Raises BadFile if it is damaged.
    """
    try:
        return list(islice(_epochs(folder / METRICS_FILE, run_sha256), first))
    except FileNotFoundError:
        return None


def count_epochs(folder: Path, run_sha256: str) -> int:
    """Count the recorded epochs of a run, up to the first invalid line."""
    done = 0
    try:
        for _ in _epochs(folder / METRICS_FILE, run_sha256):
            done += 1
    except (BadFile, OSError):
        pass
    return done


def _epochs(path: Path, run_sha256: str) -> Iterator[dict[str, Any]]:
    with _opened(path) as raw, io.BufferedReader(raw) as file:  # type: ignore[type-var]
        number = 0
        while line := file.readline(_MOST_LINE_BYTES + 1):
            number += 1
            yield _epoch(line, number, path, run_sha256)


def _opened(path: Path) -> BinaryIO:
    try:
        return open_regular(path)
    except BadFile as error:
        raise _bad(path, error.what) from None


def _epoch(line: bytes, number: int, path: Path, run_sha256: str) -> dict[str, Any]:
    if not line.endswith(b"\n"):
        raise _bad(path, f"is truncated in line {number:,}, or the line is too long")
    try:
        content = parse_json(line, path)
    except BadFile as error:
        raise _bad(path, f"line {number:,} {error.what}") from None
    epoch = _validated(content, _Epoch, path, f"line {number:,}: ")
    if epoch.pop("check") != _line_check(epoch, run_sha256):
        raise _bad(
            path,
            f"line {number:,} does not match its checksum, or belongs to another run",
        )
    if epoch["epoch"] != number:
        raise _bad(path, f"line {number:,} belongs to epoch {epoch['epoch']:,}")
    return epoch


def _line_check(epoch: Mapping[str, Any], run_sha256: str) -> str:
    return identity_sha256({"epoch": dict(epoch), "run": run_sha256})[:_LINE_DIGITS]


# ---- summary.json


class _Best(_Document):
    epoch: Annotated[int, Field(ge=1)]
    chosen_on: Literal["test", "validation"]
    metrics: Metrics


class _Summary(_Document):
    run_sha256: Sha256
    epochs: Annotated[int, Field(ge=1)]
    last: Metrics
    best: _Best
    last_ema: Metrics | None = Field(default=None, alias="last-ema")
    best_ema: _Best | None = Field(default=None, alias="best-ema")
    files_sha256: dict[File, Sha256]
    seconds: Seconds
    content_sha256: Sha256


class _StudentSummary(_Summary):
    student: Text
    model: Text
    num_samples: Annotated[int, Field(ge=1, le=2**31 - 1)]
    num_classes: Count
    is_taught: bool
    method: Text
    seed: Seed
    cache: Text
    num_teachers: Annotated[int, Field(ge=1, le=1000)]
    cache_sha256: Text
    teacher: dict[Text, float]
    teacher_weights: Annotated[list[Text], Field(max_length=1000)]
    device: Text
    threads: Count
    versions: dict[Text, Text]


class _TeacherSummary(_Summary):
    weights_sha256: Sha256
    torch: Text
    settings: dict[str, Any]


# ---- probe.json


def _check_probed(values: Mapping[str, Any]) -> dict[str, float]:
    for metric in PROBED:
        if not metric.is_valid(values.get(metric.name)):
            raise ValueError(f"{metric.name} is {values.get(metric.name)!r}")
    return dict(values)


_Probed = Annotated[dict[str, float], AfterValidator(_check_probed)]


class _Probe(_Document):
    run_sha256: Sha256
    train_digest: Text
    test_digest: Text
    num_train: Count
    num_test: Count
    num_classes: Count
    start: Text
    before: _Probed
    after: _Probed
    teacher: _Probed
    content_sha256: Sha256


def probe_document(probe: Mapping[str, Any], run_sha256: str) -> bytes:
    """Build the bytes of probe.json."""
    content = {"run_sha256": run_sha256, **probe}
    return _pretty({**content, _CHECKSUM: identity_sha256(content)})


def read_probe(folder: Path, run_sha256: str) -> dict[str, Any] | None:
    """Read a run's probe; None if it has none. Raises BadFile if it is damaged or another run's."""
    path = folder / PROBE_FILE
    if (content := _read(path, _Probe)) is None:
        return None
    if content.pop(_CHECKSUM) != identity_sha256(content):
        raise _unlike_its_checksum(path)
    if content.pop("run_sha256") != run_sha256:
        raise _bad(path, "belongs to another run")
    return content


def summary_document(summary: Mapping[str, Any]) -> bytes:
    """Build the bytes of summary.json."""
    return _pretty({**summary, _CHECKSUM: identity_sha256(summary)})


def read_summary(folder: Path, *, of_teacher: bool = False) -> dict[str, Any] | None:
    """Read a folder's summary, of any run; None if it has none. Raises BadFile if it is damaged."""
    path = folder / SUMMARY_FILE
    if (content := _read(path, _TeacherSummary if of_teacher else _StudentSummary)) is None:
        return None
    if content.pop(_CHECKSUM) != identity_sha256(content):
        raise _unlike_its_checksum(path)
    return content


def read_result(folder: Path, identity: Mapping[str, Any]) -> dict[str, Any] | None:
    """Read the summary of a finished student, and compare its metrics with metrics.jsonl.

    Returns None if the folder has no summary, or a summary of another identity. Raises BadFile if
    the files are damaged or disagree.
    """
    sha256 = identity_sha256(identity)
    summary = read_summary(folder)
    if summary is None or summary["run_sha256"] != sha256:
        return None
    recorded = read_run(folder)
    if recorded is not None and identity_sha256(recorded) != sha256:
        raise _bad(folder / RUN_FILE, f"and {SUMMARY_FILE} next to it belong to different runs")
    if summary["epochs"] != identity["training"]["epochs"]:
        raise _bad(
            folder / SUMMARY_FILE,
            f"has epochs {summary['epochs']:,}, but the run has {identity['training']['epochs']:,}",
        )
    if (metrics := read_metrics(folder, sha256)) is not None:
        _compare_figures(folder / SUMMARY_FILE, summary, metrics)
    return summary


def _compare_figures(
    path: Path, summary: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]]
) -> None:
    """Raise BadFile unless a summary agrees with the metrics."""
    if not metrics or deciding_value(metrics[-1]) is None:
        raise _bad(path, f"has results that {METRICS_FILE} next to it lacks")
    figures = figures_of(metrics)
    for name in ("epochs", "last", "best", f"last{EMA}", f"best{EMA}"):
        found, expected = summary.get(name), figures.get(name)
        if found != expected:
            raise _bad(
                path,
                f"has {name} {one_line(found)}, but {METRICS_FILE} gives {one_line(expected)}",
            )


# ---- all files


def _pretty(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(json.loads(canonical_json(content)), indent=1) + "\n").encode()


def _read(path: Path, kind: type[BaseModel]) -> dict[str, Any] | None:
    try:
        content = parse_json(read_bounded(path, _MOST_BYTES), path)
    except FileNotFoundError:
        return None
    except NotADirectoryError:
        raise BadFile(
            path.parent,
            "is not a folder of a run",
            fix="move it away, or use another folder of runs",
        ) from None
    except BadFile as error:
        raise _bad(path, error.what) from None
    return _validated(content, kind, path)


def _validated(
    content: object, kind: type[BaseModel], path: Path, where: str = ""
) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise _bad(path, f"{where}contains {one_line(content, 40)}, expected an object")
    try:
        kind.model_validate(content)
    except ValidationError as error:
        raise _bad(path, where + _first_problem(error)) from None
    return content


def _first_problem(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    field = ".".join(map(str, first["loc"]))
    if first["type"] == "missing":
        return f"lacks {one_line(field)}"
    return (
        f"{one_line(field)}: found {one_line(repr(first['input']), 40)}: "
        f"{one_line(first['msg'].removeprefix('Value error, '))}"
    )


def _unlike_its_checksum(path: Path) -> BadFile:
    return _bad(path, "has been changed or damaged: its checksum does not match")


def _bad(path: Path, what: str) -> BadFile:
    folder = shlex.quote(str(path.parent))
    return BadFile(path, what, fix=f"rm -r {folder}  # and train this run again")
