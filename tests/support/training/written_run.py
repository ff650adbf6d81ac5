"""Write files of finished runs like the trainer's, with any error and settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from teach_once.store.identity import identity_sha256
from teach_once.train.runs.files import figures_of, metrics_line, run_document, summary_document

TEACHER = {
    "test_top1_error": 5.0,
    "test_top5_error": 1.0,
    "train_agreement": 0.99,
    "images_per_second": 50.0,
}
IDENTITY = {"training": {"epochs": 2}, "num_views": 4, "teacher_outputs": "cache", "cache": {}}
SUMMARY = {
    "student": "small",
    "model": "resnet8",
    "seconds": 3.0,
    "num_samples": 100,
    "num_classes": 10,
    "files_sha256": {},
    "is_taught": True,
    "cache": "t-12345678",
    "num_teachers": 1,
    "cache_sha256": "12345678ff",
    "teacher": TEACHER,
    "teacher_weights": [],
    "device": "cpu",
    "threads": 1,
    "versions": {"torch": "2"},
}
EPOCH = {
    "loss": 1.0,
    "losses": {},
    "weights": {},
    "validation": None,
    "learning_rate": 0.1,
    "train_seconds": 1.0,
    "wait_seconds": 0.5,
}


def write_finished_run(runs_dir: Path, label: str, seed: int, top1: float, **settings: Any) -> Path:
    """Write a run in `runs_dir`/small; settings go into run.json. Returns its folder."""
    identity = {**IDENTITY, "terms": [{"loss": label}], "seed": seed, **settings}
    sha256 = identity_sha256(identity)
    folder = runs_dir / "small" / f"{label}-seed{seed}-{sha256[:8]}"
    folder.mkdir(parents=True)
    (folder / "run.json").write_bytes(run_document(identity))
    count = identity["training"]["epochs"]
    test = {"top1_error": top1, "top5_error": 0.0}
    epochs = [{"epoch": n, "test": test, **EPOCH} for n in range(1, count + 1)]
    lines = (metrics_line(epoch, sha256) for epoch in epochs)
    (folder / "metrics.jsonl").write_bytes(b"".join(lines))
    of_run = {"run_sha256": sha256, "method": label, "seed": seed}
    summary = {**SUMMARY, **of_run, **figures_of(epochs)}
    (folder / "summary.json").write_bytes(summary_document(summary))
    return folder


def errors(top1: float, top5: float | None = None) -> dict[str, float]:
    """Return these errors as the metrics of a run."""
    return {"top1_error": top1} | ({} if top5 is None else {"top5_error": top5})
