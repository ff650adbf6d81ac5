"""Cuts the text of make's ARGS into the words of a command line, and expands `~/` in words.

make and a shell would cut at every space, and take `$`, quotes and backticks for their own. The
Makefile therefore hands the text over whole, as `--args=TEXT`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

WHOLE = "--args="
# A path, `--option=PATH` or `key=PATH`, below somebody's home. A shell expands only the first form;
# a bare `~` is YAML's null.
_BELOW_HOME = re.compile(r"((?:[\w.+-]+=)?)(~[^/\s]*/.*)", re.DOTALL)
_CLOSING = {"[": "]", "{": "}", '"': '"', "'": "'"}


def with_words(arguments: Sequence[str]) -> list[str]:
    """The arguments, with the words of TEXT in the place of each `--args=TEXT`; `~/` expanded."""
    words: list[str] = []
    for argument in arguments:
        given = argument.startswith(WHOLE)
        words += split_words(argument.removeprefix(WHOLE)) if given else [argument]
    return list(map(_at_home, words))


def _at_home(word: str) -> str:
    """The word with the home's folder in the place of `~`."""
    found = _BELOW_HOME.fullmatch(word)
    return word if found is None else found[1] + os.path.expanduser(found[2])


def split_words(text: str) -> list[str]:
    """Cut at white space, but not within quotes or brackets, which stay: they are YAML's.

    What is not closed reaches to the end.
    """
    words, word, closing = [], "", [""]
    for character in text:
        if character.isspace() and len(closing) == 1:
            words.append(word)
            word = ""
            continue
        word += character
        if character == closing[-1]:
            closing.pop()
        elif closing[-1] not in ("'", '"') and character in _CLOSING:
            closing.append(_CLOSING[character])
    return [each for each in (*words, word) if each]
