"""Write the report with the command that `python -m train ablation` prints at its end."""

from __future__ import annotations

import re
import shlex

from teach_once.report.command import cli


def write_printed_report(printed: str) -> int:
    """Run the last command after `report:`, in this process; returns its exit status."""
    words = shlex.split(re.findall(r"^report: (.*)$", printed, re.MULTILINE)[-1])
    return cli(words[words.index("report") + 1 :])
