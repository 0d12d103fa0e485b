"""What a schema binds of a reply."""

from __future__ import annotations

from typing import Any

import pytest

from forgejax.chat.messages import ChatRequest, Message, ReplySchema
from forgejax.chat.reply_grammar import make_reply_grammar
from forgejax.chat.thoughts import ThoughtFormat
from forgejax.chat.tool_calls import TOOL_CALL_FORMATS, PlainTextFormat
from forgejax.types import Grammar
from tests.chat.tokenizers import CALCULATOR

ASKED = (Message.of_text("user", "?"),)
SCHEMA = ReplySchema(text="{}", field="response_format")
THINKS = ThoughtFormat(opening="<think>", closing="</think>", field=None)
SPEAKS = ThoughtFormat(opening="<think>", closing="</think>", field=None, known=False)
HERMES = TOOL_CALL_FORMATS["hermes"]


@pytest.mark.parametrize(
    ("thoughts", "thinking", "opening", "closing"),
    [
        (SPEAKS, False, "", ""),
        (SPEAKS, True, "", "</think>"),  # the prompt has opened one all the same
        (THINKS, False, "<think>", "</think>"),
        (THINKS, True, "", "</think>"),
    ],
)
def test_the_schema_holds_behind_the_thought(
    thoughts: ThoughtFormat, thinking: bool, opening: str, closing: str
) -> None:
    chat = ChatRequest(messages=ASKED, schema=SCHEMA)
    made = make_reply_grammar(chat, thoughts, PlainTextFormat(), thinking=thinking)
    assert made == Grammar(schema="{}", thought_opening=opening, thought_closing=closing)


@pytest.mark.parametrize(
    ("fields", "openings"),
    [
        ({"tools": (CALCULATOR,)}, ("<tool_call>",)),
        ({"tools": (CALCULATOR,), "calls": "none"}, ()),
        ({}, ()),
    ],
)
def test_a_reply_may_be_a_call_instead_where_tools_may_be_called(fields: Any, openings: tuple[str, ...]) -> None:
    chat = ChatRequest(messages=ASKED, schema=SCHEMA, **fields)
    made = make_reply_grammar(chat, SPEAKS, HERMES, thinking=False)
    assert made == Grammar(schema="{}", free_openings=openings)


@pytest.mark.parametrize("fields", [{"schema": None}, {"tools": (CALCULATOR,), "calls": "required"}])
def test_nothing_is_bound_without_a_schema_or_where_a_call_must_be_made(fields: Any) -> None:
    chat = ChatRequest(**({"messages": ASKED, "schema": SCHEMA} | fields))
    assert make_reply_grammar(chat, THINKS, HERMES, thinking=False) is None
