"""Compiling: once, off the event loop, within limits, and in words where it cannot be done."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import pytest

from forgejax.errors import GrammarError
from forgejax.grammar import compiler as module
from forgejax.grammar.compiler import GrammarCompiler
from forgejax.types import Grammar
from tests.grammar.words import COMPILER, END, WORDS, list_allowed


def nest(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(depth):
        schema = {"type": "array", "items": {"anyOf": [schema]}}
    return schema


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        ({"type": "array", "uniqueItems": True}, r'Unimplemented keys: \["uniqueItems"\]; leave that out'),
        ({"type": "strnig"}, "Invalid type: strnig"),
        ({"type": "string", "format": "shout"}, "Unknown format: shout"),
        ({"type": "string", "pattern": "(a"}, "unclosed group"),
        ({"$ref": "#/nowhere"}, "Pointer '/nowhere' does not exist"),
        ({"$ref": "https://example.org/a.json"}, "does not fetch"),
        ({"enum": []}, "Unsatisfiable schema"),
        ({"x-guidance": {"lenient": True}, "not": {}}, r'Unimplemented keys: \["not"\]'),
        (nest(33), "nested more than 100 deep"),
        (nest(300), "nested more than 100 deep"),
        ({"allOf": [{"type": "integer", "multipleOf": n} for n in (3, 5, 7, 11, 13, 17)]}, "only every 255255"),
    ],
)
async def test_a_schema_that_cannot_be_served_is_refused_with_what_is_wrong(schema: Any, said: str) -> None:
    grammar = Grammar(schema=json.dumps(schema))
    with pytest.raises(GrammarError, match=said):
        await COMPILER.prepare(grammar)
    with pytest.raises(GrammarError, match=said):
        COMPILER.start(grammar, frozenset({END}))


async def test_a_grammar_is_compiled_once_and_its_matchers_go_their_own_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = GrammarCompiler(WORDS)
    compiled: list[Grammar] = []
    original = compiler._compile

    def note(grammar: Grammar) -> Any:
        compiled.append(grammar)
        return original(grammar)

    monkeypatch.setattr(compiler, "_compile", note)
    grammar = Grammar(schema='{"enum": ["ab", "cd"]}')
    await asyncio.gather(*(compiler.prepare(grammar) for _ in range(5)))
    one, other = (compiler.start(grammar, frozenset({END})) for _ in range(2))
    one.accept([*b'"a'])
    other.accept([*b'"c'])
    assert compiled == [grammar]
    assert (list_allowed(one), list_allowed(other)) == ({ord("b")}, {ord("d")})
    for index in range(module._KEPT):
        await compiler.prepare(Grammar(schema=f'{{"const": {index}}}'))
    await compiler.prepare(grammar)
    assert compiled.count(grammar) == 2  # it was the one least recently used


async def test_who_waits_longer_than_the_deadline_is_told_and_others_are_not_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compiler = GrammarCompiler(WORDS)
    original = compiler._compile
    monkeypatch.setattr(module, "COMPILE_S", 0.2)

    def compile_slowly(grammar: Grammar) -> Any:
        if "slow" in grammar.schema:
            time.sleep(0.8)
        return original(grammar)

    monkeypatch.setattr(compiler, "_compile", compile_slowly)
    slow, begun = Grammar(schema='{"const": "slow"}'), time.monotonic()
    waiting = asyncio.create_task(compiler.prepare(slow))
    await asyncio.sleep(0)
    await compiler.prepare(Grammar(schema='{"const": 1}'))
    assert time.monotonic() - begun < 0.2
    with pytest.raises(GrammarError, match=r"not compiled within 0\.2 s"):
        await waiting
    with pytest.raises(GrammarError, match=r"not compiled within 0\.2 s"):
        compiler.start(slow, frozenset({END}))


HOSTILE: dict[str, Any] = {
    "many words": {"enum": [f"{index:012d}" for index in range(4_000)]},
    "many properties": {"type": "object", "properties": {f"property{i}": {"type": "string"} for i in range(1_500)}},
    "counted": {"type": "string", "pattern": "^((a{1,100}){1,100}){1,100}$"},
    "backwards": {"type": "string", "pattern": "(.*a){10}.{30}$"},
    "long": {"type": "array", "items": {"type": "string", "minLength": 10**6, "maxLength": 10**7}, "minItems": 10**6},
    "doubling": {
        "$defs": {f"a{i}": {"allOf": [{"$ref": f"#/$defs/a{i + 1}"}] * 2} for i in range(24)}
        | {"a24": {"type": "integer"}},
        "$ref": "#/$defs/a0",
    },
    "crossing": {
        "allOf": [
            {"anyOf": [{"type": "object", "required": [f"p{i}{j}"], "properties": {f"p{i}{j}": {}}} for j in range(4)]}
            for i in range(12)
        ]
    },
}


@pytest.mark.parametrize("name", HOSTILE)
async def test_a_hostile_schema_is_done_with_quickly_and_the_event_loop_goes_on(name: str) -> None:
    beats: list[float] = []

    async def beat() -> None:
        while True:
            beats.append(time.monotonic())
            await asyncio.sleep(0.001)

    heart = asyncio.create_task(beat())
    await asyncio.sleep(0.01)
    grammar, begun = Grammar(schema=json.dumps(HOSTILE[name])), time.monotonic()
    try:
        await COMPILER.prepare(grammar)
        matcher = await asyncio.to_thread(COMPILER.start, grammar, frozenset({END}))
        for _ in range(40):
            matcher.accept([min(list_allowed(matcher) & set(range(33, 127)))])
    except (GrammarError, ValueError):
        pass  # refused in words, or nothing printable may follow
    heart.cancel()
    assert time.monotonic() - begun < 5
    assert len(beats) > 2
