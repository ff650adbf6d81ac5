"""Make text from files safe to print: escape control characters and truncate long text.

A name in an untrusted cache may contain escape sequences that move the cursor, recolor the terminal
or reverse the reading direction. Everything a command prints passes through `visible`. A value
inside a line passes through `one_line`, so that it cannot add further lines.
"""

from __future__ import annotations

import unicodedata

_INVISIBLE = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}  # Unicode categories
_ESCAPES = {"\n": "\\n", "\t": "\\t", "\r": "\\r"}
_LONGEST = 200


def visible(text: str) -> str:
    """Return the text with control and format characters escaped; newlines are kept."""
    if text.isascii() and text.replace("\n", "").isprintable():
        return text
    return "".join(c if c == "\n" or _is_shown(c) else _escaped(c) for c in text)


def one_line(value: object, longest: int = _LONGEST) -> str:
    """Return str(value) on one line, escaped, and truncated beyond `longest` characters."""
    text = str(value)
    cut = text if len(text) <= longest else f"{text[:longest]}... ({len(text):,} characters)"
    return "".join(c if _is_shown(c) else _escaped(c) for c in cut)


def in_plot(text: object) -> str:
    """Return `one_line` escaped for matplotlib, where a dollar sign would begin a formula."""
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
