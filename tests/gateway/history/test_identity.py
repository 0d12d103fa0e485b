"""When what an agent sends back is a reply it was given."""

from __future__ import annotations

import pytest

from forgejax.chat.messages import Message, MessagePart, ReasoningPart, RefusalPart, TextPart, ToolCallPart, read_call
from forgejax.gateway.history.identity import digest_tools, digest_turn, extend_digest, is_echo

THOUGHT = ReasoningPart(text="hm", signature="t")
CALL = read_call("f", '{"a": 1, "b": "é"}', "c1")
CUT = ToolCallPart(id="c2", name="g", raw='{"a": ', arguments=None, problem="not JSON")


def say(*parts: MessagePart) -> Message:
    return Message(role="assistant", parts=parts)


REPLY = say(THOUGHT, TextPart(text="So.\n"), CALL, CUT)


@pytest.mark.parametrize(
    ("sent", "by_meaning", "by_id"),
    [
        (REPLY, True, True),
        (say(TextPart(text=" So."), CALL, CUT), True, True),  # the thought left out
        (say(RefusalPart(text="So."), CALL, CUT), True, True),
        (say(TextPart(text="So."), read_call("f", '{"b":"\\u00e9","a":1.0}'), read_call("g", '{"a": ')), True, True),
        (say(CALL, CUT), False, True),  # the text left out
        (say(TextPart(text="So."), CALL, read_call("g", "{}", "c2")), True, True),  # what an agent made of no JSON
        (say(TextPart(text="So."), CALL, read_call("g", "{}", "c3")), False, False),
        (say(TextPart(text="No."), CALL, CUT), False, False),
        (say(ReasoningPart(text="ha"), TextPart(text="So."), CALL, CUT), False, False),
        (say(TextPart(text="So."), CALL), False, False),
        (say(TextPart(text="So."), CUT, CALL), False, False),
        (say(TextPart(text="So."), read_call("f", '{"a": true, "b": "é"}', "c1"), CUT), False, False),
        (say(TextPart(text="So."), read_call("h", CALL.raw, "c1"), CUT), False, False),
    ],
)
def test_an_echo_may_leave_out_and_never_alter(sent: Message, by_meaning: bool, by_id: bool) -> None:
    assert (is_echo(sent, REPLY, known=False), is_echo(sent, REPLY, known=True)) == (by_meaning, by_id)


def test_histories_that_mean_the_same_have_the_same_digest_and_others_have_not() -> None:
    root = digest_tools([])
    user = Message.of_text("user", "a")
    result = Message(role="tool", parts=(TextPart(text="a"),), tool_call_id="c1")
    different = [
        extend_digest(root, user),
        extend_digest(root, result),
        extend_digest(root, Message.of_text("user", "a ")),
        extend_digest(root, say(TextPart(text="a"))),
        extend_digest(root, say(TextPart(text="a"), CALL)),
        extend_digest(root, say(THOUGHT, TextPart(text="a"))),
        extend_digest(digest_tools([{"type": "function"}]), user),
        extend_digest(digest_turn(0), user),
        extend_digest(digest_turn(1), user),
    ]
    assert len(set(different)) == len(different)
    assert extend_digest(root, say(TextPart(text=" a\n"))) == different[3]
    other = Message(role="tool", parts=(TextPart(text="a"),), tool_call_id="other")
    assert extend_digest(root, other) == different[1]
