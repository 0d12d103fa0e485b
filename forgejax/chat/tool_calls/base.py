"""What every tool-call format is made of: spans of sampled text, the parser's Protocol, the checks of a call."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True, kw_only=True)
class TextSpan:
    """Text for the agent to read."""

    text: str


@dataclass(frozen=True, kw_only=True)
class CallSpan:
    """A call that names a known tool and brings an object with every required argument.

    ``raw`` is what was read as this call, without the tags.
    """

    name: str
    arguments: Mapping[str, Any]
    raw: str


@dataclass(frozen=True, kw_only=True)
class MalformedSpan:
    """An attempt at a call that cannot be made. ``text`` is all of it, tags included; the agent gets it as text."""

    text: str
    problem: str


Span = TextSpan | CallSpan | MalformedSpan
"""A stretch of sampled text, read as what it is."""


class MalformedCallError(Exception):
    """Why an attempt at a call is none. The formats' readers raise it, their parsers make a MalformedSpan of it."""


class ToolCallParser(Protocol):
    """Cuts the text of one reply into spans. ``push`` in order, then ``finish`` once for what is still open.

    All texts joined are the pushed text, except for well-formed calls and the white space beside them.
    """

    def push(self, text: str) -> list[Span]: ...

    def finish(self) -> list[Span]: ...


class ToolCallFormat(Protocol):
    """How a family of models writes tool calls. ``markers`` are the tags, which may be special tokens."""

    @property
    def markers(self) -> tuple[str, ...]: ...

    def make_parser(self, tools: Sequence[Mapping[str, Any]]) -> ToolCallParser:
        """A parser for one reply; ``tools`` are the request's function tools."""
        ...


class PlainTextFormat:
    """For replies in which no tool may be called."""

    markers = ()

    def make_parser(self, tools: Sequence[Mapping[str, Any]]) -> ToolCallParser:
        return _PlainText()


class _PlainText:
    def push(self, text: str) -> list[Span]:
        return [TextSpan(text=text)] if text else []

    def finish(self) -> list[Span]:
        return []


class Signatures:
    """What may be called: the request's tools by name."""

    def __init__(self, tools: Sequence[Mapping[str, Any]]) -> None:
        self._parameters = {tool["function"]["name"]: tool["function"].get("parameters") or {} for tool in tools}

    def find_schema(self, name: str, key: str) -> Mapping[str, Any]:
        """The JSON schema of an argument; empty where the tool gives none. Raises MalformedCallError."""
        properties = self._find_parameters(name).get("properties")
        schema = properties.get(key) if isinstance(properties, Mapping) else None
        return schema if isinstance(schema, Mapping) else {}

    def check_call(self, name: object, arguments: object, raw: str) -> CallSpan:
        """The call, if it can be made; ``raw`` is how it was written. Raises MalformedCallError."""
        required = self._find_parameters(name).get("required") or ()
        if not isinstance(arguments, dict):
            raise MalformedCallError("arguments are not an object")
        missing = [key for key in required if key not in arguments]
        if missing:
            raise MalformedCallError(f"missing arguments: {', '.join(missing)}")
        return CallSpan(name=str(name), arguments=arguments, raw=raw)

    def _find_parameters(self, name: object) -> Mapping[str, Any]:
        if not isinstance(name, str) or name not in self._parameters:
            raise MalformedCallError(f"unknown tool {name!r}")
        return self._parameters[name]


def read_json(text: str) -> Any:
    """JSON that all parsers read alike: no repeated keys, NaN, infinity or half surrogate pairs.

    Raises MalformedCallError.
    """
    try:
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse)
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError) as error:
        raise MalformedCallError(f"not JSON: {error}") from error
    return value


def measure_overlap(text: str, tag: str) -> int:
    """The length of the longest end of ``text`` that is a proper beginning of ``tag``."""
    for size in range(min(len(text), len(tag) - 1), 0, -1):
        if text.endswith(tag[:size]):
            return size
    return 0


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("a key occurs twice")
    return value


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no JSON number")
