"""Refuses networks that are too large for this machine while they are being built.

A file may give the options of a constructor, and `depth: 1000000` would fill the memory. So a
network with options is first built without memory, on torch's meta device, and its layers and
parameters are counted as they are made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks

from nets.archs import ArchError
from runtime.formats import format_size
from runtime.limits import total_memory

MOST_TENSORS = 50_000  # the largest networks of timm have some thousand


def try_without_memory(arch: str, build: Callable[[], nn.Module]) -> None:
    """Build on the meta device and throw the network away. Raises ArchError if it is too large.

    Whatever else goes wrong there is left to the real build: some constructors cannot be run so.
    """
    try:
        with torch.device("meta"), limited_size(arch):
            build()
    except ArchError:
        raise
    except Exception:  # the real build says what is wrong
        return


@contextmanager
def limited_size(arch: str) -> Iterator[None]:
    """Raise ArchError within if a network gets more tensors or bytes than this machine can hold."""
    most_bytes, tensors, num_bytes = total_memory(), 0, 0

    def count(module: nn.Module, name: str, value: Tensor | nn.Module | None) -> None:
        nonlocal tensors, num_bytes
        tensors += 1
        if isinstance(value, Tensor):
            num_bytes += value.numel() * value.element_size()
        if tensors > MOST_TENSORS:
            raise _too_large(arch, f"more than {MOST_TENSORS:,} layers and parameters")
        if num_bytes > most_bytes:
            raise _too_large(
                arch,
                f"parameters of at least {format_size(num_bytes)}; this machine has "
                f"{format_size(most_bytes)} of memory",
            )

    handles = [
        hooks.register_module_parameter_registration_hook(count),
        hooks.register_module_buffer_registration_hook(count),
        hooks.register_module_module_registration_hook(count),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _too_large(arch: str, has: str) -> ArchError:
    return ArchError(f"arch {arch!r} with these options has {has}", fix="give smaller options")
