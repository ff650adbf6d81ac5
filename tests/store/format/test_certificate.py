"""The certificate of reduced records: their difference from the teacher's full outputs."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from rich.console import Console

import teach_once.store.format.certificate
from teach_once.configs.schema import TeacherConfig
from teach_once.precompute.compute.teacher_pass import PassOptions, TeacherPass
from teach_once.precompute.run_pass import fill_cache
from teach_once.runtime.safe.locks import Job
from teach_once.store import CacheError, CacheWriter, TeacherCache
from teach_once.store.command import cli
from teach_once.store.format.certificate import (
    Comparison,
    certificate_in,
    certificate_text,
    certified_blocks,
)
from teach_once.store.format.spec import Block
from teach_once.store.move.hdf5 import export_cache
from teach_once.store.move.trim import record_figures, trim_cache
from tests.support.caches.teacher_cache import CPU, make_cache, setup_of

Make = Callable[..., TeacherConfig]
REDUCED = ("taps.logits={top_k: 3}", "taps.channel_means=uint8")


def recomputed(full: TeacherCache, reduced: TeacherCache) -> dict[str, float]:
    """The figures from two whole caches, by torch's own KL divergence."""
    both = [
        {
            tap: torch.from_numpy(
                np.concatenate([c.read_view(v, [tap])[tap] for v in range(c.num_views)])
            ).double()
            for tap in c.taps
        }
        for c in (full, reduced)
    ]
    kl = {
        t: F.kl_div(
            *(F.log_softmax(each["logits"] / t, dim=1) for each in reversed(both)),
            log_target=True,
            reduction="batchmean",
        ).item()
        for t in (1, 4)
    }
    stages = [tap for tap in full.taps if tap.startswith("stage")]
    errors = torch.cat([(both[0][s] - both[1][s]).abs().ravel() for s in stages])
    return {
        "certified_records": full.num_views * full.num_samples,
        "kl_t1": kl[1],
        "kl_t4": kl[4],
        "means_largest_error": errors.max().item(),
        "means_mean_error": errors.mean().item(),
    }


@pytest.fixture
def reduced(small_teacher: Make, tmp_path: Path) -> TeacherCache:
    return make_cache(small_teacher(*REDUCED), tmp_path / "caches")


def test_a_pass_compares_what_it_stored_with_the_full_outputs(
    reduced: TeacherCache, small_teacher: Make, tmp_path: Path
) -> None:
    exact = ("taps.logits=float32", "taps.channel_means=float32")
    full = make_cache(small_teacher(*exact), tmp_path / "full")
    assert certificate_in(full.measured) == {}
    found = certificate_in(reduced.measured)
    assert found == pytest.approx(recomputed(full, reduced), rel=1e-3)
    assert 0.001 < found["kl_t1"] < found["kl_t4"]


def test_only_what_is_reduced_is_compared(small_teacher: Make, tmp_path: Path) -> None:
    logits = make_cache(small_teacher("taps.logits=uint8"), tmp_path)
    assert [*certificate_in(logits.measured)] == ["certified_records", "kl_t1", "kl_t4"]
    means = make_cache(small_teacher("taps.channel_means=uint8"), tmp_path)
    names = ["certified_records", "means_largest_error", "means_mean_error"]
    assert [*certificate_in(means.measured)] == names


def test_batches_do_not_change_the_figures() -> None:
    rng = np.random.default_rng(0)
    full = {"logits": rng.normal(size=(50, 7)), "stage1": rng.normal(size=(50, 3))}
    stored = {tap: values + rng.normal(0, 0.01, values.shape) for tap, values in full.items()}
    whole, parts = Comparison(), Comparison()
    whole.add(full, stored)
    for some in (slice(0, 1), slice(1, 40), slice(40, 50)):
        parts.add(*({tap: v[some] for tap, v in each.items()} for each in (full, stored)))
    assert parts.figures() == pytest.approx(whole.figures())


def test_at_most_so_many_records_are_computed_again(
    small_teacher: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teach_once.store.format.certificate, "MOST_RECORDS", 70)
    asked: list[tuple[int, int]] = []
    records = TeacherPass.records

    def counting(self: TeacherPass, view: int, ids: np.ndarray, taps: list) -> dict:
        asked.append((view, len(ids)))
        return records(self, view, ids, taps)

    monkeypatch.setattr(TeacherPass, "records", counting)
    cache = make_cache(small_teacher(*REDUCED), tmp_path)
    assert sum(rows for _, rows in asked) == cache.measured["certified_records"] <= 70
    assert {view for view, _ in asked} == set(range(cache.num_views))


def test_the_compared_records_stand_for_all_views_and_samples() -> None:
    def blocks(views: int, per_view: int, rows: int) -> list[Block]:
        starts = [(view, index) for view in range(views) for index in range(per_view)]
        return [Block(view, i, i * rows, (i + 1) * rows) for view, i in starts]

    large = certified_blocks(blocks(50, 313, 4096))
    assert sum(block.rows for block in large) == 4096
    assert len({block.view for block in large}) > 25
    assert len({block.index for block in large}) > 50
    small = blocks(2, 4, 16)
    assert certified_blocks(small) == small


class Killed(Exception):
    pass


@pytest.mark.parametrize("after", [2, None], ids=["within the pass", "before its end"])
def test_a_killed_pass_that_is_resumed_has_the_same_certificate(
    reduced: TeacherCache,
    small_teacher: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    after: int | None,
) -> None:
    def die(*_: object) -> None:
        raise Killed

    write_block, written = CacheWriter.write_block, [0]

    def dying(self: CacheWriter, *block: object) -> None:
        if written[0] == after:
            raise Killed
        written[0] += 1
        write_block(self, *block)

    config = small_teacher(*REDUCED)
    with monkeypatch.context() as patched:
        patched.setattr(CacheWriter, "write_block", dying)
        patched.setattr(CacheWriter, "finish", die)
        with pytest.raises(Killed):
            make_cache(config, tmp_path / "again")
    again = make_cache(config, tmp_path / "again")
    assert certificate_in(again.measured) == pytest.approx(certificate_in(reduced.measured))


def test_the_last_of_several_ranks_writes_it(
    reduced: TeacherCache, small_teacher: Make, tmp_path: Path
) -> None:
    setup, console = (
        setup_of(small_teacher(*REDUCED), tmp_path / "shared"),
        Console(file=io.StringIO()),
    )

    def share(rank: int) -> TeacherCache | None:
        options = PassOptions(CPU, 256, 16, job=Job("job", rank, 2))
        return fill_cache(setup, options, console)

    content = TeacherPass(setup, PassOptions(CPU)).content()
    with CacheWriter.open(setup.path, content, block_rows=16, job=Job("job", 0, 2)):
        assert share(1) is None  # rank 0 is still running
    found = share(0)
    assert found is not None
    assert certificate_in(found.measured) == pytest.approx(certificate_in(reduced.measured))


def test_growth_keeps_it_and_extends_it_where_there_were_fewer_records(
    small_teacher: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = make_cache(small_teacher(*REDUCED, "views.count=1"), tmp_path)
    assert one.measured["certified_records"] == 60
    record_figures(one.path, {"cd_change_trained": 0.25, "certified_steps": 7})
    two = make_cache(small_teacher(*REDUCED, "views.count=2"), tmp_path)
    assert two.measured["certified_records"] == 120
    assert two.measured["cd_change_trained"] == 0.25
    monkeypatch.setattr(teach_once.store.format.certificate, "MOST_RECORDS", 100)
    before = certificate_in(two.measured)
    assert certificate_in(make_cache(small_teacher(*REDUCED), tmp_path).measured) == before


def test_info_shows_it(reduced: TeacherCache, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli(["info", str(reduced.path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["certificate"]
    assert found == certificate_in(reduced.measured)
    assert found["certified_records"] == 180
    assert cli(["info", str(reduced.path)]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "stored against full outputs on 180 records: KL divergence of the logits" in told
    assert f"error of the means at most {found['means_largest_error']:.2g}" in told


def test_it_stays_with_a_cache_that_is_trimmed_or_passed_on(
    reduced: TeacherCache, tmp_path: Path
) -> None:
    before = certificate_in(reduced.measured)
    trim_cache(reduced.path, num_views=1)
    assert certificate_in(TeacherCache.open(reduced.path).measured) == before
    export_cache(reduced.path, tmp_path / "c.h5")
    assert certificate_in(TeacherCache.open(tmp_path / "c.h5").measured) == before


def test_further_figures_are_recorded_beside_the_others(
    reduced: TeacherCache, tmp_path: Path
) -> None:
    before = certificate_in(reduced.measured)
    more = {"kd_change_untrained": -0.01, "kd_change_trained": 0.02, "certified_steps": 1000}
    record_figures(reduced.path, more)
    cache = TeacherCache.open(reduced.path)
    assert certificate_in(cache.measured) == before | more
    assert cache.faults() == []
    told = certificate_text(cache.measured)
    assert "of the untrained student kd -1 %; losses of the trained student (1,000 steps)" in told
    with pytest.raises(ValueError, match="views is not a figure"):
        record_figures(reduced.path, {"views": 1})
    export_cache(reduced.path, tmp_path / "c.h5")
    with pytest.raises(CacheError, match="is a file"):
        record_figures(tmp_path / "c.h5", more)
