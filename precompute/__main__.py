"""python -m precompute NAME|PATH [--caches DIR] [key=value ...]

Runs the teacher over every (sample, view) that the cache does not hold yet. A complete cache is
recognised by its identity and left alone, without loading torch.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from configs.load import ConfigError, load_teacher
from configs.schema import TeacherConfig, as_plain
from nets.archs import ArchError, check_arch
from nets.taps import TapError, stage_modules
from store.errors import CacheDamaged, CacheError, CacheIncomplete, CacheMissing
from store.identity import cache_identity, file_sha256
from store.layout import cache_path
from store.reader import TeacherCache
from views.augment import AUGMENT_VERSION, pixel_canary
from views.datasets import Dataset, DatasetError, load_dataset

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

# A finished cache up to this size has every byte checked before it is called finished; a larger one
# only the presence and size of its files, unless --recheck asks for more.
_CHECKED_BYTES = 4 * 2**30


@app.command()
def main(
    name: Annotated[
        str, typer.Argument(help="configs/teacher/NAME.yaml, or a path to a YAML file")
    ],
    overrides: Annotated[list[str] | None, typer.Argument(help="key.sub=value ...")] = None,
    caches: Annotated[Path, typer.Option(help="folder of the caches")] = Path("caches"),
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, ...")] = "auto",
    batch_size: Annotated[int, typer.Option(min=1, help="images per forward pass")] = 256,
    block_rows: Annotated[int | None, typer.Option(min=1, help="records per block, if new")] = None,
    recheck: Annotated[bool, typer.Option(help="check every byte of a large cache too")] = False,
) -> None:
    """Fill the cache of one teacher."""
    console = Console(soft_wrap=True, highlight=False, markup=False)
    config = load_teacher(name, overrides or [])
    check_arch(config.teacher.arch)
    dataset = load_dataset(config.dataset)
    stages = stage_modules(config.teacher.arch, config.taps.stages)
    identity = cache_identity(
        as_plain(config),
        dataset_digest=dataset.digest,
        augment_version=AUGMENT_VERSION,
        stages=stages,
        weights_sha256=_weights_sha256(config, name),
    )
    path = cache_path(caches, config.name, identity)
    cache = _if_complete(path, config, dataset, recheck)
    if cache is not None:
        console.print(f"{path} is complete: nothing to do. {_measured(cache)}")
        return

    from nets.precision import pick_device
    from precompute.run import PassOptions, fill_cache

    options = PassOptions(pick_device(device), batch_size, block_rows)
    cache = fill_cache(path, config, dataset, identity, stages, options, console)
    console.print(f"{path} is complete. {_measured(cache)}")


def _weights_sha256(config: TeacherConfig, name: str) -> str:
    weights = Path(config.teacher.weights)
    if weights.is_file():
        return file_sha256(weights)
    if config.training is not None:
        help_text = f"train the teacher first: python -m train teacher {name}"
    else:
        help_text = "put the file there or set teacher.weights=PATH"
    raise ArchError(f"teacher.weights: there is no file {weights}\n  to mend it: {help_text}")


def _if_complete(
    path: Path, config: TeacherConfig, dataset: Dataset, recheck: bool
) -> TeacherCache | None:
    """The cache, if it holds all the views asked for and is sound; None if there is work to do."""
    try:
        cache = TeacherCache.open(path)
    except (CacheMissing, CacheIncomplete, CacheDamaged):
        return None
    canary = pixel_canary(dataset.train, config.views)
    cache.refuse_unless(cache.identity, labels=dataset.train.labels, canary=canary)
    small = cache.nbytes <= _CHECKED_BYTES
    if cache.num_views < config.views.num_views or not cache.measured:
        return None
    return None if cache.faults(read=small or recheck) else cache


def _measured(cache: TeacherCache) -> str:
    found = cache.measured
    return (
        f"Teacher: test error {found['test_top1_error']:.2f} % top-1, "
        f"{found['test_top5_error']:.2f} % top-5; right on "
        f"{100 * found['train_agreement']:.2f} % of the cached views."
    )


def cli(arguments: list[str] | None = None) -> int:
    """Run the command line; a mistake of the user's is one message and exit status 2."""
    try:
        app(arguments)
    except SystemExit as ended:  # how typer returns, also from --help and a wrong option
        return int(ended.code or 0)
    except (ConfigError, DatasetError, ArchError, TapError, CacheError) as error:
        print(f"error: {error}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(cli())
