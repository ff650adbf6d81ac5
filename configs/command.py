"""python -m configs teacher|student NAME|PATH [key=value ...]    print the config as resolved
python -m configs teacher-of STUDENT|PATH [key=value ...]      print the teacher a student names
python -m configs list                                         print all names
python -m configs reference                                    print docs/reference/config.md

`teach-once new-teacher` and `teach-once new-student` write files of your own.
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
    """Print a teacher's config with its defaults and overrides filled in."""
    print(visible(to_yaml(load_teacher(name, overrides or []))), end="")


@app.command()
def student(name: StudentName, overrides: Overrides = None) -> None:
    """Print a student's config with its defaults and overrides filled in."""
    print(visible(to_yaml(load_student(name, split_overrides(overrides or [])[0]))), end="")


@app.command()
def teacher_of(name: StudentName, overrides: Overrides = None) -> None:
    """Print the name of a student's teacher; of several, one on each line."""
    for teacher, _ in teachers_of(name, overrides):
        print(visible(teacher))


@app.command("list")
def list_names() -> None:
    """Print the names of all configs that come with the project."""
    for kind in ("teacher", "student"):
        print(*(f"{kind} {name}" for name in available(kind)), sep="\n")


@app.command("reference")
def print_reference() -> None:
    """Print docs/reference/config.md: every key of both kinds of files."""
    from teach_once.configs.reference import reference

    print(reference(), end="")


def cli(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    return run_command(app, arguments)
