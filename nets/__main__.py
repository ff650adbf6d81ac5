"""python -m nets: see `nets.command`."""

import sys

from teach_once.nets.command import cli

__all__ = ["cli"]

if __name__ == "__main__":
    sys.exit(cli())
