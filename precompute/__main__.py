"""Run `python -m precompute`; the command is in `precompute.command`."""

import sys

from teach_once.precompute.command import cli

__all__ = ["cli"]

if __name__ == "__main__":
    sys.exit(cli())
