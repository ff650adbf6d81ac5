"""Open a config's dataset and choose its samples.

Images are read from disk only when they are needed. Checking whether a cache matches needs only the
dataset's digest.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from teach_once.configs.schema import DatasetConfig, Digits, ImageFolder, Images, Packed, PackedOnce
from teach_once.runtime.command.program import program_text
from teach_once.runtime.machine.urls import path_or_url
from teach_once.runtime.safe.text import one_line
from teach_once.views.splits import DatasetError, ImageSource, Selection, Split

__all__ = ["Dataset", "DatasetError", "Split", "load_dataset"]


_NAMED_CLASSES = 5


@dataclass(frozen=True, eq=False)
class Dataset:
    """The splits of a dataset in their fixed order.

    digest: sha256 (hex) that identifies the training samples and labels. type: the config's dataset
    type; for a packed file, the type of the original dataset; None: the config's. class_names:
    None: the images have no labels. is_reduced: True if the config's selection leaves out any
    sample. notes, order_hint, check_headers: see `ImageSource`. validation: training samples held
    out to choose the best epoch; None: the test split is used.
    """

    name: str
    class_names: tuple[str, ...] | None
    train: Split
    validation: Split | None
    test: Split
    digest: str
    digest_tested: Callable[[], str] = lambda: ""  # computed for runs only, not for passes
    digest_test: Callable[[], str] = lambda: ""
    type: str | None = None
    is_reduced: bool = True
    notes: tuple[str, ...] = ()
    order_hint: str = ""
    check_headers: Callable[[], None] = lambda: None

    @cached_property
    def tested_digest(self) -> str:
        """Return the digest of the samples and labels of the validation and test splits."""
        return self.digest_tested()

    @cached_property
    def test_digest(self) -> str:
        """Return the digest of the samples and labels of the test split."""
        return self.digest_test()

    @property
    def has_labels(self) -> bool:
        return self.class_names is not None

    @property
    def num_classes(self) -> int:
        """Number of classes; 0 without labels."""
        return len(self.class_names or ())

    @property
    def hints(self) -> list[str]:
        """Return hints for the user at the start of a pass or a training."""
        return [*self.notes, *filter(None, [self.untested_hint])]

    @property
    def untested_hint(self) -> str:
        """Return a hint about classes that the test split lacks, or ""."""
        tested = set(self.test.label_values.tolist())
        names = [name for label, name in enumerate(self.class_names or ()) if label not in tested]
        if not names:
            return ""
        some = ", ".join(names[:_NAMED_CLASSES])
        if len(names) > _NAMED_CLASSES:
            some = f"{len(names)} of {self.num_classes} classes ({some}, ...)"
        return f"hint: no test image belongs to {some}, so test errors do not cover them"


def load_dataset(config: DatasetConfig, kept_in: Path | None = None) -> Dataset:
    """Open the dataset of a config. Raises DatasetError if it cannot be used.

    kept_in: folder of caches, next to which the listing of an image folder is stored.
    """
    source = open_source(config, kept_in)
    fraction = config.validation_fraction
    kept, held = Selection.of_config(config).choose(source.train)
    if not len(kept) or (fraction and not len(held)):
        raise DatasetError(
            f"dataset.validation_fraction {fraction} leaves {len(kept)} samples to train on and "
            f"{len(held)} to hold out"
        )
    return Dataset(
        name=source.name,
        class_names=source.class_names,
        train=source.train.subset(kept),
        validation=source.train.subset(held) if len(held) else None,
        test=source.test,
        digest=source.digest_of(kept),
        digest_tested=lambda: _joined(
            source.test_digest(), *([source.digest_of(held)] if len(held) else [])
        ),
        digest_test=source.test_digest,
        type=source.type,
        is_reduced=len(kept) + len(held) < len(source.train),
        notes=source.hints,
        order_hint=source.order_hint,
        check_headers=source.check_headers,
    )


def _joined(*digests: str) -> str:
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def open_source(config: DatasetConfig, kept_in: Path | None = None) -> ImageSource:
    """Open all samples, before the config's selection applies.

    Raises DatasetError if the dataset cannot be used.
    """
    if isinstance(config, Packed | PackedOnce):
        from teach_once.views.packed.read import packed

        file = config.file if isinstance(config, Packed) else config.packed
        source = packed(path_or_url(file), config.max_pixels, kept_in)
        if isinstance(config, PackedOnce) and (config.label is None) != (not source.class_names):
            stored = "labels" if source.class_names else "no labels"
            raise DatasetError(
                f"dataset.packed: the images in {one_line(file)} have {stored}, but dataset.label "
                f"is {one_line(config.label or 'null')}",
                fix=f"pack the images again: {program_text('views')} pack NAME|PATH",
            )
        return source
    if isinstance(config, ImageFolder):
        from teach_once.views.images.folder_layout import FolderLayout
        from teach_once.views.images.folders import image_folder

        layout = FolderLayout(
            config.test, config.class_names, config.test_fraction, config.test_seed
        )
        return image_folder(Path(config.root), config.max_pixels, kept_in, layout)
    if isinstance(config, Images):
        from teach_once.views.images.folders import unlabeled_images

        return unlabeled_images(
            Path(config.root), config.max_pixels, kept_in, config.holdout_fraction
        )
    from teach_once.views.images import bundled

    return bundled.digits() if isinstance(config, Digits) else bundled.cifar(config)
