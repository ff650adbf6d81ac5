"""The names of the files of a run; `train.records` says what each of them holds.

Imports nothing, so that a program which only reads runs starts fast.
"""

from __future__ import annotations

RUN_FILE = "run.json"
SUMMARY_FILE = "summary.json"
METRICS_FILE = "metrics.jsonl"
CHECKPOINT_FILE = "checkpoint.pt"
