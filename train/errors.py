"""The error of a run that cannot be started."""

from __future__ import annotations

from teach_once.runtime.errors import UserError


class TrainError(UserError, ValueError):
    """A run that cannot be started, with the reason and the fix."""
