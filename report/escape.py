"""Escape names and texts from files for a page, a table or a spreadsheet.

Each result is one line with visible control characters. No part of it is interpreted as markup, as
the end of a cell or as a formula.
"""

from __future__ import annotations

import html
import re

from teach_once.runtime.safe.text import one_line

_LONGEST = 4000  # characters
_FORMULA = ("=", "+", "-", "@", "＝", "＋", "－", "＠")  # full-width signs work in some programs
_INNER_FORMULA = re.compile(rf"([;|]\s*)(?=[{re.escape(''.join(_FORMULA))}])")
_MARKDOWN = re.compile(r"([\\`*\[\]|])")


def for_html(text: object) -> str:
    return html.escape(one_line(text, _LONGEST))


def for_markdown(text: object) -> str:
    """Escape a text for Markdown, including the cells of a table."""
    return _MARKDOWN.sub(r"\\\1", html.escape(one_line(text, _LONGEST), quote=False))


def as_code(text: object) -> str:
    """Format a text as a code span in Markdown; backticks become quotes."""
    return f"`{one_line(text, _LONGEST).replace('`', chr(39))}`"


def for_csv(text: str) -> str:
    """Escape a cell so that a spreadsheet reads it as text: quote the sign that starts a formula.

    Signs after a semicolon are quoted too, since spreadsheets in many locales split lines there.
    """
    shown = _INNER_FORMULA.sub(r"\1'", one_line(text))
    return f"'{shown}" if shown.lstrip().startswith(_FORMULA) else shown
