"""The certificate of a pass: what it stored, compared with the teacher's full outputs.

Some records are computed once more at the end, when the cache is complete: whoever ends the
pass finds them there, however many processes wrote them and whichever of these were killed.
"""

from __future__ import annotations

import numpy as np
from rich.console import Console

from nets.taps import taps_stored
from precompute.teacher_pass import TeacherPass
from runtime.formats import counted
from store import TeacherCache
from store.certificate import (
    RECORDS,
    Comparison,
    certificate_in,
    certified_blocks,
    is_reduced,
)


def certificate(
    teacher_pass: TeacherPass, cache: TeacherCache, console: Console
) -> dict[str, float]:
    """The certificate of a complete cache; {} where nothing that the config asks for is reduced.

    One of as many records as would be compared now is kept.
    """
    asked = {tap: cache.taps[tap] for tap in teacher_pass.setup.tap_names}
    reduced = {tap: spec for tap, spec in asked.items() if is_reduced(spec)}
    if not reduced:
        return {}
    blocks = certified_blocks(cache.manifest.blocks(cache.num_views))
    num_records = sum(block.rows for block in blocks)
    before = certificate_in(cache.measured)
    if before.get(RECORDS, 0) >= num_records:
        return before
    console.print(f"comparing {counted(num_records, 'stored record')} with the full outputs")
    comparison, taps = Comparison(), taps_stored(reduced)
    for block in blocks:
        full = teacher_pass.records(block.view, np.arange(block.start, block.stop), taps)
        whole = cache.manifest.block(block.view, block.index)
        comparison.add(
            {tap: full[tap].float().cpu().numpy() for tap in reduced},
            {tap: each[: block.rows] for tap, each in cache.read_block(whole, [*reduced]).items()},
        )
    return before | comparison.figures()
