"""When two messages are the same: what an agent sends back is compared by meaning, not by spelling.

Null fields, key order, text in parts, white space around an assistant's text, how numbers and characters of arguments
are written make no difference. The order of calls does, and so does a thought that was changed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import msgspec

from forgejax.chat.messages import Message, Tool, ToolCallPart, canonicalize_json


def digest_tools(tools: Sequence[Tool]) -> bytes:
    """Where every history that is held with these tools begins."""
    return _digest(b"", msgspec.json.encode(list(tools), order="sorted"))


def digest_turn(number: int) -> bytes:
    """Stands for a history that ends in the reply of turn ``number``."""
    return _digest(b"turn", str(number).encode())


def extend_digest(key: bytes, message: Message) -> bytes:
    """Stands for the history of ``key`` and then ``message``, which is nobody's reply."""
    spoken = message.role == "assistant"
    text = message.text.strip() if spoken else message.text
    said = [_list_calls(message), message.reasoning.strip()] if spoken else []
    head = _dump([message.role, message.name, len(text), *said])
    # The text, which may be long, goes in as it is; its length keeps it apart from what stands before it.
    return _digest(key, head + text.encode("utf-8", "surrogatepass"))


def is_echo(sent: Message, reply: Message, *, known: bool) -> bool:
    """Whether ``sent`` is ``reply``, sent back. The thought may be missing, and with ``known`` (its ids or its
    signature say whose it is) the text as well; what is there must mean the same, and all calls must be there. A call
    whose arguments were never JSON is known by its id: agents send back whatever they made of them."""
    calls = list(zip(sent.tool_calls, reply.tool_calls, strict=False))
    if len(sent.tool_calls) != len(reply.tool_calls) or not all(_is_same_call(one, other) for one, other in calls):
        return False
    thought, text = sent.reasoning.strip(), sent.text.strip()
    return (not thought or thought == reply.reasoning.strip()) and (text == reply.text.strip() or (known and not text))


def _is_same_call(sent: ToolCallPart, drawn: ToolCallPart) -> bool:
    if sent.name != drawn.name:
        return False
    unread = drawn.arguments is None and sent.id is not None and sent.id == drawn.id
    return unread or _spell_arguments(sent) == _spell_arguments(drawn)


def _list_calls(message: Message) -> list[Any]:
    return [[call.name, _spell_arguments(call)] for call in message.tool_calls]


def _spell_arguments(call: ToolCallPart) -> str:
    if call.arguments is None:
        return f"text {call.raw.strip()}"
    return _dump(canonicalize_json(call.arguments)).decode()


def _digest(key: bytes, content: bytes) -> bytes:
    return hashlib.blake2b(key + content, digest_size=16).digest()


def _dump(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True).encode()
