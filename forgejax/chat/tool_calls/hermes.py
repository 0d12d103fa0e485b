"""Hermes and Qwen 2.5/3: ``<tool_call>{"name": ..., "arguments": {...}}</tool_call>``, one call between the tags.

A closing tag inside a string is part of the string.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from forgejax.chat.tool_calls.base import CallSpan, MalformedSpan, Signatures, Span, ToolCallParser
from forgejax.chat.tool_calls.json_call import JsonCallReader
from forgejax.chat.tool_calls.tagged import TaggedParser

_OPENING, _CLOSING = "<tool_call>", "</tool_call>"


class HermesFormat:
    markers = (_OPENING, _CLOSING)
    example = f'{_OPENING}\n{{"name": "NAME", "arguments": {{"KEY": "VALUE"}}}}\n{_CLOSING}'

    def make_parser(self, tools: Sequence[Mapping[str, Any]]) -> ToolCallParser:
        signatures = Signatures(tools)
        return TaggedParser(_OPENING, lambda: HermesBody(signatures))

    def open_call(self, name: str | None) -> str:
        named = "" if name is None else f' {json.dumps(name, ensure_ascii=False)}, "arguments":'
        return f'{_OPENING}\n{{"name":{named}'


class HermesBody:
    """What stands behind one opening tag, the closing one included."""

    def __init__(self, signatures: Signatures) -> None:
        self._reader = JsonCallReader(signatures, "arguments")
        self.rest: str | None = None

    def push(self, text: str) -> list[Span]:
        spans = self._reader.push(text)
        if not self._reader.over:
            return spans
        written, end = self._reader.text, self._reader.end
        at = written.find(_CLOSING, end)
        if at < 0:
            return spans
        self.rest = written[at + len(_CLOSING) :]
        problem = "there is text behind the object" if written[end:at].strip() else None
        return [*spans, self._end(written[: at + len(_CLOSING)], problem)]

    def finish(self) -> list[Span]:
        return [self._end(self._reader.text, f"{_OPENING} is never closed")]

    def _end(self, written: str, problem: str | None) -> CallSpan | MalformedSpan:
        ended = self._reader.finish(problem)
        return MalformedSpan(text=_OPENING + written, problem=ended) if isinstance(ended, str) else ended
