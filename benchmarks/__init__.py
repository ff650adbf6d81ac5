"""Measurements: each program takes its rows side by side in one run and prints ratios."""

import runtime as runtime  # sets how OpenMP waits, as in every program, before they import torch
