"""Seed a network's random draws (dropout, stochastic depth) with one number."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's global generators in a context and restore their state afterwards.

    Seeds the CPU and every GPU in use. `torch.manual_seed` would also seed GPUs that are not in use
    yet, which takes most of the time.
    """
    generators = [torch.default_generator, *torch.cuda.default_generators]
    states = [generator.get_state() for generator in generators]
    for generator in generators:
        generator.manual_seed(seed)
    try:
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)
