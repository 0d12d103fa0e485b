"""A chat template as a function from neutral messages to text."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jinja2
import msgspec

from forgejax.chat.messages import TemplateMessage, Tool
from forgejax.errors import GatewayError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


_TOOLS_KEPT = 32  # lists of tools
_TOOLS_BYTES = 256 * 1024


class TemplateError(GatewayError):
    """The chat template refuses these messages, or has no place for them."""


class ChatTemplate:
    """Renders with transformers. Words that spell control tokens pass through ``quote`` first.

    ``quote`` is for what users, tools and schemas say, ``quote_spoken`` for what the policy said: that may hold the
    tokens an agent is shown (tags of calls and of thinking), and no others.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        quote: Callable[[str], str],
        quote_spoken: Callable[[str], str],
    ) -> None:
        self._tokenizer = tokenizer
        self._quote = quote
        self._quote_spoken = quote_spoken
        self._quoted_tools: OrderedDict[bytes, list[Any]] = OrderedDict()

    def render(self, messages: Sequence[TemplateMessage], tools: Sequence[Tool], *, prompt: bool) -> str:
        """The rendered chat; with ``prompt`` up to where the assistant begins to speak. Raises TemplateError."""
        quoted = [
            _quote_all(_read_arguments(message), self._quote_spoken)
            if message["role"] == "assistant"
            else _quote_all(message, self._quote)
            for message in messages
        ]
        try:
            text = self._tokenizer.apply_chat_template(
                quoted,
                tools=self._quote_tools(tools) or None,
                add_generation_prompt=prompt,
                tokenize=False,
            )
        # The template is a program from outside: besides its own errors it may trip over whatever a message holds.
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
            raise TemplateError(
                f"the chat template does not accept these messages: {error}; change their roles, order or content"
            ) from error
        if not isinstance(text, str):
            raise TemplateError(f"the chat template rendered {type(text).__name__}; expected text")
        return text

    def _quote_tools(self, tools: Sequence[Tool]) -> list[Any]:
        """Remembered, for an agent sends the same tools with every request. Templates do not write into them."""
        if not tools:
            return []
        key = msgspec.json.encode(tools)
        quoted = self._quoted_tools.get(key)
        if quoted is None:
            quoted = [_quote_all(tool, self._quote) for tool in tools]
            if len(key) <= _TOOLS_BYTES:
                self._quoted_tools[key] = quoted
                if len(self._quoted_tools) > _TOOLS_KEPT:
                    self._quoted_tools.popitem(last=False)
        return quoted


def _quote_all(value: Any, quote: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return quote(value)
    if isinstance(value, Mapping):
        return {_quote_all(key, quote): _quote_all(item, quote) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_quote_all(item, quote) for item in value]
    return value


def _read_arguments(message: TemplateMessage) -> TemplateMessage:
    """``message`` with tool-call arguments that are JSON text as the objects they spell."""
    if not message.get("tool_calls"):
        return message
    calls = []
    for call in message["tool_calls"]:
        function = dict(call["function"])
        if isinstance(function["arguments"], str):
            try:
                function["arguments"] = json.loads(function["arguments"])
            except ValueError as error:
                raise TemplateError(f"tool-call arguments {function['arguments']!r} are not JSON: {error}") from error
        calls.append({**call, "function": function})
    return {**message, "content": message.get("content") or "", "tool_calls": calls}
