"""Text from files, made safe to print: control characters become visible, long text is cut.

A name in somebody's cache may hold escape sequences that move the cursor, recolor the terminal or
turn the reading direction. Everything a command prints passes through `visible`; a value that is
put into a line passes through `one_line`, so that it cannot forge further lines.
"""

from __future__ import annotations

import unicodedata

_INVISIBLE = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}  # Unicode categories
_ESCAPES = {"\n": "\\n", "\t": "\\t", "\r": "\\r"}
_LONGEST = 200


def visible(text: str) -> str:
    """The text with every control and format character written as an escape; newlines stay."""
    if text.isascii() and text.replace("\n", "").isprintable():
        return text
    return "".join(c if c == "\n" or _is_shown(c) else _escaped(c) for c in text)


def one_line(value: object, longest: int = _LONGEST) -> str:
    """str(value) on one line, visible, and cut where it is longer than `longest` characters."""
    text = str(value)
    cut = text if len(text) <= longest else f"{text[:longest]}... ({len(text):,} characters)"
    return "".join(c if _is_shown(c) else _escaped(c) for c in cut)


def in_plot(text: object) -> str:
    """`one_line`, as matplotlib shows it literally: a dollar would begin a formula."""
    return one_line(text).replace("$", r"\$")


def _is_shown(character: str) -> bool:
    return unicodedata.category(character) not in _INVISIBLE


def _escaped(character: str) -> str:
    if character in _ESCAPES:
        return _ESCAPES[character]
    return (
        character.encode("ascii", "backslashreplace").decode()
        if ord(character) > 127
        else (f"\\x{ord(character):02x}")
    )
