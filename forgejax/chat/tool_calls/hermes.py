"""Hermes and Qwen 2.5/3: ``<tool_call>{"name": ..., "arguments": {...}}</tool_call>``, one call between the tags."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from forgejax.chat.tool_calls.base import CallSpan, MalformedCallError, Signatures, ToolCallParser, read_json
from forgejax.chat.tool_calls.tagged import TaggedParser


class HermesFormat:
    markers = ("<tool_call>", "</tool_call>")

    def make_parser(self, tools: Sequence[Mapping[str, Any]]) -> ToolCallParser:
        signatures = Signatures(tools)

        def read(body: str) -> list[CallSpan]:
            call = read_json(body)
            if not isinstance(call, dict) or set(call) != {"name", "arguments"}:
                raise MalformedCallError('not an object of "name" and "arguments"')
            return [signatures.check_call(call["name"], call["arguments"], body)]

        return TaggedParser(*self.markers, read)
