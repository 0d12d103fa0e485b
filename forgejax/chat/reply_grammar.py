"""What a reply may be where its text is to follow a schema."""

from __future__ import annotations

from forgejax.chat.messages import ChatRequest
from forgejax.chat.thoughts import ThoughtFormat
from forgejax.chat.tool_calls import ToolCallFormat
from forgejax.types import Grammar


def make_reply_grammar(
    chat: ChatRequest, thoughts: ThoughtFormat, tool_format: ToolCallFormat, *, thinking: bool
) -> Grammar | None:
    """None where nothing of the reply is bound: no schema was sent, or a call must be made, which is no text.

    The schema holds for what is said behind the thought, be it open at the end of the prompt (``thinking``) or begun by
    the policy, where its template knows thoughts. Where tools may be called, a reply may begin with the tag of a call
    instead, and is free from there.
    """
    if chat.schema is None or chat.calls == "required":
        return None
    calls = tool_format.markers[:1] if chat.tools and chat.calls == "auto" else ()
    return Grammar(
        schema=chat.schema.text,
        thought_opening=thoughts.opening if thoughts.known and not thinking else "",
        thought_closing=thoughts.closing if thoughts.known or thinking else "",
        free_openings=calls,
    )
