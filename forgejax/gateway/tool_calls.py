"""Tool calls in sampled text, found while it streams. A malformed call is a result of its own, never repaired."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True, kw_only=True)
class TextPart:
    """Text for the agent to read."""

    text: str


@dataclass(frozen=True, kw_only=True)
class CallPart:
    """A call that names a known tool and brings an object with every required argument."""

    name: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class MalformedPart:
    """An attempt at a call that cannot be made. ``text`` is all of it, tags included; the agent gets it as text."""

    text: str
    problem: str


Part = TextPart | CallPart | MalformedPart


class ToolCallParser(Protocol):
    """Cuts one reply into parts. ``push`` in order, then ``finish`` once for what is still open."""

    def push(self, text: str) -> list[Part]: ...

    def finish(self) -> list[Part]: ...


class ToolCallFormat(Protocol):
    """How a family of models writes tool calls. ``markers`` are the tags, which may be special tokens."""

    @property
    def markers(self) -> tuple[str, ...]: ...

    def parser(self, tools: Sequence[Mapping[str, Any]]) -> ToolCallParser:
        """A parser for one reply; ``tools`` are the request's function tools."""
        ...


class PlainText:
    """The parser for replies in which no tool may be called."""

    def push(self, text: str) -> list[Part]:
        return [TextPart(text=text)] if text else []

    def finish(self) -> list[Part]:
        return []


class HermesFormat:
    """``<tool_call>{"name": ..., "arguments": {...}}</tool_call>``, as Hermes and Qwen models write it."""

    markers = ("<tool_call>", "</tool_call>")

    def parser(self, tools: Sequence[Mapping[str, Any]]) -> ToolCallParser:
        return HermesParser(tools)


class HermesParser:
    """White space beside well-formed calls belongs to the format and is left out of the text."""

    def __init__(self, tools: Sequence[Mapping[str, Any]]) -> None:
        self._open, self._close = HermesFormat.markers
        self._required = {
            tool["function"]["name"]: tuple((tool["function"].get("parameters") or {}).get("required") or ())
            for tool in tools
        }
        self._held = ""  # text not yet given out: white space and a tag's beginning, or a call's body
        self._in_call = False
        self._after_call = False

    def push(self, text: str) -> list[Part]:
        self._held += text
        parts: list[Part] = []
        while self._step(parts):
            pass
        return parts

    def finish(self) -> list[Part]:
        if self._in_call:
            return [self._malformed(self._held, f"{self._open} is never closed")]
        parts: list[Part] = []
        if not (self._after_call and not self._held.strip()):
            self._give_text(self._held, parts)
        return parts

    def _step(self, parts: list[Part]) -> bool:
        """Moves past one tag, if the next one is there."""
        if self._in_call:
            body, tag, rest = self._held.partition(self._close)
            if not tag:
                return False
            parts.append(self._call(body))
            self._after_call = isinstance(parts[-1], CallPart)
            self._held, self._in_call = rest, False
            return True
        text, tag, rest = self._held.partition(self._open)
        if tag:
            # Whether the space before a call is part of the text is known only when the call has proved well-formed;
            # it carries no meaning, so it goes either way.
            self._give_text(text.rstrip(), parts)
            self._held, self._in_call = rest, True
            return True
        if self._after_call:
            text = text.lstrip()
        safe = len(text.rstrip())
        safe = min(safe, len(text) - overlap(text, self._open))
        safe = len(text[:safe].rstrip())
        self._give_text(text[:safe], parts)
        self._held = text[safe:]
        return False

    def _give_text(self, text: str, parts: list[Part]) -> None:
        if self._after_call:
            text = text.lstrip()
        if text:
            parts.append(TextPart(text=text))
            self._after_call = False

    def _call(self, body: str) -> Part:
        try:
            call = _strict_json(body)
        except (ValueError, RecursionError) as error:
            return self._malformed(body + self._close, f"not JSON: {error}")
        if not isinstance(call, dict) or set(call) != {"name", "arguments"}:
            return self._malformed(body + self._close, 'not an object of "name" and "arguments"')
        name, arguments = call["name"], call["arguments"]
        if not isinstance(name, str) or name not in self._required:
            return self._malformed(body + self._close, f"unknown tool {name!r}")
        if not isinstance(arguments, dict):
            return self._malformed(body + self._close, "arguments are not an object")
        missing = [key for key in self._required[name] if key not in arguments]
        if missing:
            return self._malformed(body + self._close, f"missing arguments: {', '.join(missing)}")
        return CallPart(name=name, arguments=arguments)

    def _malformed(self, body: str, problem: str) -> MalformedPart:
        return MalformedPart(text=self._open + body, problem=problem)


TOOL_CALL_FORMATS: Mapping[str, ToolCallFormat] = {"hermes": HermesFormat()}


def overlap(text: str, tag: str) -> int:
    """The length of the longest end of ``text`` that is a proper beginning of ``tag``."""
    for size in range(min(len(text), len(tag) - 1), 0, -1):
        if text.endswith(tag[:size]):
            return size
    return 0


def _strict_json(text: str) -> Any:
    """JSON that all parsers read alike: no repeated keys, NaN, infinity or half surrogate pairs. Raises ValueError."""
    value = json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse)
    json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("a key occurs twice")
    return value


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no JSON number")
