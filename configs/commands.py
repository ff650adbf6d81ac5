"""Build the commands in messages, with the user's own names and overrides.

In the repository this is a `make` command if make can pass every word; otherwise it is the program
itself, quoted for the shell.
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

# Characters without a special meaning for a shell, make or the splitting of ARGS.
_MAKE_CARRIES = re.compile(r"[\w./:=,+@^~\[\]{}\"-]+")


def source_of(config: TeacherConfig | StudentConfig) -> ConfigSource:
    """Return the user's name for this config; its own name if it was not loaded from a file."""
    return config.source or ConfigSource(config.name)


def cache_command(
    teacher: TeacherConfig,
    *,
    caches_dir: Path = Path("caches"),
    more: Sequence[str] = (),
    full_check: bool = False,
) -> str:
    """Return the command that builds, resumes or repairs this teacher's cache.

    more: overrides that extend the cache.
    """
    source = source_of(teacher)
    settings = {"TEACHER": source.name, "CACHES": str(caches_dir), "FULL_CHECK": "1" * full_check}
    defaults = {"CACHES": "caches", "FULL_CHECK": ""}
    replaced = {_key(item) for item in more}
    overrides = [*(item for item in source.overrides if _key(item) not in replaced), *more]
    words = [*program("precompute"), source.name, "--caches", str(caches_dir)]
    words += ["--full-check"] if full_check else []
    return _made("cache-teacher", settings, defaults, overrides) or shlex.join([*words, *overrides])


def teacher_command(teacher: TeacherConfig, *options: str) -> str:
    """Return the command that trains the teacher's weights."""
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
    """Return the command that trains this student, and builds whatever is missing first."""
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
    """Return the overrides of both files, in the form for a student's command line."""
    of_teacher = [f"teacher.{item}" for item in source_of(teacher).overrides]
    return [*source_of(config).overrides, *of_teacher]


def make_settings(**settings: str) -> str:
    """Return `KEY=value` settings for make, quoted for the shell if necessary."""
    return " ".join(f"{key}={_quoted(value)}" for key, value in settings.items())


def _made(
    target: str,
    settings: Mapping[str, str],
    defaults: Mapping[str, str],
    overrides: Sequence[str],
) -> str | None:
    """Return the make command; None if make would split a word or there is no Makefile."""
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
    """Rewrite `taps.hint={stage: stage2}` as one word: `taps.hint={"stage":"stage2"}`."""
    key, _, text = override.partition("=")
    if " " not in text:
        return override
    try:
        return f"{key}={json.dumps(parse_yaml(text), ensure_ascii=False, separators=(',', ':'))}"
    except YamlError:
        return override
