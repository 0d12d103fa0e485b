"""What the tests of the tool-call formats share: tools to call, and a parser that is fed in runs of characters."""

from __future__ import annotations

from typing import Any

from forgejax.chat.tool_calls import TOOL_CALL_FORMATS, CallSpan, CallStart, CallText, Span, TextSpan

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
    """The spans of a reply pushed in runs of characters, neighbouring text joined, each call as its end.

    What was handed over of a call while it was drawn must be that call.
    """
    parser = TOOL_CALL_FORMATS[name].make_parser(tools)
    spans: list[Span] = []
    started: CallStart | None = None
    drawn = ""
    for span in [p for at in range(0, len(text), run) for p in parser.push(text[at : at + run])] + parser.finish():
        if isinstance(span, CallStart):
            assert started is None
            started, drawn = span, ""
        elif isinstance(span, CallText):
            assert started is not None and span.text
            drawn += span.text
        elif isinstance(span, CallSpan):
            assert started is not None and (started.name, drawn) == (span.name, span.text)
            started = None
            spans.append(span)
        elif spans and isinstance(span, TextSpan) and isinstance(spans[-1], TextSpan):
            assert started is None
            spans[-1] = TextSpan(text=spans[-1].text + span.text)
        else:
            assert started is None
            spans.append(span)
    assert started is None
    return spans
