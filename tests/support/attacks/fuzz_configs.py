"""python -m tests.support.attacks.fuzz_configs [--mutations 10000] [--bytes 2000]
    [--seed 0] [--only NAME]

Changes every shipped YAML file at random and loads what comes out. Each load must end with a
config, which then survives being printed and read again, or with a short ConfigError. Anything else
is printed with the change that caused it, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import random
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from teach_once.configs.load import (
    CONFIG_DIR,
    ConfigError,
    available,
    load_student,
    load_teacher,
    to_yaml,
)
from teach_once.configs.schema import StudentConfig, TeacherConfig
from teach_once.store.identity import canonical_json

_TOKEN = re.compile(r"[\w.+/-]+|[^\w\s]")
_LOADERS: dict[str, Callable[..., TeacherConfig | StudentConfig]] = {
    "teacher": load_teacher,
    "student": load_student,
}

ODD = (
    *(
        "",
        "~",
        "null",
        "true",
        "no",
        "0",
        "-1",
        "1",
        "1.5",
        "0100",
        "1:30",
        "0x1F",
        "0o17",
        "1_000",
    ),
    *("1e400", "-1e400", "1e-400", ".inf", "-.inf", ".nan", "9" * 19, "9" * 5000, "2147483648"),
    *("18446744073709551616", "2001-01-01", "2001-01-01T00:00:00Z", "²", "١", "½", "all", "'x'"),
    *("[]", "{}", "[[]]", "{a: 1}", "[1, 2]", "{? [1]: 2}", "{1: 2}", "{null: 1}", "? x", "<<"),
    *("*a", "&a", "&a [*a]", "{<<: *a}", "<<: {a: 1}", "!!int 0100", "!!int x", "!!float x"),
    *("!!bool x", "!!binary x", "!!set {a}", "!!omap [a: 1]", "!!timestamp x", "!!null x"),
    *("!!python/object/apply:os.system [ls]", "!!python/name:os.system", "!x y", "!!merge x"),
    *(
        "[" * 400,
        "{a: " * 400,
        "- " * 300,
        "[" * 3000,
        "%YAML 9.9",
        "---",
        "...",
        "#",
        "|",
        ">",
        "@",
    ),
    *('"\\0"', '"\\x1b"', '"\\ud800"', '"\\UFFFFFFFF"', "\x00", "\x85", "\ufeff", "\u2028", "🦆"),
    *("&a [x, x], b: &b [*a, *a, *a], c: &c [*b, *b, *b], d: [*c, *c]", "a" * 10_000, "python::"),
    *("python:os:system", "torchvision:", "os:system", "../../etc/passwd", "/dev/null", "x.yaml"),
)
BOMB = "\n".join(
    ["b0: &b0 [1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    + [f"b{n}: &b{n} [{', '.join([f'*b{n - 1}'] * 9)}]" for n in range(1, 12)]
    + ["m0: &m0 {x: 1}"]
    + [f"m{n}: &m{n} {{<<: [{', '.join([f'*m{n - 1}'] * 9)}]}}" for n in range(1, 12)]
)


def mutated(text: str, rng: random.Random) -> str:
    """Return the text with one to three changed words or lines."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        change = rng.choice((_word, _word, _word, _two_words, _line, _bomb))
        text = change(text, rng)
    return text


def _word(text: str, rng: random.Random) -> str:
    """Replace, remove or duplicate a word or sign."""
    words = list(_TOKEN.finditer(text))
    if not words:
        return rng.choice(ODD)
    word = rng.choice(words)
    other = rng.choice((rng.choice(ODD), rng.choice(words).group(), "", word.group() * 2))
    return text[: word.start()] + other + text[word.end() :]


def _two_words(text: str, rng: random.Random) -> str:
    """Exchange two words."""
    words = list(_TOKEN.finditer(text))
    if len(words) < 2:
        return text
    first, second = sorted(rng.sample(words, 2), key=lambda word: word.start())
    between = text[first.end() : second.start()]
    swapped = second.group() + between + first.group()
    return text[: first.start()] + swapped + text[second.end() :]


def _line(text: str, rng: random.Random) -> str:
    """Remove, duplicate, move or indent a line."""
    lines = text.split("\n")
    place = rng.randrange(len(lines))
    line = lines.pop(place)
    copies = rng.choice(([], [line, line], [" " * rng.randint(1, 4) + line], [line.lstrip()]))
    if rng.random() < 0.3:
        place = rng.randint(0, len(lines))
    return "\n".join([*lines[:place], *copies, *lines[place:]])


def _bomb(text: str, rng: random.Random) -> str:
    return f"{text}\n{BOMB}" if rng.random() < 0.05 else text


def with_other_bytes(content: bytes, rng: random.Random) -> bytes:
    """Return the content with one to eight changed bytes, sometimes truncated."""
    found = bytearray(content)
    for _ in range(rng.randint(1, 8)):
        place = rng.randrange(len(found)) if found else 0
        kind = rng.randrange(4)
        if kind == 0 and found:
            found[place] = rng.randrange(256)
        elif kind == 1 and found:
            found[place] ^= 1 << rng.randrange(8)
        elif kind == 2:
            found[place : place + rng.choice((1, 1, 20))] = b""
        else:
            found[place:place] = rng.choice(ODD).encode("utf-8", "surrogatepass")
    return bytes(found[: rng.randrange(len(found))] if found and rng.random() < 0.05 else found)


def random_overrides(text: str, rng: random.Random) -> list[str]:
    """Return overrides of keys of the file, of parts of keys, or of unknown keys."""
    words = [word.group() for word in _TOKEN.finditer(text)]
    keys = re.findall(r"(\w+):", text)
    found = []
    for _ in range(rng.randint(1, 3)):
        path = ".".join(rng.choice((*keys, str(rng.randint(-1, 3)), "²")) for _ in range(3))
        key = rng.choice((path, path.partition(".")[0], rng.choice(ODD), rng.choice(keys)))
        found.append(f"{key}={rng.choice((rng.choice(ODD), rng.choice(words)))}")
    return found


def trials(
    kind: str, name: str, mutations: int, byte_changes: int, rng: random.Random
) -> Iterator[tuple[bytes, list[str]]]:
    """Yield (content of the file, overrides), each with random changes."""
    content = (CONFIG_DIR / kind / f"{name}.yaml").read_bytes()
    text = content.decode()
    for number in range(mutations):
        if number % 5 == 4:
            yield content, random_overrides(text, rng)
        else:
            yield mutated(text, rng).encode("utf-8", "surrogatepass"), []
    for _ in range(byte_changes):
        yield with_other_bytes(content, rng), []


def outcome(kind: str, file: Path, content: bytes, overrides: list[str]) -> str:
    """Load a config and return "config" or "error"; any other outcome raises."""
    file.write_bytes(content)
    try:
        config = _LOADERS[kind](file, overrides)
    except ConfigError as error:
        told = str(error)
        named = file.name in told or told.startswith("override ")
        assert named, f"the error names neither the file nor an override: {told[:300]}"
        assert "pydantic" not in told, told
        assert len(told) < 6000, f"an error of {len(told):,} characters"
        return "error"
    printed = to_yaml(config)
    canonical_json({"config": printed})
    file.write_text(printed)
    # A default path in a file is relative to the folder of that file.
    beside = f"{file.parent}/"
    again = to_yaml(_LOADERS[kind](file)).replace(beside, "")
    assert again == printed.replace(beside, ""), "the config read again differs"
    return "config"


def fuzz(mutations: int, byte_changes: int, seed: int, only: str = "") -> tuple[Counter[str], int]:
    """Return the number of outcomes by kind, and of faults, which are printed."""
    found: Counter[str] = Counter()
    faults = 0
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "changed.yaml"
        for kind in ("teacher", "student"):
            for name in (name for name in available(kind) if only in name):
                rng = random.Random(f"{seed} {kind} {name}")
                for content, overrides in trials(kind, name, mutations, byte_changes, rng):
                    try:
                        found[outcome(kind, file, content, overrides)] += 1
                    except Exception as error:  # a fault
                        faults += 1
                        print(f"{kind} {name} {overrides}: {type(error).__name__}: {error!s:.300}")
                        print(f"{content!r:.3000}\n")
    return found, faults


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mutations", type=int, default=10_000, help="of each file")
    parser.add_argument("--bytes", type=int, default=2_000, help="changes of each file's bytes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="files whose name has this in it")
    options = parser.parse_args()
    found, faults = fuzz(options.mutations, options.bytes, options.seed, options.only)
    print(f"{found['config']:,} configs, {found['error']:,} errors, {faults:,} faults")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
