"""Schemas are bounded before anything is made of them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from forgejax.errors import GrammarError
from forgejax.grammar.schema import MAX_SCHEMA_BYTES, read_schema


def test_a_schema_is_read_with_its_properties_in_order() -> None:
    schema = read_schema('{"properties": {"b": {}, "a": {}}}')
    assert list(schema["properties"]) == ["b", "a"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "not JSON"),
        ("[]", "a JSON list; expected an object"),
        ("[" * 100_000, "at most 65536 are served"),
        ("[" * 50_000, "not JSON"),
        ('{"enum": [1, [9007199254740993]]}', "number 9007199254740993 has too many digits"),
        (f'{{"maximum": {10**400}}}', "too many digits"),
        ('{"const": 90071993.46484375}', "number 90071993.46484375 has too many digits"),
        ('{"const": 1e999}', "number inf has too many digits"),
        ('{"const": NaN}', "NaN is no JSON number"),
        ('{"multipleOf": 1000003}', "only every 1000003"),
        ('{"allOf": [{"multipleOf": 1009}, {"multipleOf": 10.13}]}', "only every 1022117"),
    ],
)
def test_what_cannot_be_served_in_bounded_time_is_refused_in_words(text: str, said: str) -> None:
    with pytest.raises(GrammarError, match=said):
        read_schema(text)


@pytest.mark.parametrize("multiple", [0.01, 100, 7, 12.5, 9999, 1e-9, -4, 0, "x", True, None])
def test_ordinary_multiples_and_words_that_are_none_pass(multiple: Any) -> None:
    assert read_schema(json.dumps({"multipleOf": multiple})) == {"multipleOf": multiple}


def test_the_limit_of_bytes_is_met_exactly() -> None:
    frame = len('{"a": ""}')
    read_schema(json.dumps({"a": "x" * (MAX_SCHEMA_BYTES - frame)}))
    with pytest.raises(GrammarError, match="at most"):
        read_schema(json.dumps({"a": "x" * (MAX_SCHEMA_BYTES - frame + 1)}))
