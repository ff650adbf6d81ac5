"""A prefix of a bucket, `s3://bucket/prefix`, in the type of a path.

It is printed as it was typed, and has a `name` and a `parent`. It is not a file: opening it or
asking whether it exists raises TypeError, because any answer would be about a local file of that
name. `store.place.open.place_at` reaches what it names.
"""

from __future__ import annotations

import re
from pathlib import Path, PosixPath

from teach_once.runtime.errors import UserError

SCHEME = "s3://"
_URL = re.compile(r"s3://([a-z0-9][a-z0-9.-]{1,61}[a-z0-9])((?:/[A-Za-z0-9._+=,~ -]+)*)/?")


class BadUrl(UserError, ValueError):
    """Not the URL of a bucket, or of a prefix in one."""


class ObjectUrl(PosixPath):
    """`s3://bucket/prefix`. Made by `path_or_url`."""

    def __str__(self) -> str:
        return SCHEME + "/".join(self.parts[1:])

    def __fspath__(self) -> str:
        raise TypeError(f"{self} is not a file of this machine")

    @property
    def bucket(self) -> str:
        return self.parts[1]

    @property
    def key(self) -> str:
        """The prefix; "" of a whole bucket."""
        return "/".join(self.parts[2:])


def spool_folder(path: Path, root: Path) -> Path:
    """The folder on this machine for what belongs to `path` and stays here.

    A folder is its own; a URL has `root/bucket/prefix`.
    """
    return root / path.bucket / path.key if isinstance(path, ObjectUrl) else path


def path_or_url(text: str | Path) -> Path:
    """The path, or the ObjectUrl, that a command line names; a path, such as a default, as it is.

    Raises BadUrl, which does not repeat the text: it may hold a password.
    """
    if isinstance(text, Path):
        return text
    if "://" not in text:
        return Path(text)
    found = _URL.fullmatch(text)
    if found is None or ".." in text or "/." in text:
        raise BadUrl(
            "a URL of another form than s3://bucket/prefix, of letters, digits and ._+=,~-",
            fix="credentials and endpoint are taken from the environment: AWS_ACCESS_KEY_ID, ...",
        )
    return ObjectUrl("s3:", found[1], *filter(None, found[2].split("/")))
