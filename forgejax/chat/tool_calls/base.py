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
class CallStart:
    """A call has begun: ``CallText`` and one ``CallSpan`` follow, with nothing between."""

    name: str


@dataclass(frozen=True, kw_only=True)
class CallText:
    """More of a call's arguments, as JSON text: what came by now is the beginning of a JSON object, or all there is."""

    text: str


@dataclass(frozen=True, kw_only=True)
class CallSpan:
    """The end of a call, and the whole of it. ``text`` is all its ``CallText``, ``arguments`` the object that spells,
    or None; ``problem`` says what is wrong: an agent is handed such a call too, and can answer it with an error."""

    name: str
    text: str
    arguments: Mapping[str, Any] | None
    problem: str | None = None


@dataclass(frozen=True, kw_only=True)
class MalformedSpan:
    """An attempt at a call that says not even what it calls. ``text`` is all of it, tags included; the agent gets it as
    text."""

    text: str
    problem: str


Span = TextSpan | CallStart | CallText | CallSpan | MalformedSpan
"""A stretch of sampled text, read as what it is."""


class MalformedCallError(Exception):
    """Why what was drawn is no well-formed call. The formats' readers raise it, their parsers make a span of it."""


class ToolCallParser(Protocol):
    """Cuts the text of one reply into spans. ``push`` in order, then ``finish`` once for what is still open.

    All texts joined are the pushed text, except for calls that name what they call and the white space beside them.
    """

    def push(self, text: str) -> list[Span]: ...

    def finish(self) -> list[Span]: ...


class ToolCallFormat(Protocol):
    """How a family of models writes tool calls. ``markers`` are the tags, the first of which opens a call; they may be
    special tokens. ``example`` is a call of the function NAME, for policies whose template tells them nothing of
    tools."""

    @property
    def markers(self) -> tuple[str, ...]: ...

    @property
    def example(self) -> str: ...

    def make_parser(self, tools: Sequence[Mapping[str, Any]]) -> ToolCallParser:
        """A parser for one reply; ``tools`` are the request's function tools."""
        ...

    def open_call(self, name: str | None) -> str:
        """How a call begins, up to where the policy is to choose: what it calls, or with what where ``name`` is given.

        Ends where the family's own tokens end, so that what is drawn next is spelled as it always is.
        """
        ...


class PlainTextFormat:
    """For replies in which no tool may be called."""

    markers = ()
    example = ""

    def make_parser(self, tools: Sequence[Mapping[str, Any]]) -> ToolCallParser:
        return _PlainText()

    def open_call(self, name: str | None) -> str:
        return ""


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
        """The JSON schema of an argument; empty where there is none."""
        properties = self._parameters.get(name, {}).get("properties")
        schema = properties.get(key) if isinstance(properties, Mapping) else None
        return schema if isinstance(schema, Mapping) else {}

    def judge_call(self, name: str, text: str, problem: str | None) -> CallSpan:
        """A call whose arguments are spelled ``text``, with what is wrong with it; ``problem`` goes before the rest."""
        arguments: Mapping[str, Any] | None = None
        try:
            value = read_json(text)
        except MalformedCallError as error:
            problem = problem or str(error)
        else:
            arguments = value if isinstance(value, dict) else None
        return CallSpan(name=name, text=text, arguments=arguments, problem=problem or self._find_fault(name, arguments))

    def _find_fault(self, name: str, arguments: Mapping[str, Any] | None) -> str | None:
        if name not in self._parameters:
            return f"unknown tool {name!r}"
        if arguments is None:
            return "arguments are not an object"
        missing = [key for key in self._parameters[name].get("required") or () if key not in arguments]
        return f"missing arguments: {', '.join(missing)}" if missing else None


def describe_tools(tools: Sequence[Mapping[str, Any]], example: str) -> str:
    """What a policy is told of its tools where the chat template does not print them."""
    listed = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
    return f"You can call these functions:\n{listed}\nA call of the function NAME is written like this:\n{example}"


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
