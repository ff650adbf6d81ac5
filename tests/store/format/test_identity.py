"""A cache's identity: its content, canonical form, hash and differences."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from teach_once.configs.load import load_teacher
from teach_once.configs.schema import TeacherConfig
from teach_once.nets.teacher.identity import teacher_identity
from teach_once.store.identity import (
    Difference,
    Identity,
    cache_identity,
    canonical_json,
    differences,
    identity_sha256,
    with_weights,
    with_weights_of,
)
from teach_once.views.datasets import load_dataset
from teach_once.views.identity import views_identity


def identity_of(config: TeacherConfig) -> Identity:
    """As both stages assemble it, for a dataset and weights that are made up."""
    dataset = load_dataset(load_teacher("digits-resnet20").dataset)
    dataset = dataclasses.replace(dataset, digest="d", is_reduced=True)
    return with_weights(
        cache_identity(views_identity(config, dataset), teacher_identity(config)), "w"
    )


def test_the_identity_of_a_config_is_pinned() -> None:
    identity = identity_of(load_teacher("digits-resnet20"))
    assert list(identity) == ["identity_version", "dataset", "views", "teacher", "taps"]
    assert identity_sha256(identity) == (
        "79c5ba6111e0c1436a94c7d1b8f70f31973314ef1b5f99b6784b2534526a3017"
    )


def test_what_does_not_decide_bytes_is_not_in_the_identity() -> None:
    def identity(*overrides: str) -> str:
        return identity_sha256(identity_of(load_teacher("digits-resnet20", list(overrides))))

    same = ["views.count=2", "teacher.weights=elsewhere.pt", "training.epochs=3", "training=null"]
    same += ["teacher.stem=imagenet"]  # resnet20 has no choice of stems
    different = [
        "views.seed=1",
        "views.augment.pad_px=2",
        "views.augment.padding=reflect",
        "views.augment.flip=true",
        "teacher.arch=resnet8",
        "teacher.precision=bfloat16",
        "teacher.bn=recalibrated",
        "teacher.options={width: 0.5}",
        "teacher.options={width: 0.25}",
        "taps.logits=float32",
        "taps.channel_means=float32",
        "taps.stages=[layer2, layer3]",
        "dataset.max_per_class=3",
        "dataset.validation_fraction=0.1",
        "dataset.normalization.mean=[0.1]",
        "dataset.normalization.std=[0.1]",
    ]
    assert {identity(o) for o in same} == {identity()}
    assert len({identity(), *(identity(o) for o in different)}) == 1 + len(different)


def test_canonical_json_and_its_hash_are_pinned() -> None:
    value = {"b": [1, 2.5, None], "a": {"ü": True}}
    assert canonical_json(value) == '{"a":{"\\u00fc":true},"b":[1,2.5,null]}'
    assert identity_sha256({}) == "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"
    with pytest.raises(ValueError, match="JSON compliant"):
        canonical_json(float("nan"))


@given(
    st.dictionaries(st.sampled_from("abc"), st.integers() | st.text(max_size=3), max_size=3),
    st.dictionaries(st.sampled_from("abc"), st.integers() | st.text(max_size=3), max_size=3),
)
def test_differing_fields_are_named_if_and_only_if_the_hashes_differ(a: dict, b: dict) -> None:
    assert bool(differences(a, b)) == (identity_sha256(a) != identity_sha256(b))


def test_a_difference_prints_its_field_and_both_values() -> None:
    ours = {"teacher": {"arch": "resnet56", "weights_sha256": "0123456789" * 6}, "seed": 1}
    theirs = {"teacher": {"arch": "resnet20", "weights_sha256": "9" * 60}, "seed": 1, "bn": "eval"}
    found = differences(ours, theirs)
    assert found[0] == Difference("bn", None, "eval")
    assert [str(each) for each in found[1:]] == [
        "teacher.arch: expected 'resnet56', found 'resnet20'",
        "teacher.weights_sha256: expected '0123456789012345...789', found '9999999999999999...999'",
    ]


@pytest.mark.parametrize(
    ("known", "other", "completed"),
    [
        (None, "ab" * 32, "ab" * 32),
        ("abab", "ab" * 32, "ab" * 32),
        ("abac", "ab" * 32, "abac"),  # other weights
        ("cd" * 32, "ab" * 32, "cd" * 32),
        ("abab", None, "abab"),
        ("abab", 7, "abab"),
    ],
)
def test_with_weights_of_another_identity_completes_only_a_sha256_that_agrees(
    known: str | None, other: object, completed: str
) -> None:
    expected = {"teacher": {"arch": "resnet8", "weights_sha256": known}}
    found = with_weights_of(expected, {"teacher": {"arch": "x", "weights_sha256": other}})
    assert found == {"teacher": {"arch": "resnet8", "weights_sha256": completed}}
