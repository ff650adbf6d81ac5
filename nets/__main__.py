"""Run `python -m nets`; the command is in `nets.command`."""

import sys

from teach_once.nets.command import cli

__all__ = ["cli"]

if __name__ == "__main__":
    sys.exit(cli())
