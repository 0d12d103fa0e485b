"""A whole reply as deltas: what a recorded answer is streamed from."""

from __future__ import annotations

from forgejax.chat.messages import Message, ReasoningPart, TextPart, ToolCallPart
from forgejax.chat.reply import (
    PartEnd,
    ReasoningDelta,
    Reply,
    TextDelta,
    TokenLogprob,
    ToolCallDelta,
    ToolCallStart,
    Usage,
    list_deltas,
)

CALL = ToolCallPart(id="call_0", name="f", raw='{"n": 3}', arguments={"n": 3})
USAGE = Usage(prompt_tokens=1, completion_tokens=2, cached_tokens=0)


def test_a_whole_reply_is_its_parts_as_deltas() -> None:
    parts = (ReasoningPart(text="hm", signature="t"), TextPart(text="One."), CALL)
    reply = Reply(message=Message(role="assistant", parts=parts), finish="tool_calls", usage=USAGE, signature="t")
    assert list_deltas(reply) == [
        ReasoningDelta(part=0, text="hm"),
        PartEnd(part=0, signature="t"),
        TextDelta(part=1, text="One."),
        PartEnd(part=1),
        ToolCallStart(part=2, id="call_0", name="f"),
        ToolCallDelta(part=2, text='{"n": 3}'),
        PartEnd(part=2, call=CALL),
    ]


def test_a_token_that_is_part_of_a_character_has_its_bytes_and_shows_as_a_replacement() -> None:
    token = TokenLogprob(data=b"\xc3", logprob=-1.0)
    assert token.text == "\ufffd"
