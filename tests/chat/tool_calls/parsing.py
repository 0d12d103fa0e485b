"""What the tests of the tool-call formats share: tools to call, and a parser that is fed in runs of characters."""

from __future__ import annotations

from typing import Any

from forgejax.chat.tool_calls import TOOL_CALL_FORMATS, Span, TextSpan

PROPERTIES = {
    "n": {"type": "integer"},
    "x": {"type": "number"},
    "yes": {"type": "boolean"},
    "box": {"type": "object"},
    "row": {"type": "array"},
    "s": {"type": "string"},
    "maybe": {"anyOf": [{"type": "integer"}, {"type": "null"}]},
    "either": {"type": ["integer", "string"]},
}
TOOLS: Any = [
    {"type": "function", "function": {"name": "f", "parameters": {"properties": PROPERTIES, "required": ["s"]}}},
    {"type": "function", "function": {"name": "bare"}},
]
LLAMA = '{"name": "f", "parameters": {"s": "}{\\"", "n": 3}}'


def parse(name: str, text: str, run: int = 1, tools: Any = TOOLS) -> list[Span]:
    """The spans of a reply pushed in runs of characters, neighbouring text joined."""
    parser = TOOL_CALL_FORMATS[name].make_parser(tools)
    spans: list[Span] = []
    for span in [p for at in range(0, len(text), run) for p in parser.push(text[at : at + run])] + parser.finish():
        if spans and isinstance(span, TextSpan) and isinstance(spans[-1], TextSpan):
            spans[-1] = TextSpan(text=spans[-1].text + span.text)
        else:
            spans.append(span)
    return spans
