"""A text is taken for the beginning of a JSON object exactly as long as it is one."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forgejax.chat.tool_calls.base import MalformedCallError
from forgejax.chat.tool_calls.json_scanner import JsonScanner

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=100, deadline=None)
@given(value=st.dictionaries(st.text(max_size=3), VALUES, max_size=3), ascii_=st.booleans(), run=st.integers(1, 9))
def test_every_object_is_read_to_its_end_and_its_members_are_found(
    value: dict[str, Any], ascii_: bool, run: int
) -> None:
    text = json.dumps(value, ensure_ascii=ascii_, indent=run % 3 or None)
    scanner = JsonScanner()
    for at in range(0, len(text), run):
        assert not scanner.complete
        scanner.scan(text[: at + run])
    assert scanner.complete and scanner.at == len(text)
    members = [(member.key, text[member.start : member.end]) for member in scanner.members]
    assert [(json.loads(f'"{key}"'), json.loads(spelled)) for key, spelled in members] == list(value.items())


@settings(max_examples=200, deadline=None)
@given(text=st.text(alphabet='{}[]",:\\u0e1-.truefalsn \n', max_size=14))
def test_what_python_reads_is_read_and_nothing_else_is(text: str) -> None:
    scanner = JsonScanner()
    try:
        scanner.scan("{" + text)
        complete = scanner.complete
    except MalformedCallError:
        complete = False
    try:
        value, end = json.JSONDecoder(strict=True).raw_decode("{" + text)
    except ValueError:
        assert not complete
    else:
        assert complete and scanner.at == end and isinstance(value, dict)


@pytest.mark.parametrize(
    ("text", "safe"),
    [('{"a": 12', 6), ('{"a": "x\\', 8), ('{"a": "x\\u00', 8), ('{"a": "x\\u00e9', 14), ('{"a": [1,', 9)],
)
def test_half_scalars_and_half_escapes_are_not_safe(text: str, safe: int) -> None:
    scanner = JsonScanner()
    scanner.scan(text)
    assert scanner.safe == safe
