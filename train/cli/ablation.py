"""Train every method of a student with every seed: requests of a study's command, and results.

The report is written by a higher floor: `teach-once ablation` writes it, and
`python -m train ablation` prints the command for it.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from rich.console import Console

from teach_once.runtime.command.help import MACHINE
from teach_once.runtime.command.options import ClusterAddress, Compute, Overrides, StudentName
from teach_once.runtime.command.program import portable_program, program
from teach_once.runtime.command.ray import Cluster
from teach_once.runtime.formats import format_table
from teach_once.runtime.machine.resources import num_ranks
from teach_once.runtime.metrics import TOP1_ERROR, deciding_metric
from teach_once.runtime.safe.text import visible
from teach_once.train.cli.options import (
    CpusPerRun,
    GpusPerRun,
    Jobs,
    Logger,
    Methods,
    PlacementOption,
    Retrain,
    Seeds,
    SharedLoading,
    StudyStorage,
)
from teach_once.train.cli.plan import (
    ALL_FINISHED,
    PlannedRuns,
    check_runs,
    open_configs,
    open_named_study,
    parse_seeds,
    slow_precision,
)
from teach_once.train.cli.student import measure_missing_probes
from teach_once.train.errors import TrainError
from teach_once.train.recording.options import Recording
from teach_once.train.recording.tracking import check_trackers
from teach_once.train.runs.folder import FoundRun, finished_alike, runs_below
from teach_once.train.runs.retrain import begin_again
from teach_once.train.runs.study import Run, Study
from teach_once.train.runs.teachers import pass_command
from teach_once.train.studies.ablation import run_ablation


@dataclass(frozen=True)
class Execution:
    """How a study's runs are executed: one after the other, in parallel, or on a cluster."""

    panel: ClassVar = MACHINE
    jobs: Jobs = 1
    share: SharedLoading = None
    cluster: ClusterAddress = None
    cpus_per_run: CpusPerRun = 1
    gpus_per_run: GpusPerRun = None

    def check(self) -> None:
        """Raise TrainError if options conflict or a launcher has started several processes."""
        if num_ranks() > 1:
            raise TrainError(
                "ablation was started in several processes, and each would train the whole study",
                fix=f"{shlex.join(program('train'))} ablation, with --jobs; or `train student` in "
                "its place",
            )
        if self.cluster and (self.jobs > 1 or self.share):
            raise TrainError(
                "--jobs and --shared-loading are for one machine; on a cluster each run is a task"
            )


@dataclass(frozen=True)
class StudyRequest:
    """A command line's request for the runs of a study. methods: "" for all methods."""

    name: StudentName
    overrides: Overrides = None
    methods: Methods = ""
    seeds: Seeds = "0"
    storage: StudyStorage = StudyStorage()
    placement: PlacementOption = "auto"

    def open_runs(self) -> list[Run]:
        """Open the study and return the requested runs: all seeds of each method."""
        study = open_named_study(self.name, self.overrides, self.storage, self.placement)
        methods = self.methods.split() or list(study.config.methods)
        return [study.run(method, seed) for method in methods for seed in parse_seeds(self.seeds)]


@dataclass(frozen=True)
class AblationRequest(StudyRequest):
    """A request for runs with options for their training."""

    seeds: Seeds = "0 1 2"
    retrain: Retrain = False
    compute: Compute = Compute()
    execution: Execution = Execution()
    loggers: Logger = None

    def check(self) -> None:
        """Raise TrainError or ConfigError for a mistake that is found without opening files."""
        self.execution.check()
        check_trackers(self.loggers or ())
        parse_seeds(self.seeds)


class StudyResult(NamedTuple):
    """The requested runs, and the reason for each failure."""

    runs: Sequence[Run]
    failures: dict[Run, str]

    @property
    def has_finished_runs(self) -> bool:
        return len(self.failures) < len(self.runs)

    def print_failures(self) -> None:
        """Print the failures to stderr."""
        for run, failure in self.failures.items():
            print(visible(f"{run} failed: {failure}"), file=sys.stderr)


def train_study(request: AblationRequest, console: Console) -> StudyResult:
    """Train the unfinished runs. Raises as `run_ablation` does."""
    request.check()
    runs, how = request.open_runs(), request.execution
    if request.retrain:
        begin_again(runs, request.compute.device)
    if all(run.is_finished for run in runs):
        console.print(f"all {len(runs)} runs are finished: nothing to train.")
        measure_missing_probes(runs, request.compute)
        return StudyResult(runs, {})
    connection = None
    if how.cluster:
        connection = Cluster(how.cluster, console, cpus=how.cpus_per_run, gpus=how.gpus_per_run)
    with connection or nullcontext():
        failures = run_ablation(
            runs,
            request.compute,
            Recording(loggers=request.loggers or (), console=console),
            jobs=how.jobs,
            share=how.share,
            cluster=connection,
        )
    measure_missing_probes([run for run in runs if run not in failures], request.compute)
    return StudyResult(runs, failures)


def check_study(
    request: StudyRequest, device: str, console: Console, *, is_shown_if_finished: bool = True
) -> None:
    """Check a study for mistakes before the teacher runs, and print the result.

    Raises as `check_runs` does.
    """
    seeds = parse_seeds(request.seeds)
    config, teacher = open_configs(request.name, request.overrides)
    methods = request.methods.split() or list(config.methods)
    local = request.storage.local()
    runs = PlannedRuns(config, teacher, methods, seeds, local, request.placement)
    found = check_runs(runs, device, builds_networks=True)
    if found == ALL_FINISHED and not is_shown_if_finished:
        return
    if found != ALL_FINISHED and (hint := slow_precision(config, teacher, local.caches, device)):
        console.print(hint)
    which = f"{', '.join(methods)} with seed {' '.join(map(str, seeds))}"
    console.print(f"{config.name} is valid: {which}\n{found}")


# ---- results


def finished_runs(study: Study) -> list[FoundRun]:
    """Return the finished runs of a study, including earlier ones, in the order of its methods."""
    own = {method: study.run(method, 0).identity for method in study.config.methods}
    return finished_alike(runs_below(study.runs_dir, study.config.name), own)


def results_table(runs: Sequence[Run]) -> str:
    """Return a table of the last epoch's metric by method and seed; "-" without a result."""
    methods = list(dict.fromkeys(run.method for run in runs))
    seeds = list(dict.fromkeys(run.seed for run in runs))
    last = {
        (run.method, run.seed): summary["last"]
        for run in runs
        if run.is_finished and (summary := run.summary)
    }
    metric = deciding_metric(next(iter(last.values()), {TOP1_ERROR.name: 0.0}))
    errors = {key: metric.format_number(values[metric.name]) for key, values in last.items()}
    rows = [(metric.title_with_unit, *(f"seed {seed}" for seed in seeds))]
    rows += [(method, *(errors.get((method, seed), "-") for seed in seeds)) for method in methods]
    return format_table(rows)


def format_asked(runs: Sequence[Run]) -> str:
    """Format the requested methods and seeds for a report."""
    methods = dict.fromkeys(run.method for run in runs)
    seeds = dict.fromkeys(str(run.seed) for run in runs)
    return f"{' '.join(methods)}; seeds {' '.join(seeds)}"


def report_command(runs: Sequence[Run]) -> str:
    """Return the command that writes the report of a study's finished runs.

    runs: the requested runs.
    """
    study = runs[0].study
    words = [*program("report"), str(study.folder)]
    words += [run.folder.name for run in finished_runs(study)]
    words += ["--cache", str(study.cache.path), "--asked", format_asked(runs)]
    return shlex.join(words)


def commands_behind(study: Study, request: StudyRequest) -> list[str]:
    """Return the command of one run, with METHOD and SEED as placeholders, and of each cache."""
    caches, runs = request.storage.caches, request.storage.runs
    words = [*portable_program("train"), "student", request.name]
    words += ["--method", "METHOD", "--seed", "SEED", "--caches", str(caches), "--runs", str(runs)]
    made = [pass_command(each.config, caches) for each in study.teachers]
    return [shlex.join([*words, *(request.overrides or ())]), *made]
