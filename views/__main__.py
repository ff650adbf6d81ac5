"""Run `python -m views`; the commands are in `views.command`."""

import sys

from teach_once.views.command import cli

__all__ = ["cli"]

if __name__ == "__main__":
    sys.exit(cli())
