"""python -m configs: see `configs.command`."""

import sys

from teach_once.configs.command import cli

__all__ = ["cli"]

if __name__ == "__main__":
    sys.exit(cli())
