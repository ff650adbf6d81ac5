"""Split the text of make's ARGS into words of a command line, and expand `~/` in words.

make and a shell would split at every space and interpret `$`, quotes and backticks. Therefore the
Makefile passes the text whole, as `--args=TEXT`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

WHOLE = "--args="
# A path, `--option=PATH` or `key=PATH`, in a user's home. A shell expands only the first form. A
# bare `~` is YAML's null.
_BELOW_HOME = re.compile(r"((?:[\w.+-]+=)?)(~[^/\s]*/.*)", re.DOTALL)
_CLOSING = {"[": "]", "{": "}", '"': '"', "'": "'"}


def with_words(arguments: Sequence[str]) -> list[str]:
    """Replace each `--args=TEXT` by the words of TEXT, and expand `~/`."""
    words: list[str] = []
    for argument in arguments:
        given = argument.startswith(WHOLE)
        words += split_words(argument.removeprefix(WHOLE)) if given else [argument]
    return list(map(_at_home, words))


def _at_home(word: str) -> str:
    """Replace `~` by the user's home folder."""
    found = _BELOW_HOME.fullmatch(word)
    return word if found is None else found[1] + os.path.expanduser(found[2])


def split_words(text: str) -> list[str]:
    """Split at white space, except within quotes or brackets, which are kept for YAML.

    An unclosed quote or bracket extends to the end.
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
