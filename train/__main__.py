"""Run `python -m train`; the commands are in `train.cli.commands`."""

from teach_once.runtime.command.frame import end_process
from teach_once.train.cli.commands import cli

__all__ = ["cli"]

if __name__ == "__main__":
    end_process(cli())
