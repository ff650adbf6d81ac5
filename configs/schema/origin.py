"""How a user named a config; for messages that repeat it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from typing import Annotated

from pydantic import Field
from pydantic.dataclasses import dataclass


@dataclass(frozen=True)
class Source:
    """How a user named a config on the command line; for messages that repeat it."""

    name: str  # of a file in configs/, or a path
    overrides: tuple[str, ...] = ()
    # Of relative paths in its file that lead nowhere: {dotted key: the places that were tried}.
    not_found: Mapping[str, str] = field(default_factory=dict)


# Of a config; part of no identity, nor of what is printed.
FromCommandLine = Annotated[Source | None, Field(exclude=True)]
