"""A loss whose duration is in a file, to which it also appends each of its steps."""

from __future__ import annotations

import os
import time
from pathlib import Path

from torch import Tensor

from teach_once.train.terms import loss_term

FOLDER = "SLOW_LOSS_FOLDER"  # environment variable


@loss_term()
def slow(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    folder = Path(os.environ.get(FOLDER, "/nonexistent"))
    if (folder / "seconds").is_file():
        with (folder / "steps").open("a") as steps:
            steps.write("x")
        time.sleep(float((folder / "seconds").read_text()))
    return (student_logits - teacher_logits).square().mean()
