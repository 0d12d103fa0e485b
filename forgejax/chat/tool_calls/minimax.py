"""MiniMax-M2: ``<minimax:tool_call><invoke name="..."><parameter name="key">value</parameter></invoke>...``.

One pair of tags holds every call of a turn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from forgejax.chat.tool_calls.base import Signatures, ToolCallParser
from forgejax.chat.tool_calls.tagged import TaggedParser
from forgejax.chat.tool_calls.xml_call import XmlBody, XmlGrammar

_GRAMMAR = XmlGrammar(
    opening="<minimax:tool_call>",
    closing="</minimax:tool_call>",
    function=('<invoke name="', '">'),
    function_end="</invoke>",
    parameter=('<parameter name="', '">'),
    several=True,
)


class MiniMaxFormat:
    markers = (_GRAMMAR.opening, _GRAMMAR.closing)
    example = (
        '<minimax:tool_call>\n<invoke name="NAME">\n<parameter name="KEY">VALUE</parameter>\n</invoke>\n'
        "</minimax:tool_call>"
    )

    def make_parser(self, tools: Sequence[Mapping[str, Any]]) -> ToolCallParser:
        signatures = Signatures(tools)
        return TaggedParser(_GRAMMAR.opening, lambda: XmlBody(_GRAMMAR, signatures))

    def open_call(self, name: str | None) -> str:
        return f"{_GRAMMAR.opening}\n{_GRAMMAR.open_function(name)}"
