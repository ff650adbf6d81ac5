"""YAML configs with odd words, lines and bytes, and with names that an unsafe shell would run."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from pathlib import Path

from tests.support.attacks.fuzz_configs import ODD, mutated
from tests.support.attacks.strangers.changes.change import (
    Change,
    byte_rewrites,
    rewriting,
    text_rewrites,
)
from tests.support.attacks.strangers.changes.places import place_changes

_WORD = re.compile(r"(?<=: )[\w./-]+")
_NAMES = (
    *("$(touch PWNED).yaml", "a$(shell touch PWNED).yaml", "`touch PWNED`", "'; touch PWNED; '"),
    *("../../../../etc/passwd", "/dev/zero", "/dev/stdin", ".", "..", "~root", "-h", "--help"),
    *(
        "http://127.0.0.1:9/x",
        "file:///etc/passwd",
        "torchvision:x",
        "python:os:system",
        "a b.yaml",
    ),
    *("99999999999999999999", "1e18", "-1", "0", "1:30", "010", "0x7fffffff", "2147483648", ".nan"),
)


def yaml_changes(file: Path) -> Iterator[Change]:
    text = file.read_text()
    for word in _WORD.finditer(text):
        for odd in (*_NAMES, *ODD):
            name = f"{word.group()} at {word.start()} = {odd[:30]!a}"
            yield Change("word", name, rewriting(_replacing(word.start(), word.end(), odd)))
    for seed in range(300):
        yield Change("mixed", f"mutation {seed}", rewriting(_mutation(seed)))
    for kind, name, rewrite in (*text_rewrites(), *byte_rewrites(text.encode())):
        yield Change(kind, name, rewriting(rewrite))
    long_list = b"x: [" + b"1, " * 3_000_000 + b"1]"
    yield Change("document", "of 10 MB of list", rewriting(lambda b: long_list))
    yield from place_changes(is_folder=False)


def _replacing(start: int, stop: int, odd: str):
    def rewrite(content: bytes) -> bytes:
        return content[:start] + odd.encode("utf-8", "surrogatepass") + content[stop:]

    return rewrite


def _mutation(seed: int):
    def rewrite(content: bytes) -> bytes:
        changed = mutated(content.decode(), random.Random(seed))
        return changed.encode("utf-8", "surrogatepass")

    return rewrite
