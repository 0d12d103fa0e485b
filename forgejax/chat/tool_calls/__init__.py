"""Tool calls in sampled text, found while it streams. What is wrong with a call is told, never repaired."""

from collections.abc import Mapping
from typing import Literal

from forgejax.chat.tool_calls.base import (
    CallSpan,
    CallStart,
    CallText,
    MalformedSpan,
    PlainTextFormat,
    Span,
    TextSpan,
    ToolCallFormat,
    ToolCallParser,
    describe_tools,
    measure_overlap,
)
from forgejax.chat.tool_calls.hermes import HermesFormat
from forgejax.chat.tool_calls.llama3 import Llama3Format
from forgejax.chat.tool_calls.minimax import MiniMaxFormat
from forgejax.chat.tool_calls.qwen3_coder import Qwen3CoderFormat

ToolFormatName = Literal["auto", "hermes", "qwen3_coder", "llama3", "minimax"]

TOOL_CALL_FORMATS: Mapping[str, ToolCallFormat] = {
    "hermes": HermesFormat(),
    "qwen3_coder": Qwen3CoderFormat(),
    "llama3": Llama3Format(),
    "minimax": MiniMaxFormat(),
}

__all__ = [
    "TOOL_CALL_FORMATS",
    "CallSpan",
    "CallStart",
    "CallText",
    "HermesFormat",
    "MalformedSpan",
    "PlainTextFormat",
    "Span",
    "TextSpan",
    "ToolCallFormat",
    "ToolCallParser",
    "ToolFormatName",
    "describe_tools",
    "measure_overlap",
]
