"""python -m examples.export_onnx exported student.onnx    (after `make export-student`)

Converts an exported student to ONNX and compares both on random images. Needs the packages of the
`onnx` extra. Give it only your own exports: torch.export.load runs what a program file contains.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path

import numpy as np
import torch


def convert(exported: Path, target: Path) -> float:
    """Write `target`; returns the largest difference of its logits relative to the largest logit.

    Its input `images` is (B, C, H, W) float32, normalized as in exported/student.json; B is
    dynamic.
    """
    import onnxruntime  # part of the extra; the module can be imported without it

    program = torch.export.load(exported / "student.pt2")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # from torch's own calls
        torch.onnx.export(program, f=target, dynamo=True, external_data=False, verbose=False)
    shape = json.loads((exported / "student.json").read_text())["input_shape"]
    images = torch.randn(5, *shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = program.module()(images).numpy()
    session = onnxruntime.InferenceSession(target)
    (logits,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    return float(np.abs(logits - expected).max() / np.abs(expected).max())


if __name__ == "__main__":
    exported, target = map(Path, sys.argv[1:])
    print(f"{target}: logits differ by {convert(exported, target):.1e} of the largest")
