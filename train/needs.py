"""What methods need of a cache: known before anything starts."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from configs.commands import cache_command
from configs.schema import StudentConfig, TeacherConfig
from nets.taps import Tap, stage_modules
from train.errors import TrainError
from train.study import tap_names
from train.terms import taps_of


def missing_taps(
    config: StudentConfig, methods: Sequence[str], stages: Sequence[str], held: Collection[str]
) -> dict[str, set[str]]:
    """The taps that methods need beyond those held: {method: taps}, without empty entries."""
    needed = {method: taps_of(config.methods[method], stages) for method in methods}
    return {method: taps - set(held) for method, taps in needed.items() if taps - set(held)}


def format_missing(missing: Mapping[str, set[str]], who: str, stages: Sequence[str]) -> str:
    """The problem in words; `who` ends in a verb. Raises TrainError if no cache can have them."""
    lines = [f"methods.{m} needs the taps {', '.join(sorted(taps))}" for m, taps in missing.items()]
    possible = {
        "logits",
        "correct",
        "hint",
        *stages,
        *(Tap("energy", stage).name for stage in stages),
    }
    if unknown := sorted(set().union(*missing.values()) - possible):
        known = ", ".join(sorted(possible))
        raise TrainError("\n  ".join([*lines, f"no cache has {', '.join(unknown)}, but {known}"]))
    return "\n  ".join([f"{who} what the methods need:", *lines])


def settings_that_add(missing: Mapping[str, set[str]], stages: Sequence[str]) -> list[str]:
    """Overrides of the teacher's file that add these taps; a hint is the middle stage's."""
    every = set().union(*missing.values())
    kinds = {Tap.parse(name).kind for name in every}
    middle = stages[len(stages) // 2]
    return [
        *(["taps.energy=float16"] if "energy" in kinds else []),
        *([f"taps.hint.stage={middle}"] if "hint" in kinds else []),
    ]


def check_before_the_pass(
    config: StudentConfig,
    teacher: TeacherConfig,
    methods: Sequence[str],
    caches_dir: Path = Path("caches"),
) -> None:
    """Raise TrainError where a cache of this teacher would lack what methods need."""
    stages = list(stage_modules(teacher.teacher.arch, teacher.taps.stages))
    missing = missing_taps(config, methods, stages, tap_names(teacher))
    if missing:
        who = f"the teacher's file {teacher.name} leaves out"
        raise missing_error(missing, methods, who, teacher, stages, caches_dir)


def missing_error(
    missing: Mapping[str, set[str]],
    methods: Sequence[str],
    who: str,
    teacher: TeacherConfig,
    stages: Sequence[str],
    caches_dir: Path,
) -> TrainError:
    """The error for taps that `who` lacks, with the command that builds or extends a cache."""
    problem = format_missing(missing, who, stages)
    rest = " ".join(method for method in methods if method not in missing)
    without = f'; or leave these methods out: METHODS="{rest}"' if rest else ""
    more = settings_that_add(missing, stages)
    command = cache_command(teacher, caches_dir=caches_dir, more=more)
    return TrainError(f"{problem}{without}", fix=command)
