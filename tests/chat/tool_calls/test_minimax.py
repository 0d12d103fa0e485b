"""MiniMax's block of calls."""

from __future__ import annotations

from forgejax.chat.tool_calls import CallSpan, MalformedSpan, Span
from tests.chat.tool_calls.parsing import parse

BLOCK = "<minimax:tool_call>\n{}\n</minimax:tool_call>"
GOOD = '<invoke name="bare"></invoke>'


def call(name: str, problem: str | None = None) -> CallSpan:
    return CallSpan(name=name, text="{}", arguments={}, problem=problem)


def test_one_minimax_block_holds_all_calls_and_each_is_judged_alone() -> None:
    assert parse("minimax", BLOCK.format(GOOD + "\n" + GOOD)) == [call("bare"), call("bare")]
    half = BLOCK.format(GOOD + '<invoke name="g"></invoke>')
    assert parse("minimax", half) == [call("bare"), call("g", "unknown tool 'g'")]


def test_what_is_no_call_in_a_block_is_malformed_and_kept() -> None:
    empty = BLOCK.format("")
    spans: list[Span] = [MalformedSpan(text=empty, problem='no <invoke name="NAME"> between the tags')]
    assert parse("minimax", empty) == spans
    first, rest = parse("minimax", BLOCK.format(GOOD + "hm"))
    assert first == call("bare") and isinstance(rest, MalformedSpan) and rest.text == "hm\n</minimax:tool_call>"
