"""Qwen3-Coder: ``<tool_call><function=name><parameter=key>value</parameter></function></tool_call>``.

One line break on either side of a value belongs to the format. Booleans and null may be written as Python writes them,
for that is how the family's own chat template prints them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from forgejax.chat.tool_calls.base import CallSpan, MalformedCallError, Signatures, ToolCallParser
from forgejax.chat.tool_calls.tagged import TaggedParser
from forgejax.chat.tool_calls.xml_values import read_function, scan_all

_FUNCTION = re.compile(r"\s*<function=([^<>\n]+)>(.*)</function>\s*", re.DOTALL)
_PARAMETER = re.compile(r"\s*<parameter=([^<>\n]+)>(.*?)</parameter>", re.DOTALL)


class Qwen3CoderFormat:
    markers = ("<tool_call>", "</tool_call>")

    def make_parser(self, tools: Sequence[Mapping[str, Any]]) -> ToolCallParser:
        signatures = Signatures(tools)

        def read(body: str) -> list[CallSpan]:
            function = _FUNCTION.fullmatch(body)
            if function is None:
                raise MalformedCallError("not one <function=NAME>...</function>")
            pairs = [
                (found[1], _strip_line_breaks(found[2]))
                for found in scan_all(_PARAMETER, function[2], "<parameter=KEY>")
            ]
            return [read_function(signatures, function[1], pairs, body, python_words=True)]

        return TaggedParser(*self.markers, read)


def _strip_line_breaks(text: str) -> str:
    return text.removeprefix("\n").removesuffix("\n")
