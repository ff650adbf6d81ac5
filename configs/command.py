"""python -m configs teacher|student NAME|PATH [key=value ...]    print the config as resolved
python -m configs teacher-of STUDENT|PATH [key=value ...]      print a student's teacher
python -m configs list                                         print all names
python -m configs reference                                    print docs/reference/config.md

`teach-once new-teacher` and `teach-once new-student` write new config files.
"""

from __future__ import annotations

from teach_once.configs.load import (
    available,
    load_student,
    load_teacher,
    split_overrides,
    teachers_of,
    to_yaml,
)
from teach_once.runtime.command.frame import new_app, run_command
from teach_once.runtime.command.options import Overrides, StudentName, TeacherName
from teach_once.runtime.safe.text import visible

app = new_app("Print configs.")


@app.command()
def teacher(name: TeacherName, overrides: Overrides = None) -> None:
    """Print a teacher's config with defaults and overrides applied."""
    print(visible(to_yaml(load_teacher(name, overrides or []))), end="")


@app.command()
def student(name: StudentName, overrides: Overrides = None) -> None:
    """Print a student's config with defaults and overrides applied."""
    print(visible(to_yaml(load_student(name, split_overrides(overrides or [])[0]))), end="")


@app.command()
def teacher_of(name: StudentName, overrides: Overrides = None) -> None:
    """Print the name of a student's teacher; several teachers are printed one per line."""
    for teacher, _ in teachers_of(name, overrides):
        print(visible(teacher))


@app.command("list")
def list_names() -> None:
    """Print the names of all configs included in the project."""
    for kind in ("teacher", "student"):
        print(*(f"{kind} {name}" for name in available(kind)), sep="\n")


@app.command("reference")
def print_reference() -> None:
    """Print docs/reference/config.md: every key of teacher and student files."""
    from teach_once.configs.reference import reference

    print(reference(), end="")


def cli(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    return run_command(app, arguments)
