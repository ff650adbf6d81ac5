"""Errors of the user's that concern the machine; the command that meets one prints it and ends."""


class DeviceError(ValueError):
    """A device that this machine lacks: what was asked for, what there is, and the fix."""
