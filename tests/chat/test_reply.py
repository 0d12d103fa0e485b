"""What is derived from a reply's parts."""

from __future__ import annotations

from forgejax.chat.reply import ReasoningPart, Reply, TextPart, ToolCallPart, Usage

CALL = ToolCallPart(id="call_0", name="f", arguments={"n": 3}, raw='{"n": 3}')
USAGE = Usage(prompt_tokens=1, completion_tokens=2, cached_tokens=0)


def test_a_replys_message_joins_its_texts_and_keeps_reasoning_and_calls_apart() -> None:
    parts = (ReasoningPart(text="hm"), TextPart(text="One. "), CALL, TextPart(text="Two."))
    reply = Reply(parts=parts, finish="tool_calls", usage=USAGE)
    assert (reply.content, reply.reasoning, reply.tool_calls) == ("One. Two.", "hm", (CALL,))
    assert reply.message == {
        "role": "assistant",
        "content": "One. Two.",
        "reasoning_content": "hm",
        "tool_calls": [{"id": "call_0", "type": "function", "function": {"name": "f", "arguments": {"n": 3}}}],
    }


def test_a_reply_of_text_alone_is_a_message_of_text_alone() -> None:
    reply = Reply(parts=(TextPart(text="5"),), finish="stop", usage=USAGE)
    assert reply.message == {"role": "assistant", "content": "5"}
