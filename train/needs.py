"""What methods need of a cache, said before anything starts."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from configs.commands import cache_command
from configs.schema import StudentConfig, TeacherConfig
from nets.taps import stage_modules
from train.errors import TrainError
from train.study import taps_asked
from train.terms import taps_of


def missing_taps(
    config: StudentConfig, methods: Sequence[str], stages: Sequence[str], there: Collection[str]
) -> dict[str, set[str]]:
    """Method -> the taps that it needs and that are not there; methods without any left out."""
    found = {}
    for method in methods:
        lacking = taps_of(config.methods[method], stages) - set(there)
        if lacking:
            found[method] = lacking
    return found


def told_of_missing(missing: Mapping[str, set[str]], who: str, stages: Sequence[str]) -> str:
    """The problem in words. Raises TrainError where no cache of this teacher could have them."""
    lines = [f"methods.{m} needs the taps {', '.join(sorted(taps))}" for m, taps in missing.items()]
    possible = {"logits", "correct", "hint", *stages, *(_energy_of(stage) for stage in stages)}
    if unknown := sorted(set().union(*missing.values()) - possible):
        known = ", ".join(sorted(possible))
        raise TrainError("\n  ".join([*lines, f"no cache has {', '.join(unknown)}, but {known}"]))
    return "\n  ".join([f"{who} what is needed:", *lines])


def settings_that_add(missing: Mapping[str, set[str]], stages: Sequence[str]) -> list[str]:
    """Overrides of the teacher's file that add these taps; the hint is the middle stage's."""
    every = set().union(*missing.values())
    energy = ["taps.energy=float16"] if any(tap.startswith("energy") for tap in every) else []
    middle = stages[len(stages) // 2]
    return [*energy, *([f"taps.hint.stage={middle}"] if "hint" in every else [])]


def check_before_the_pass(
    config: StudentConfig,
    teacher: TeacherConfig,
    methods: Sequence[str],
    caches_dir: Path = Path("caches"),
) -> None:
    """Raise TrainError where a cache made as `teacher` says would lack what methods need."""
    stages = list(stage_modules(teacher.teacher.arch, teacher.taps.stages))
    missing = missing_taps(config, methods, stages, taps_asked(teacher))
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
    """What `who` lacks, and the command that makes a cache with it, or adds it to one."""
    told = told_of_missing(missing, who, stages)
    rest = " ".join(method for method in methods if method not in missing)
    without = f'; or leave these methods out: METHODS="{rest}"' if rest else ""
    more = settings_that_add(missing, stages)
    command = cache_command(teacher, caches_dir=caches_dir, more=more)
    return TrainError(f"{told}{without}\n  fix: {command}")


def _energy_of(stage: str) -> str:
    return stage.replace("stage", "energy")
