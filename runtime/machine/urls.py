"""URLs of a prefix in a bucket, `s3://bucket/prefix`, as a type of path.

A URL is printed as it was typed and has a `name` and a `parent`. It is not a file: opening it or
checking whether it exists raises TypeError, because the answer would concern a local file of the
same name. `store.place.open.place_at` opens it.
"""

from __future__ import annotations

import re
from pathlib import Path, PosixPath

from teach_once.runtime.errors import UserError

SCHEME = "s3://"
_URL = re.compile(r"s3://([a-z0-9][a-z0-9.-]{1,61}[a-z0-9])((?:/[A-Za-z0-9._+=,~ -]+)*)/?")


class BadUrl(UserError, ValueError):
    """An invalid URL of a bucket or a prefix."""


class ObjectUrl(PosixPath):
    """A URL `s3://bucket/prefix`, created by `path_or_url`."""

    def __str__(self) -> str:
        return SCHEME + "/".join(self.parts[1:])

    def __fspath__(self) -> str:
        raise TypeError(f"{self} is not a local file")

    @property
    def bucket(self) -> str:
        return self.parts[1]

    @property
    def key(self) -> str:
        """The prefix; "" for a whole bucket."""
        return "/".join(self.parts[2:])


def spool_folder(path: Path, root: Path) -> Path:
    """Return the local folder for data of `path` that stays on this machine.

    This is `path` itself for a folder, and `root/bucket/prefix` for a URL.
    """
    return root / path.bucket / path.key if isinstance(path, ObjectUrl) else path


def path_or_url(text: str | Path) -> Path:
    """Convert a command-line argument to a path or an ObjectUrl; a path is returned unchanged.

    Raises BadUrl without repeating the text, which may contain a password.
    """
    if isinstance(text, Path):
        return text
    if "://" not in text:
        return Path(text)
    found = _URL.fullmatch(text)
    if found is None or ".." in text or "/." in text:
        raise BadUrl(
            "invalid URL: expected s3://bucket/prefix with letters, digits and ._+=,~-",
            fix="set credentials and endpoint in the environment: AWS_ACCESS_KEY_ID, ...",
        )
    return ObjectUrl("s3:", found[1], *filter(None, found[2].split("/")))
