"""python -m store: see `store.command`."""

import sys

from teach_once.store.command import cli

__all__ = ["cli"]

if __name__ == "__main__":
    sys.exit(cli())
