"""python -m report: see `report.command`."""

import sys

from teach_once.report.command import cli

__all__ = ["cli"]

if __name__ == "__main__":
    sys.exit(cli())
