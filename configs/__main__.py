"""python -m configs teacher|student NAME|PATH [key=value ...]    print the config as resolved

python -m configs teacher-of STUDENT|PATH [key=value ...]         print the teacher a student names
python -m configs list                                            print all names
"""

from __future__ import annotations

import sys

from configs.load import (
    ConfigError,
    available,
    load_student,
    load_teacher,
    split_overrides,
    to_yaml,
)


def main(arguments: list[str]) -> int:
    match arguments:
        case ["teacher", name, *overrides]:
            print(to_yaml(load_teacher(name, overrides)), end="")
        case ["student", name, *overrides]:
            print(to_yaml(load_student(name, split_overrides(overrides)[0])), end="")
        case ["teacher-of", name, *overrides]:
            print(load_student(name, split_overrides(overrides)[0]).teacher)
        case ["list"]:
            for kind in ("teacher", "student"):
                print(*(f"{kind} {name}" for name in available(kind)), sep="\n")
        case _:
            print(__doc__, file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
