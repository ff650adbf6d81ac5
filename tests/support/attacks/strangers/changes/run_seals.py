"""Recompute the checksums of a run's files, as a forger would, ignoring what cannot be sealed."""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from teach_once.train.recording.checkpoint import content_sha256
from tests.support.attacks.strangers.changes.seals import canonical


def sha256(value: Any) -> str:
    return hashlib.sha256(canonical(value)).hexdigest()


def seal_run(file: Path) -> None:
    """Recompute the identity's sha256."""
    with suppress(Exception):
        _seal_key(file, "run_sha256")


def seal_summary(file: Path) -> None:
    with suppress(Exception):
        _seal_key(file, "content_sha256")


def _seal_key(file: Path, key: str) -> None:
    """Recompute a key in place, so that the rest of the text does not change."""
    text = file.read_bytes()
    content = json.loads(text)
    stated = content.pop(key)
    file.write_bytes(text.replace(stated.encode(), sha256(content).encode()))


def seal_metrics(file: Path) -> None:
    """Recompute the checksum of each line that is still JSON."""
    with suppress(Exception):
        run = json.loads((file.parent / "run.json").read_bytes())["run_sha256"]
        sealed = []
        for line in file.read_bytes().split(b"\n"):
            with suppress(Exception):
                content = json.loads(line)
                stated = content.pop("check")
                check = sha256({"epoch": content, "run": run})[: len(stated)]
                line = line.replace(stated.encode(), check.encode())
            sealed.append(line)
        file.write_bytes(b"\n".join(sealed))


def seal_weights(file: Path) -> None:
    """Recompute the sha256 in the summary next to them, or in the teacher's training folder."""
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    with suppress(Exception):
        if file.name == "teacher.pt":
            summary, key = file.with_suffix(".training") / "summary.json", "weights_sha256"
            holder = content = json.loads(summary.read_bytes())
        else:
            summary, key = file.parent / "summary.json", file.name
            content = json.loads(summary.read_bytes())
            holder = content["files_sha256"]
        holder[key] = digest
        summary.write_text(json.dumps(content))
        seal_summary(summary)


def seal_checkpoint(file: Path) -> None:
    with suppress(Exception):
        content = torch.load(file, weights_only=True)
        rest = {key: value for key, value in content.items() if key != "content_sha256"}
        torch.save({**rest, "content_sha256": content_sha256(rest)}, file)
