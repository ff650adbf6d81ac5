"""The figures of a run, worked out from its metrics: its last and its best epoch.

Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

EMA = "-ema"  # ends the names of averaged weights
BEST_NAMES = ("best", f"best{EMA}")


def prefix_of(name: str) -> str:
    """Of the keys of a line of metrics that hold the errors of these weights ("best-ema")."""
    return "ema_" if name.endswith(EMA) else ""


def best_of(metrics: Sequence[Mapping[str, Any]], prefix: str = "") -> Mapping[str, Any] | None:
    """The epoch with the lowest deciding error, the first of several; None if none was tested."""
    tested = [epoch for epoch in metrics if deciding_error(epoch, prefix) is not None]
    return min(tested, key=lambda epoch: deciding_error(epoch, prefix) or 0.0, default=None)


def deciding_error(epoch: Mapping[str, Any], prefix: str = "") -> float | None:
    """The top-1 error that the best epoch is chosen by: validation, else test; None: not tested."""
    top1, top5, validation = (
        epoch.get(f"{prefix}{name}")
        for name in ("top1_error", "top5_error", "validation_top1_error")
    )
    if top1 is None or top5 is None:
        return None
    return float(top1 if validation is None else validation)


def figures_of(metrics: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What a summary says of these epochs; the last one has been tested."""
    last = metrics[-1]
    figures: dict[str, Any] = {"epochs": last["epoch"]}
    for kind in ("", EMA):
        prefix = prefix_of(kind)
        if (best := best_of(metrics, prefix)) is not None:
            chosen_on = "test" if last[f"{prefix}validation_top1_error"] is None else "validation"
            figures[f"last{kind}"] = _errors_of(last, prefix)
            figures[f"best{kind}"] = {
                "epoch": best["epoch"],
                "chosen_on": chosen_on,
                **_errors_of(best, prefix),
            }
    return figures


def _errors_of(epoch: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {name: epoch[f"{prefix}{name}"] for name in ("top1_error", "top5_error")}
