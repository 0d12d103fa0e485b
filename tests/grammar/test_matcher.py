"""What a completion may go on with, and texts drawn under masks against an independent validator."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forgejax.errors import GrammarError
from forgejax.types import Grammar
from tests.grammar.words import COMPILER, END, WORDS, list_allowed, spell

SPACE = spell(b" ", b"\n", b"\r", b"\t", b"  ")
FLAG = json.dumps({"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"], "maxProperties": 1})
ONE = json.dumps({"const": 1})


def test_a_text_may_be_cut_into_tokens_in_any_way_and_ends_where_it_is_complete() -> None:
    matcher = COMPILER.start(Grammar(schema=FLAG), frozenset({END}))
    assert list_allowed(matcher) == SPACE | spell(b"{", b'{"')
    matcher.accept(spell(b'{"'))
    assert list_allowed(matcher) == spell(b"a")
    matcher.accept([*b"a"])
    assert list_allowed(matcher) == spell(b'"', b'":')
    matcher.accept(spell(b'":'))
    assert list_allowed(matcher) == SPACE | spell(b"t", b"true", b"f")
    matcher.accept(spell(b"true"))
    assert list_allowed(matcher) == SPACE | spell(b"}")
    matcher.accept(spell(b"}"))
    assert list_allowed(matcher) == {END}
    matcher.accept([END])


def test_a_number_may_end_or_go_on() -> None:
    matcher = COMPILER.start(Grammar(schema='{"type": "integer"}'), frozenset({END, 10**6}))
    matcher.accept([*b"12"])
    assert list_allowed(matcher) == {*b"0123456789", END}  # no token has the other id


def test_a_stop_id_that_is_a_word_is_never_a_part_of_the_text() -> None:
    stop = WORDS.index(b"}")
    matcher = COMPILER.start(Grammar(schema=FLAG), frozenset({stop}))
    matcher.accept([*b'{"a":true'])
    assert list_allowed(matcher) == SPACE
    whole = COMPILER.start(Grammar(schema=ONE), frozenset({stop}))
    whole.accept([*b"1"])
    assert list_allowed(whole) == {stop}


def test_an_open_thought_is_free_up_to_its_tag_and_the_schema_holds_behind_it() -> None:
    matcher = COMPILER.start(Grammar(schema=FLAG, thought_closing="</think>"), frozenset({END}))
    free = list_allowed(matcher)
    assert END not in free and {*range(128)} <= free
    matcher.accept([*b'hm {"a" </think'])
    assert free == list_allowed(matcher)
    matcher.accept(spell(b'>{"'))  # a token that closes the thought and begins the answer
    assert list_allowed(matcher) == spell(b"a")


def test_a_thought_that_may_begin_need_not() -> None:
    grammar = Grammar(schema=ONE, thought_opening="<think>", thought_closing="</think>")
    thinks, speaks = (COMPILER.start(grammar, frozenset({END})) for _ in range(2))
    assert list_allowed(thinks) == SPACE | spell(b"1", b"<", b"<think>")
    thinks.accept(spell(b"<think>"))
    thinks.accept([*b"1"])
    assert len(list_allowed(thinks)) > 128 and END not in list_allowed(thinks)
    speaks.accept([*b"1"])
    assert list_allowed(speaks) == {END}
    thinks.accept(spell(b"</think>"))
    assert list_allowed(thinks) == SPACE | spell(b"1")


def test_a_text_that_begins_as_a_call_is_free_from_there() -> None:
    matcher = COMPILER.start(Grammar(schema=ONE, free_openings=("<call>",)), frozenset({END}))
    assert list_allowed(matcher) == SPACE | spell(b"1", b"<")
    matcher.accept([*b"<call"])
    assert list_allowed(matcher) == spell(b">", b'>{"')
    matcher.accept([*b">x"])
    assert {END, *range(128)} <= list_allowed(matcher)


def test_white_space_comes_to_an_end() -> None:
    matcher = COMPILER.start(Grammar(schema=ONE), frozenset({END}))
    matcher.accept([*b" " * 31])
    assert list_allowed(matcher) == SPACE - spell(b"  ") | spell(b"1")
    matcher.accept([*b" "])
    assert list_allowed(matcher) == spell(b"1")


def test_a_schema_without_any_text_is_told_where_nothing_can_follow() -> None:
    matcher = COMPILER.start(Grammar(schema='{"$ref": "#"}'), frozenset({END}))
    matcher.accept([*b" " * 32])
    with pytest.raises(GrammarError, match=r"no token|cannot be followed"):
        list_allowed(matcher)


def test_a_token_that_was_not_allowed_is_told_at_the_next_mask() -> None:
    matcher = COMPILER.start(Grammar(schema=ONE), frozenset({END}))
    matcher.accept([*b"2"])
    with pytest.raises(GrammarError, match="cannot be followed any further"):
        list_allowed(matcher)


_SCALARS = st.one_of(
    st.builds(
        lambda low, size: {"type": "integer", "minimum": low, "maximum": low + size},
        st.integers(-99, 99),
        _N := st.integers(0, 9),
    ),
    st.builds(lambda low, size: {"type": "string", "minLength": low, "maxLength": low + size}, st.integers(0, 3), _N),
    st.builds(lambda n: {"type": "string", "pattern": f"^[a-c]{{1,{n + 1}}}-\\d$"}, _N),
    st.builds(
        lambda words: {"enum": words},
        st.lists(
            st.one_of(
                st.text(max_size=3),
                st.integers(-(2**53), 2**53),
                st.integers(-(10**9), 10**9).map(lambda n: n / 1000),
                st.booleans(),
                st.none(),
            ),
            min_size=1,
            max_size=3,
        ),
    ),
    st.sampled_from(
        [{"type": "boolean"}, {"type": "null"}, {"type": "number"}, {"type": ["string", "null"], "maxLength": 4}]
    ),
    st.sampled_from([{"type": "string", "format": name} for name in ("date", "time", "uuid", "ipv4")]),
)


def _nest(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    names = st.text('abä"\\', min_size=1, max_size=2)
    objects = st.builds(
        lambda fields, needed: {
            "type": "object",
            "properties": fields,
            "required": sorted(fields)[: needed + 1],
            "additionalProperties": False,
        },
        st.dictionaries(names, inner, min_size=1, max_size=3),
        st.integers(0, 2),
    )
    arrays = st.builds(
        lambda items, n: {"type": "array", "items": items, "minItems": n, "maxItems": n + 2}, inner, st.integers(0, 2)
    )
    return st.one_of(
        objects, arrays, st.builds(lambda options: {"anyOf": options}, st.lists(inner, min_size=1, max_size=2))
    )


@settings(max_examples=120, deadline=None)
@given(schema=st.recursive(_SCALARS, _nest, max_leaves=6), seed=st.integers(0, 2**32 - 1))
def test_whatever_is_drawn_under_the_masks_fits_the_schema(schema: dict[str, Any], seed: int) -> None:
    random = np.random.default_rng(seed)
    matcher, drawn = COMPILER.start(Grammar(schema=json.dumps(schema)), frozenset({END})), b""
    while END not in (allowed := list_allowed(matcher)) or (len(allowed) > 1 and random.random() < 0.7):
        token = int(random.choice(sorted(allowed - {END})))
        matcher.accept([token])
        drawn += WORDS[token]
        assert len(drawn) < 5_000
    jsonschema.validate(json.loads(drawn), schema)
