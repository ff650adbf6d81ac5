"""Where a teacher's weights lie; imports torch only for weights that torchvision names."""

from __future__ import annotations

from pathlib import Path

_TORCHVISION = "torchvision:"


def weights_file(weights: str) -> Path:
    """The file that `teacher.weights` means: a path, or `torchvision:NAME` (downloaded if missing).

    Raises ArchError for a name that torchvision does not know, or that cannot be downloaded.
    """
    if not weights.startswith(_TORCHVISION):
        return Path(weights)
    from nets.weights import torchvision_weights

    return torchvision_weights(weights.removeprefix(_TORCHVISION))
