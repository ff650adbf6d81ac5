"""Odd values for a field of a JSON document, as raw text that need not be valid JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

OUTSIDE = "@OUTSIDE@"  # replaced by the absolute path of the protected folder

_TYPES = ("null", "true", "false", "0", "1", "-1", "0.5", "-0.0", '""', '"x"', "[]", "{}", "[[]]")
_SIZES = (
    *("2147483648", "-2147483649", "9223372036854775807", "9223372036854775808", "1" + "0" * 12),
    *("1" + "0" * 30, "9" * 5000, "1e308", "1e400", "1e-400", "NaN", "Infinity", "-Infinity"),
    *("1e9", "1000000000", "10000000", "1000000", "100000", "65536"),
)
_TEXTS = (
    *("../../evil", "../outside/evil", f"{OUTSIDE}/evil", "a/b", "..", ".", "a\0b", "~", "-rf"),
    *("\x1b[31mred\x1b]0;title\x07", "a\nforged line", "\r\x1b[2K", "\u202egnp", "\x9b31m", "é"),
    *("$(touch PWNED)", "`touch PWNED`", "'; touch PWNED #", '"; touch PWNED; "', "a b"),
    *("=1+1", "<script>alert(1)</script>", "a|b", "$x^$", "$", "%s%n{0}", "x" * 100_000),
)
_QUOTED = (*map(json.dumps, _TEXTS), '"\\ud800"')  # the last: a lone surrogate
_NESTED = ("[" * 60 + "]" * 60, "[" * 100_000 + "]" * 100_000, '{"a":' * 500 + "1" + "}" * 500)
_HUGE = (json.dumps([0] * 200_000), json.dumps({str(n): n for n in range(50_000)}))


def odd_values(value: Any) -> Iterator[tuple[str, str]]:
    """Yield (kind, raw JSON) of replacements for `value`."""
    for kind, texts in (("type", _TYPES), ("size", _SIZES), ("nested", _NESTED), ("huge", _HUGE)):
        yield from ((kind, text) for text in texts)
    yield from (("text", text) for text in _QUOTED)
    yield from (("near", json.dumps(near)) for near in _near(value))


def _near(value: Any) -> Iterator[Any]:
    """Yield values that a careful forger would write."""
    if isinstance(value, bool):
        yield not value
    elif isinstance(value, int):
        yield from (value + 1, value - 1, -value, 2 * value, value * 10**6, str(value), value + 0.0)
        yield from (value + 0.5, [value], 0 - 2**62)
    elif isinstance(value, float):
        yield from (value + 1, -value, value * 1e9, str(value), round(value), 101.0, 0.01)
    elif isinstance(value, str):
        yield from (value + " ", value.upper(), value[:-1], value[::-1], value * 2, [value])
        yield from ("float64", ">f4", "|O", "<U9", "int64", "V8", "float16", "uint8")
    elif isinstance(value, list):
        yield from (value * 2, value[:-1], value[::-1], [*value, None], [*value, -1], tuple(value))
        yield from ([0], [-1], [10**9], [10**6, 10**6, 10**6], [1] * 64)
    elif isinstance(value, dict):
        yield from (list(value), list(value.items()))


def short(text: str, longest: int = 40) -> str:
    """Shorten text for the name of a case."""
    start = text[: longest + 1]  # the text may have megabytes
    shown = start if start.isprintable() else ascii(start)
    return shown if len(shown) <= longest else f"{shown[:longest]}..({len(text)})"
