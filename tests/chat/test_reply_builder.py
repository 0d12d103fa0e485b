"""From sampled ids to a reply: its parts are in the order they were drawn, and its deltas joined are its parts."""

from __future__ import annotations

import numpy as np
import pytest

from forgejax.chat import ChatFormat
from forgejax.chat.messages import ChatRequest
from forgejax.chat.reply import Delta, Reply, ReplyPart, TextDelta, TextPart, ToolCallDelta, ToolCallPart
from forgejax.chat.reply_builder import ReplyBuilder
from forgejax.chat.tool_calls import HermesFormat
from forgejax.types import Completion, FinishReason, SamplingLaw
from tests.chat.tokenizers import CALCULATOR

USER = {"role": "user", "content": "What is 2+3?"}
BODY = '{"name": "calculator", "arguments": {"expression":"2+3"}}'
CALL = f"<tool_call>{BODY}</tool_call>"
MALFORMED = "<tool_call>five</tool_call>"


def build(chat_format: ChatFormat, text: str, run: int) -> tuple[ReplyBuilder, list[Delta], Reply]:
    """The third reply of a session, fed in runs of ids."""
    ids = np.asarray([*chat_format.codec.encode(text), chat_format.end_of_turn_id], np.int32)
    done = Completion(
        request_id="r",
        prompt_ids=np.ones(9, np.int32),
        token_ids=ids,
        logprobs=np.zeros(len(ids), np.float32),
        versions=np.zeros(len(ids), np.int32),
        oldest_versions=np.zeros(len(ids), np.int32),
        finish_reason=FinishReason.STOP,
        law=SamplingLaw(),
        cached_tokens=4,
    )
    builder = ReplyBuilder(chat_format, HermesFormat(), ChatRequest(messages=(USER,), tools=(CALCULATOR,)), 2)
    deltas = [d for at in range(0, len(ids), run) for d in builder.feed(ids[at : at + run].tolist())]
    rest, reply = builder.finish(done)
    return builder, deltas + rest, reply


def call(index: int) -> ToolCallPart:
    return ToolCallPart(id=f"call_00002{index:03d}", name="calculator", arguments={"expression": "2+3"}, raw=BODY)


@pytest.mark.parametrize("run", [1, 5, 1000])
@pytest.mark.parametrize(
    ("text", "parts", "malformed"),
    [
        ("It is 5.", [TextPart(text="It is 5.")], 0),
        ("", [], 0),
        (f"One.\n{CALL}\nTwo.", [TextPart(text="One."), call(0), TextPart(text="Two.")], 0),
        (f"{CALL}{CALL}", [call(0), call(1)], 0),
        (f"So {MALFORMED} and {CALL}", [TextPart(text=f"So {MALFORMED} and"), call(0)], 1),
    ],
)
def test_parts_are_in_the_order_they_were_drawn_and_the_deltas_joined_are_the_parts(
    chat_format: ChatFormat, text: str, parts: list[ReplyPart], malformed: int, run: int
) -> None:
    builder, deltas, reply = build(chat_format, text, run)
    assert list(reply.parts) == parts and len(builder.malformed) == malformed
    joined: dict[int, ReplyPart] = {}
    for delta in deltas:
        if isinstance(delta, ToolCallDelta):
            joined[delta.part] = delta.call
        else:
            before = joined.get(delta.part, TextPart(text=""))
            assert isinstance(delta, TextDelta) and isinstance(before, TextPart)
            joined[delta.part] = TextPart(text=before.text + delta.text)
    assert list(joined.items()) == list(enumerate(parts))
    assert builder.calls == len(reply.tool_calls) == sum(isinstance(part, ToolCallPart) for part in parts)
