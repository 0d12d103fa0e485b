"""Which tool-call format a policy speaks: the configured one, or the one its own chat template writes."""

from __future__ import annotations

from typing import Any

from forgejax.chat.format import ChatFormat
from forgejax.chat.template import TemplateError
from forgejax.chat.tool_calls import TOOL_CALL_FORMATS, CallSpan, MalformedSpan, ToolCallFormat, ToolFormatName
from forgejax.errors import GatewayError

_TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "probe_tool",
        "description": "A tool.",
        "parameters": {
            "type": "object",
            "properties": {
                "text": {"type": "string", "description": "Some text."},
                "count": {"type": "integer", "description": "A count."},
            },
            "required": ["text", "count"],
        },
    },
}
_ARGUMENTS = {"text": "two words", "count": 3}
_CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [
        {
            "id": "call_0000000",
            "type": "function",
            "function": {"name": "probe_tool", "arguments": _ARGUMENTS},
        }
    ],
}


def choose_tool_format(name: ToolFormatName, chat_format: ChatFormat) -> ToolCallFormat | None:
    """The format called ``name``; for ``auto`` the one that reads a call as the chat template writes it.

    None where the template writes none of the known formats: then no tool can be called. Raises GatewayError where it
    writes what several of them read.
    """
    if name != "auto":
        return TOOL_CALL_FORMATS[name]
    try:
        written = chat_format.render_message(_CALL, [{"role": "user", "content": "Do it."}], [_TOOL])
    except TemplateError:
        return None
    fitting = [known for known, tool_format in TOOL_CALL_FORMATS.items() if _reads(tool_format, written)]
    if len(fitting) > 1:
        raise GatewayError(
            f"the chat template writes tool calls that fit several formats: {', '.join(fitting)}; "
            "set gateway.tool_format to one of them"
        )
    return TOOL_CALL_FORMATS[fitting[0]] if fitting else None


def shows_tools(chat_format: ChatFormat) -> bool:
    """Whether the chat template prints the tools of a request. Many that know nothing of tools leave them out."""
    try:
        return "probe_tool" in chat_format.render_text([{"role": "user", "content": "Do it."}], [_TOOL]).text
    except TemplateError:
        return False


def _reads(tool_format: ToolCallFormat, written: str) -> bool:
    parser = tool_format.make_parser([_TOOL])
    spans = [*parser.push(written), *parser.finish()]
    calls = [(span.name, span.arguments) for span in spans if isinstance(span, CallSpan)]
    return calls == [("probe_tool", _ARGUMENTS)] and not any(isinstance(span, MalformedSpan) for span in spans)
