"""make's ARGS as words: split at spaces, except inside YAML's quotes and brackets."""

from __future__ import annotations

import pytest

from teach_once.runtime.command.make_args import split_words, with_words


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", []),
        ("  a=1\n b=[1,2]\t", ["a=1", "b=[1,2]"]),
        ("a={type: onecycle, x: [1, 2]} b=2", ["a={type: onecycle, x: [1, 2]}", "b=2"]),
        ("root=\"my 'own' [photos\" b='x y'", ["root=\"my 'own' [photos\"", "b='x y'"]),
        ("a={never closed b=2", ["a={never closed b=2"]),
        ("a=$(touch x) b=`c`", ["a=$(touch", "x)", "b=`c`"]),
    ],
)
def test_text_is_cut_at_spaces_outside_of_quotes_and_brackets(text: str, words: list[str]) -> None:
    assert split_words(text) == words


def test_only_the_text_of_make_is_cut() -> None:
    given = ["name of a file", "--args=a=1 b=2", "c=my photos"]
    assert with_words(given) == ["name of a file", "a=1", "b=2", "c=my photos"]


def test_a_path_below_a_home_is_expanded_wherever_a_word_holds_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    given = ["~/a", "--caches=~/b c", "dataset.root=~/d", "teacher.weights=~", "--args=x.y=~/e"]
    found = ["/home/me/a", "--caches=/home/me/b c", "dataset.root=/home/me/d"]
    assert with_words(given) == [*found, "teacher.weights=~", "x.y=/home/me/e"]
    assert with_words(["~nobody-of-that-name/a", "a~/b", "k=[~/x]"]) == [
        "~nobody-of-that-name/a",
        "a~/b",
        "k=[~/x]",
    ]
