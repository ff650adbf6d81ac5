"""timm's published weights: where the file is, and how its tensors are converted.

This project reads the file. timm only converts the tensors: it renames old names and resizes
position embeddings for another image size.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
from torch import Tensor

from teach_once.nets.networks.archs import ArchError
from teach_once.nets.networks.timm_models import Size, import_timm, native_size, pretrained_cfg
from teach_once.runtime.command.program import program_text

_HUB_FILES = ("model.safetensors", "pytorch_model.bin")  # in order of preference


def pretrained_file(model: str) -> Path:
    """Return the path of a model's published weights after download; the file need not exist.

    Raises ArchError if timm publishes none.
    """
    cfg = _published(model)
    if not cfg.hf_hub_id:
        return Path(torch.hub.get_dir()) / "checkpoints" / Path(urlparse(cfg.url).path).name
    from huggingface_hub import constants, try_to_load_from_cache

    repo, revision = _repository(cfg)
    for name in _HUB_FILES:
        found = try_to_load_from_cache(repo, name, revision=revision)
        if isinstance(found, str):
            return Path(found)
    folder = f"models--{repo.replace('/', '--')}"
    return Path(constants.HF_HUB_CACHE) / folder / _HUB_FILES[0]


def download_pretrained(model: str) -> Path:
    """Download a model's published weights; returns the file's path.

    Raises ArchError if the download fails.
    """
    cfg = _published(model)
    return _from_hub(model, cfg) if cfg.hf_hub_id else _from_url(model, cfg.url)


def converted(
    model: str, tensors: dict[str, Any], *, num_classes: int, image_size: Size
) -> dict[str, Any]:
    """Convert a file's tensors as timm does when it builds a model; unchanged if timm cannot.

    num_classes: classes of the classifier; 0: as published. image_size: (H, W) of the network's
    images.
    """
    cfg = pretrained_cfg(model)
    classes = num_classes or cfg.num_classes
    settings: dict[str, Any] = {"num_classes": classes}
    if cfg.fixed_input_size:
        settings["img_size"] = image_size
    overlay = {"state_dict": tensors, "num_classes": classes}
    try:
        network = import_timm().create_model(
            model, pretrained=True, pretrained_cfg_overlay=overlay, **settings
        )
    except (AssertionError, AttributeError, KeyError, RuntimeError, TypeError, ValueError):
        return tensors  # `load_weights` reports the mismatched tensors
    state: dict[str, Tensor] = network.state_dict()
    return state


def _published(model: str) -> Any:
    cfg = pretrained_cfg(model)
    if not (cfg.hf_hub_id or cfg.url):
        raise ArchError(
            f"timm publishes no weights for {model}",
            fix="set teacher.weights=PATH, or choose another model: "
            f"{program_text('nets')} list 'timm:{model.partition('_')[0]}*'",
        )
    return cfg


def _repository(cfg: Any) -> tuple[str, str | None]:
    """Return the name of a repository on the Hugging Face hub and its revision, if given."""
    repo, _, revision = cfg.hf_hub_id.partition("@")
    return repo, revision or None


def _from_hub(model: str, cfg: Any) -> Path:
    from huggingface_hub import hf_hub_download, hf_hub_url
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    repo, revision = _repository(cfg)
    problem: Exception | None = None
    for name in _HUB_FILES:
        try:
            return Path(hf_hub_download(repo, name, revision=revision))
        except LocalEntryNotFoundError as error:  # no connection
            problem = error
            break
        except EntryNotFoundError as error:
            problem = error
        except Exception as error:  # any error of the hub's HTTP client
            problem = error
            break
    raise _not_downloaded(model, hf_hub_url(repo, _HUB_FILES[0], revision=revision), problem)


def _from_url(model: str, url: str) -> Path:
    file = pretrained_file(model)
    try:
        torch.hub.download_url_to_file(url, str(file), progress=False)
    except (OSError, RuntimeError) as error:
        raise _not_downloaded(model, url, error) from None
    return file


def _not_downloaded(model: str, url: str, error: Exception | None) -> ArchError:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    height, width = native_size(model)
    return ArchError(
        f"teacher.weights: timm's weights of {model} ({height}x{width} pixels) cannot be "
        f"downloaded: {reason}",
        fix=f"download {url} where there is a network, and set teacher.weights=PATH of that file",
    )
