"""Find a network's classifier and read its input, the embedding of an image.

timm's models name their classifier. In other networks it is the layer whose output the network
returns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from teach_once.nets.networks.layout import TapError

_NO_VECTOR = "choose another network, or use taps of its stages"


class NoClassifier(nn.Identity):
    """The place of a removed classifier, so that its input can still be found and read."""


def classifiers_of(network: nn.Module, image_shape: tuple[int, int, int]) -> tuple[str, ...]:
    """Return the names of the modules that turn the embedding into logits.

    There is one, or two in a distilled model. image_shape: (H, W, C). Raises TapError if none is
    found.
    """
    if removed := [name for name, m in network.named_modules() if isinstance(m, NoClassifier)]:
        return tuple(removed)
    get: Callable[[], object] | None = getattr(network, "get_classifier", None)
    try:
        heads = _flat(get()) if get is not None else [_last_layer(network, image_shape)]
    except AttributeError:  # some timm models without a classifier
        heads = []
    names = tuple(name for name, module in network.named_modules() if module in heads and name)
    if not names:
        raise TapError(
            "the network has no embedding: none of its layers returns what the network returns",
            fix=_NO_VECTOR,
        )
    return names


@torch.no_grad()
def remove_classifier(network: nn.Module, image_shape: tuple[int, int, int]) -> None:
    """Make the network return its embedding (B, D) instead of logits.

    image_shape: (H, W, C). Raises TapError if it has no classifier, or no embedding.
    """
    height, width, channels = image_shape
    for name in classifiers_of(network, image_shape):
        parent, _, own = name.rpartition(".")
        setattr(network.get_submodule(parent), own, NoClassifier())
    was_training = network.training
    output = network.eval()(torch.zeros(1, channels, height, width))
    network.train(was_training)
    if not isinstance(output, Tensor) or output.ndim != 2:
        shape = tuple(output.shape[1:]) if isinstance(output, Tensor) else type(output).__name__
        raise TapError(
            f"without its classifier the network returns {shape} per image, expected a vector",
            fix=_NO_VECTOR,
        )


@contextmanager
def read_embedding(
    network: nn.Module, classifiers: Sequence[str], values: MutableMapping[str, Tensor]
) -> Iterator[None]:
    """Store the classifiers' input (B, D) of each forward pass as `values["embedding"]`.

    The inputs of two classifiers are averaged, as their logits are. Without classifiers nothing is
    stored. Hooks are removed when the context exits. A forward pass raises TapError if a
    classifier's input is not a vector.
    """
    entering: dict[str, Tensor] = {}

    def hook_for(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def keep(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            entering[name] = as_vector(name, inputs[0])
            if len(entering) == len(classifiers):
                values["embedding"] = _mean(list(entering.values()))
                entering.clear()

        return keep

    modules = dict(network.named_modules())
    handles = [modules[name].register_forward_pre_hook(hook_for(name)) for name in classifiers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def embedding_read(values: Mapping[str, Tensor], classifiers: Sequence[str]) -> Tensor:
    """Return the embedding (B, D) that a forward pass within `read_embedding` stored.

    Raises TapError if the network did not call its classifiers.
    """
    if "embedding" not in values:
        raise TapError(
            f"the network does not call its classifier {classifiers[0]!r}: it has no embedding",
            fix=_NO_VECTOR,
        )
    return values["embedding"]


def as_vector(module: str, features: Tensor) -> Tensor:
    """Return a classifier's input, (B, D) or (B, D, 1, 1), as (B, D).

    Raises TapError if it has another shape.
    """
    if features.ndim < 2 or features[0].numel() != features.shape[1]:
        raise TapError(
            f"the input of the classifier {module!r} has shape {tuple(features.shape[1:])} per "
            f"image, expected a vector: the network has no embedding",
            fix=_NO_VECTOR,
        )
    return features.flatten(1)


def _mean(vectors: list[Tensor]) -> Tensor:
    if len({vector.shape for vector in vectors}) > 1:
        sizes = ", ".join(str(vector.shape[1]) for vector in vectors)
        raise TapError(f"the classifiers take embeddings of sizes {sizes}", fix=_NO_VECTOR)
    return vectors[0] if len(vectors) == 1 else torch.stack(vectors).mean(dim=0)


def _flat(found: object) -> list[nn.Module]:
    """Return the modules in the result of timm's `get_classifier`: a module or nested lists."""
    if isinstance(found, (tuple, list, nn.ModuleList)):
        return [each for each in found if isinstance(each, nn.Module)]
    return [found] if isinstance(found, nn.Module) else []


@torch.no_grad()
def _last_layer(network: nn.Module, image_shape: tuple[int, int, int]) -> nn.Module | None:
    """Return the linear layer or convolution whose output the network returns.

    It is found by a forward pass over a blank image of shape (H, W, C).
    """
    height, width, channels = image_shape
    outputs: dict[nn.Module, Tensor] = {}

    def keep(module: nn.Module, inputs: object, output: Tensor) -> None:
        outputs[module] = output

    layers = [m for m in network.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    handles = [layer.register_forward_hook(keep) for layer in layers]
    was_training, device = network.training, next(network.parameters()).device
    network.eval()
    try:
        logits = network(torch.zeros(1, channels, height, width, device=device))
    finally:
        network.train(was_training)
        for handle in handles:
            handle.remove()
    is_it = (layer for layer, output in outputs.items() if output.data_ptr() == logits.data_ptr())
    return next(is_it, None)
