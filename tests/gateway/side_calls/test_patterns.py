"""Texts that rules look for."""

from __future__ import annotations

import time

import pytest

from forgejax.errors import ConfigError
from forgejax.gateway.side_calls.patterns import TextPattern


@pytest.mark.parametrize(
    ("words", "text", "found"),
    [
        ("a.c", "xa.cx", True),
        ("a.c", "abc", False),
        ("/a.c/", "xabcx", True),
        ("/^quota$/", "quota", True),
        ("/^quota$/", "quotas", False),
        ("/", "and/or", True),
        ("//", "a//b", True),
        ("/usr/bin", "in /usr/bin it is", True),
    ],
)
def test_words_are_contained_and_what_stands_between_slashes_is_an_expression(
    words: str, text: str, found: bool
) -> None:
    assert TextPattern(words, "it").found_in(text) is found


def test_an_expression_that_would_take_for_ever_is_not_found_within_a_moment() -> None:
    slow = TextPattern("/(?:xy|xyz|z|x|y)*q$/", "it")
    begun = time.monotonic()
    assert not slow.found_in("xyz" * 20_000)
    assert time.monotonic() - begun < 2.0


def test_a_long_expression_is_refused() -> None:
    with pytest.raises(ConfigError, match="it is a regular expression of 501 characters; give at most 500"):
        TextPattern(f"/{'a' * 501}/", "it")
