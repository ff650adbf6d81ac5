"""Names and texts from files, made safe for a page, a table, a spreadsheet.

Each is on one line with its control characters visible; nothing in it is taken for markup, for the
end of a cell or for a formula.
"""

from __future__ import annotations

import html
import re

from teach_once.runtime.safe.text import one_line

_LONGEST = 4000  # characters
_FORMULA = ("=", "+", "-", "@", "＝", "＋", "－", "＠")  # also the wide signs, which some accept
_INNER_FORMULA = re.compile(rf"([;|]\s*)(?=[{re.escape(''.join(_FORMULA))}])")
_MARKDOWN = re.compile(r"([\\`*\[\]|])")


def for_html(text: object) -> str:
    return html.escape(one_line(text, _LONGEST))


def for_markdown(text: object) -> str:
    """Also as a cell of a table."""
    return _MARKDOWN.sub(r"\\\1", html.escape(one_line(text, _LONGEST), quote=False))


def as_code(text: object) -> str:
    """A span of code in Markdown; backticks, which would end it, become quotes."""
    return f"`{one_line(text, _LONGEST).replace('`', chr(39))}`"


def for_csv(text: str) -> str:
    """A cell that a spreadsheet takes for text: a leading sign of a formula is quoted.

    So is one after a semicolon, at which spreadsheets of many countries split lines.
    """
    shown = _INNER_FORMULA.sub(r"\1'", one_line(text))
    return f"'{shown}" if shown.lstrip().startswith(_FORMULA) else shown
