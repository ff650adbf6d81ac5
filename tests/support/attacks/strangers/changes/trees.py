"""Changes of every field of a JSON document."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from tests.support.attacks.strangers.changes.change import (
    Rewrite,
    Rewrites,
    byte_rewrites,
    text_rewrites,
)
from tests.support.attacks.strangers.changes.values import odd_values, short

Place = tuple[str | int, ...]
_HERE = "@HERE@"


def json_rewrites(content: bytes) -> Rewrites:
    """Yield rewrites: each field replaced, removed, renamed, doubled; extra fields; broken text."""
    yield from field_rewrites(content)
    yield from text_rewrites()
    yield from byte_rewrites(content)


def field_rewrites(content: bytes) -> Rewrites:
    document = json.loads(content)
    for place, value in _fields(document):
        name = ".".join(map(str, place))
        for kind, raw in odd_values(value):
            yield kind, f"{name} = {short(raw)}", _with(place, raw)
        yield "absent", f"{name} removed", _without(place)
        if isinstance(place[-1], str):
            yield "absent", f"{name} renamed", _renamed(place)
            yield "extra", f"{name} twice", _twice(place)
        if isinstance(value, dict):
            for key in ("evil", "../../evil", "x\x1b[31m", "$(touch PWNED)", "a" * 300, ""):
                yield "extra", f"{name}.{short(key)} added", _with((*place, key), "1")
                yield "extra", f"{name}.{short(key)} like another", _copied(place, key)


def line_rewrites(content: bytes) -> Rewrites:
    """Yield rewrites of the first and last lines of a JSON-lines file, and of whole lines."""
    lines = content.splitlines(keepends=True)
    for number in {0, len(lines) - 1}:
        for kind, name, rewrite in field_rewrites(lines[number]):
            yield kind, f"line {number}: {name}", _of_line(number, rewrite)
    yield "lines", "first missing", lambda b: b"".join(b.splitlines(keepends=True)[1:])
    yield "lines", "last missing", lambda b: b"".join(b.splitlines(keepends=True)[:-1])
    yield "lines", "last twice", lambda b: b + b.splitlines(keepends=True)[-1]
    yield "lines", "reversed", lambda b: b"".join(b.splitlines(keepends=True)[::-1])
    yield "lines", "a blank one", lambda b: b + b"\n"
    yield "lines", "garbage", lambda b: b + b"this is no line\n"
    yield "lines", "a long one", lambda b: b + b"x" * 10**6 + b"\n"
    yield "lines", "other separators", lambda b: b.replace(b"\n", b"\x0b\n\x1c")
    yield from text_rewrites()
    yield from byte_rewrites(content)


def _fields(value: Any, place: Place = ()) -> Iterator[tuple[Place, Any]]:
    """Yield the fields of a value; of a list, only the first and last items."""
    if place:
        yield place, value
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _fields(item, (*place, key))
    elif isinstance(value, list) and value:
        for number in sorted({0, len(value) - 1}):
            yield from _fields(value[number], (*place, number))


def _holder(document: Any, place: Place) -> Any:
    for key in place[:-1]:
        document = document[key]
    return document


def _with(place: Place, raw: str) -> Rewrite:
    def rewrite(content: bytes) -> bytes:
        document = json.loads(content)
        _holder(document, place)[place[-1]] = _HERE
        return _text(document).replace(json.dumps(_HERE), raw).encode()

    return rewrite


def _without(place: Place) -> Rewrite:
    def rewrite(content: bytes) -> bytes:
        document = json.loads(content)
        del _holder(document, place)[place[-1]]
        return _text(document).encode()

    return rewrite


def _renamed(place: Place) -> Rewrite:
    def rewrite(content: bytes) -> bytes:
        document = json.loads(content)
        holder = _holder(document, place)
        holder[f"{place[-1]}x"] = holder.pop(place[-1])
        return _text(document).encode()

    return rewrite


def _twice(place: Place) -> Rewrite:
    """Duplicate the key with another value, of which readers differ in their choice."""

    def rewrite(content: bytes) -> bytes:
        document = json.loads(content)
        holder = _holder(document, place)
        holder[_HERE] = holder[place[-1]]
        return _text(document).replace(json.dumps(_HERE), json.dumps(place[-1])).encode()

    return rewrite


def _copied(place: Place, key: str) -> Rewrite:
    """Add a key with the value of the first one."""

    def rewrite(content: bytes) -> bytes:
        document = json.loads(content)
        holder = _holder(document, (*place, key))
        holder[key] = next(iter(holder.values()), None)
        return _text(document).encode()

    return rewrite


def _of_line(number: int, rewrite: Rewrite) -> Rewrite:
    def whole(content: bytes) -> bytes:
        lines = content.splitlines()
        lines[number] = rewrite(lines[number]).strip()
        return b"\n".join([*lines, b""])

    return whole


def _text(document: Any) -> str:
    return json.dumps(document, separators=(",", ":")) + "\n"
