"""MiniMax-M2: ``<minimax:tool_call><invoke name="..."><parameter name="key">value</parameter></invoke>...``.

One pair of tags holds every call of a turn; if one of them is malformed, none is made.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from forgejax.chat.tool_calls.base import CallSpan, MalformedCallError, Signatures, ToolCallParser
from forgejax.chat.tool_calls.tagged import TaggedParser
from forgejax.chat.tool_calls.xml_values import read_function, scan_all

_INVOKE = re.compile(r'\s*<invoke name="([^"<>\n]+)">(.*?)</invoke>', re.DOTALL)
_PARAMETER = re.compile(r'\s*<parameter name="([^"<>\n]+)">(.*?)</parameter>', re.DOTALL)


class MiniMaxFormat:
    markers = ("<minimax:tool_call>", "</minimax:tool_call>")

    def make_parser(self, tools: Sequence[Mapping[str, Any]]) -> ToolCallParser:
        signatures = Signatures(tools)

        def read(body: str) -> list[CallSpan]:
            invokes = scan_all(_INVOKE, body, '<invoke name="NAME">')
            if not invokes:
                raise MalformedCallError('no <invoke name="NAME"> between the tags')
            calls = []
            for invoke in invokes:
                found = scan_all(_PARAMETER, invoke[2], '<parameter name="KEY">')
                pairs = [(pair[1], pair[2]) for pair in found]
                calls.append(read_function(signatures, invoke[1], pairs, invoke[0].strip(), python_words=False))
            return calls

        return TaggedParser(*self.markers, read)
