"""Stage 2: trains students from a cache of teacher outputs, and teachers that have no weights."""

from __future__ import annotations

from runtime.errors import UserError


class TrainError(UserError, ValueError):
    """A run that cannot be started: what is wrong and how to fix it."""
