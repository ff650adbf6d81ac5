"""The commands that messages tell users to type, with the words that they used themselves.

In the repository a `make` command where make can carry every word; else the program itself, quoted
for the shell.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from teach_once.configs.schema import ConfigSource, StudentConfig, TeacherConfig
from teach_once.configs.yaml_subset import YamlError, parse_yaml
from teach_once.runtime.command.program import in_repository, program

# Nothing that a shell, make or the cutting of ARGS into words could take for its own.
_MAKE_CARRIES = re.compile(r"[\w./:=,+@^~\[\]{}\"-]+")


def source_of(config: TeacherConfig | StudentConfig) -> ConfigSource:
    """How the user named this config; of one that was not loaded from a file, its name."""
    return config.source or ConfigSource(config.name)


def cache_command(
    teacher: TeacherConfig,
    *,
    caches_dir: Path = Path("caches"),
    more: Sequence[str] = (),
    full_check: bool = False,
) -> str:
    """What makes, continues, grows (by the overrides `more`) or mends this teacher's cache."""
    source = source_of(teacher)
    settings = {"TEACHER": source.name, "CACHES": str(caches_dir), "FULL_CHECK": "1" * full_check}
    defaults = {"CACHES": "caches", "FULL_CHECK": ""}
    replaced = {_key(item) for item in more}
    overrides = [*(item for item in source.overrides if _key(item) not in replaced), *more]
    words = [*program("precompute"), source.name, "--caches", str(caches_dir)]
    words += ["--full-check"] if full_check else []
    return _made("cache-teacher", settings, defaults, overrides) or shlex.join([*words, *overrides])


def teacher_command(teacher: TeacherConfig, *options: str) -> str:
    """What trains the teacher's weights."""
    source = source_of(teacher)
    words = [*program("train"), "teacher", source.name, *options, *source.overrides]
    return shlex.join(words)


def student_command(
    config: StudentConfig,
    teacher: TeacherConfig,
    method: str,
    seed: int,
    *,
    caches_dir: Path = Path("caches"),
    runs_dir: Path = Path("runs"),
) -> str:
    """What trains this student, and builds whatever is missing first."""
    source = source_of(config)
    settings = {
        "STUDENT": source.name,
        "METHOD": method,
        "SEED": str(seed),
        "CACHES": str(caches_dir),
        "RUNS": str(runs_dir),
    }
    defaults = {"CACHES": "caches", "RUNS": "runs"}
    overrides = student_overrides(config, teacher)
    words = [*program("train"), "student", source.name, "--method", method]
    words += ["--seed", str(seed), "--caches", str(caches_dir), "--runs", str(runs_dir)]
    return _made("train-student", settings, defaults, overrides) or shlex.join([*words, *overrides])


def student_overrides(config: StudentConfig, teacher: TeacherConfig) -> list[str]:
    """The overrides of both files, as a student's command line takes them."""
    of_teacher = [f"teacher.{item}" for item in source_of(teacher).overrides]
    return [*source_of(config).overrides, *of_teacher]


def make_settings(**settings: str) -> str:
    """`KEY=value` for make's command line, quoted for the shell where that is needed."""
    return " ".join(f"{key}={_quoted(value)}" for key, value in settings.items())


def _made(
    target: str,
    settings: Mapping[str, str],
    defaults: Mapping[str, str],
    overrides: Sequence[str],
) -> str | None:
    """The make command; None where make would tear a word apart, or there is no Makefile."""
    if not in_repository():
        return None
    words = [_without_spaces(item) for item in overrides]
    named = {key: value for key, value in settings.items() if value != defaults.get(key)}
    values = [value.replace(" ", "") for value in named.values()]
    if not all(_MAKE_CARRIES.fullmatch(word) for word in [*words, *values]):
        return None
    arguments = {**named, **({"ARGS": " ".join(words)} if words else {})}
    return f"make {target} {make_settings(**arguments)}"


def _key(override: str) -> str:
    return override.partition("=")[0]


def _quoted(value: str) -> str:
    plain = re.fullmatch(r"[\w ./:=,+@^~-]+", value)
    return f'"{value}"' if plain and " " in value else shlex.quote(value)


def _without_spaces(override: str) -> str:
    """`taps.hint={stage: stage2}` -> `taps.hint={"stage":"stage2"}`: the same value in one word."""
    key, _, text = override.partition("=")
    if " " not in text:
        return override
    try:
        return f"{key}={json.dumps(parse_yaml(text), ensure_ascii=False, separators=(',', ':'))}"
    except YamlError:
        return override
