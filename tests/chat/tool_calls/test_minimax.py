"""MiniMax's block of calls."""

from __future__ import annotations

from forgejax.chat.tool_calls import CallSpan, MalformedSpan
from tests.chat.tool_calls.parsing import parse


def test_one_minimax_block_holds_all_calls_or_none() -> None:
    good = '<invoke name="bare"></invoke>'
    block = "<minimax:tool_call>\n{}\n</minimax:tool_call>"
    assert [type(span) for span in parse("minimax", block.format(good + "\n" + good))] == [CallSpan, CallSpan]
    half = block.format(good + '<invoke name="g"></invoke>')
    assert parse("minimax", half) == [MalformedSpan(text=half, problem="unknown tool 'g'")]
    assert isinstance(parse("minimax", block.format(""))[0], MalformedSpan)
