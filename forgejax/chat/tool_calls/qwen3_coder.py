"""Qwen3-Coder: ``<tool_call><function=name><parameter=key>value</parameter></function></tool_call>``.

One line break on either side of a value belongs to the format. Booleans and null may be written as Python writes them,
for that is how the family's own chat template prints them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from forgejax.chat.tool_calls.base import Signatures, ToolCallParser
from forgejax.chat.tool_calls.tagged import TaggedParser
from forgejax.chat.tool_calls.xml_call import XmlBody, XmlGrammar

_GRAMMAR = XmlGrammar(
    opening="<tool_call>",
    closing="</tool_call>",
    function=("<function=", ">"),
    function_end="</function>",
    parameter=("<parameter=", ">"),
    line_breaks=True,
    python_words=True,
)


class Qwen3CoderFormat:
    markers = (_GRAMMAR.opening, _GRAMMAR.closing)
    example = "<tool_call>\n<function=NAME>\n<parameter=KEY>\nVALUE\n</parameter>\n</function>\n</tool_call>"

    def make_parser(self, tools: Sequence[Mapping[str, Any]]) -> ToolCallParser:
        signatures = Signatures(tools)
        return TaggedParser(_GRAMMAR.opening, lambda: XmlBody(_GRAMMAR, signatures))

    def open_call(self, name: str | None) -> str:
        return f"{_GRAMMAR.opening}\n{_GRAMMAR.open_function(name)}" + ("" if name is None else "\n")
