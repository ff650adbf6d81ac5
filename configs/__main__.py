"""Run `python -m configs`; the commands are in `configs.command`."""

import sys

from teach_once.configs.command import cli

__all__ = ["cli"]

if __name__ == "__main__":
    sys.exit(cli())
