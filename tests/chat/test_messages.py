"""Calls of a history, and JSON that means the same."""

from __future__ import annotations

from typing import Any

import pytest

from forgejax.chat.messages import canonicalize_json, mend_surrogates, read_call


@pytest.mark.parametrize(
    ("raw", "arguments", "problem"),
    [
        ('{"a": 1}', {"a": 1}, None),
        ("", {}, None),
        (" ", {}, None),
        ('{"a": "\\ud83d"}', {"a": "\ufffd"}, None),
        ('{"a": "\\ud83d\\ude00"}', {"a": "😀"}, None),
        ('{"a": "cut', None, "not JSON"),
        ("[1]", None, "arguments are not an object"),
        ("[" * 100_000, None, "not JSON"),
    ],
)
def test_arguments_of_a_history_are_an_object_or_stay_text(raw: str, arguments: Any, problem: str | None) -> None:
    call = read_call("f", raw, "c")
    assert (call.id, call.name, call.raw, call.arguments) == ("c", "f", raw, arguments)
    assert call.problem is None if problem is None else problem in str(call.problem)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ({"a": 1.0, "b": [2e2]}, {"b": [200], "a": 1}, True),
        (12345678901234567890, 12345678901234567000, True),  # what JavaScript keeps of it
        (True, 1, False),
        (0.1, 0.10000000000000001, True),
        ([1, 2], [2, 1], False),
        (10**400, 10**400, True),
    ],
)
def test_json_that_means_the_same_is_equal_and_no_other_is(one: Any, other: Any, same: bool) -> None:
    assert (repr(canonicalize_json(one)) == repr(canonicalize_json(other))) == same


def test_halves_of_pairs_become_the_replacement_character_and_pairs_stay() -> None:
    assert mend_surrogates({"a\ud800": ["x\udc00y", "😀", 5]}) == {"a\ufffd": ["x\ufffdy", "😀", 5]}
