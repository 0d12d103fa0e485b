"""From sampled ids to a reply: its parts are in the order they were drawn, and its deltas joined are its parts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from forgejax.chat import ChatFormat
from forgejax.chat.messages import ChatRequest, Message, MessagePart, ReasoningPart, TextPart, ToolCallPart
from forgejax.chat.reply import Delta, PartEnd, ReasoningDelta, Reply, TextDelta, ToolCallDelta, ToolCallStart
from forgejax.chat.reply_builder import ReplyBuilder
from forgejax.chat.tool_calls import HermesFormat
from forgejax.types import Completion, FinishReason, SamplingLaw
from tests.chat.tokenizers import CALCULATOR

USER = Message.of_text("user", "What is 2+3?")
BODY = '{"name": "calculator", "arguments": {"expression":"2+3"}}'
CALL = f"<tool_call>{BODY}</tool_call>"
MALFORMED = "<tool_call>five</tool_call>"


def build(chat_format: ChatFormat, text: str, run: int, **request: Any) -> tuple[ReplyBuilder, list[Delta], Reply]:
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
    chat = ChatRequest(messages=(USER,), tools=(CALCULATOR,), **request)
    builder = ReplyBuilder(chat_format, HermesFormat(), chat, number=2, signature="turn-2")
    deltas = [d for at in range(0, len(ids), run) for d in builder.feed(ids[at : at + run].tolist())]
    rest, reply = builder.finish(done)
    return builder, deltas + rest, reply


def call(index: int, **more: Any) -> ToolCallPart:
    made: dict[str, Any] = {
        "id": f"call_00002{index:03d}",
        "name": "calculator",
        "raw": '{"expression":"2+3"}',
        "arguments": {"expression": "2+3"},
    }
    return ToolCallPart(**made | more)


def thought(text: str) -> ReasoningPart:
    return ReasoningPart(text=text, signature="turn-2")


def join(deltas: list[Delta]) -> list[MessagePart]:
    """The parts that deltas make; each is begun after the one before has ended."""
    parts: list[MessagePart] = []
    open_: MessagePart | None = None
    for delta in deltas:
        assert delta.part == len(parts)
        if isinstance(delta, PartEnd):
            assert open_ is not None and delta.signature == ("turn-2" if isinstance(open_, ReasoningPart) else None)
            if delta.call is not None:
                assert isinstance(open_, ToolCallPart) and delta.call.raw == open_.raw
                open_ = delta.call
            parts.append(open_)
            open_ = None
        elif isinstance(delta, ToolCallStart):
            assert open_ is None
            open_ = ToolCallPart(id=delta.id, name=delta.name, raw="", arguments=None)
        elif isinstance(delta, ToolCallDelta):
            assert isinstance(open_, ToolCallPart)
            open_ = replace(open_, raw=open_.raw + delta.text)
        elif isinstance(delta, ReasoningDelta):
            assert open_ is None or isinstance(open_, ReasoningPart)
            open_ = thought((open_.text if open_ else "") + delta.text)
        else:
            assert isinstance(delta, TextDelta) and (open_ is None or isinstance(open_, TextPart))
            open_ = TextPart(text=(open_.text if open_ else "") + delta.text)
    assert open_ is None
    return parts


@pytest.mark.parametrize("run", [1, 5, 1000])
@pytest.mark.parametrize(
    ("text", "parts", "malformed"),
    [
        ("It is 5.", [TextPart(text="It is 5.")], 0),
        ("", [], 0),
        (f"One.\n{CALL}\nTwo.", [TextPart(text="One."), call(0), TextPart(text="Two.")], 0),
        (f"{CALL}{CALL}", [call(0), call(1)], 0),
        (f"So {MALFORMED} and {CALL}", [TextPart(text=f"So {MALFORMED} and"), call(0)], 1),
        (f"<think>\nhm\n</think>\n\nSo.\n{CALL}", [thought("hm"), TextPart(text="So."), call(0)], 0),
        (f"<think>\n\n</think>\n\n{CALL}", [call(0)], 0),
        (f" <think>{CALL}</think>", [thought(CALL)], 0),
        ("<think>on and on", [thought("on and on")], 0),
        ("So <think>hm</think>", [TextPart(text="So <think>hm</think>")], 0),
        (
            CALL.replace("calculator", "abacus"),
            [call(0, name="abacus", problem="unknown tool 'abacus'")],
            1,
        ),
    ],
)
def test_parts_are_in_the_order_they_were_drawn_and_the_deltas_joined_are_the_parts(
    chat_format: ChatFormat, text: str, parts: list[MessagePart], malformed: int, run: int
) -> None:
    builder, deltas, reply = build(chat_format, text, run)
    assert list(reply.message.parts) == parts and len(builder.malformed) == malformed
    assert join(deltas) == parts
    assert builder.calls == len(reply.message.tool_calls)


def test_the_stop_string_that_was_met_is_told_and_thoughts_are_counted(chat_format: ChatFormat) -> None:
    _, _, reply = build(chat_format, "<think>aa</think>one END two", 1, stop=("two", "END"))
    assert (reply.message.text, reply.stop, reply.finish) == ("one ", "END", "stop")
    thinking = len(chat_format.codec.encode("<think>aa</think>")) - 1
    assert thinking - 2 <= reply.usage.reasoning_tokens <= thinking + 1


def test_the_bytes_of_all_tokens_are_the_text(chat_format: ChatFormat) -> None:
    _, _, reply = build(chat_format, "é🙂 <tool_call>", 1, logprobs=True)
    assert reply.logprobs is not None
    assert b"".join(token.data for token in reply.logprobs).decode() == "é🙂 <tool_call><|im_end|>"
