"""Measurements: each program takes its rows side by side in one run and prints ratios.

Importing `runtime` sets how OpenMP waits, as in every program, before they import torch.
"""

import teach_once.runtime  # noqa: F401
