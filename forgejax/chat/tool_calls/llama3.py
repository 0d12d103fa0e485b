"""Llama 3: the whole reply is ``{"name": ..., "parameters": {...}}``, or that stands behind ``<|python_tag|>``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from forgejax.chat.tool_calls.base import MalformedSpan, Signatures, Span, TextSpan, ToolCallParser, measure_overlap
from forgejax.chat.tool_calls.json_call import JsonCallReader

_TAG = "<|python_tag|>"
_BEGINNINGS = ('{"name":', '{"parameters":', '{"type":"function"')


class Llama3Format:
    markers = (_TAG,)
    example = '{"name": "NAME", "parameters": {"KEY": "VALUE"}}'

    def make_parser(self, tools: Sequence[Mapping[str, Any]]) -> ToolCallParser:
        return Llama3Parser(Signatures(tools))

    def open_call(self, name: str | None) -> str:
        named = "" if name is None else f' {json.dumps(name, ensure_ascii=False)}, "parameters":'
        return f'{{"name":{named}'


class Llama3Parser:
    """A reply that begins as a call is held back until it is one or can be none; behind the tag everything is an
    attempt. A call ends its reply: more than white space behind the object is a fault of the call."""

    def __init__(self, signatures: Signatures) -> None:
        self._signatures = signatures
        self._held = ""
        self._space = ""  # the white space before an open attempt
        self._tag = ""  # what the open attempt began with
        self._start = True  # nothing but white space has come yet, so that a bare object may follow
        self._reader: JsonCallReader | None = None  # of an open attempt

    def push(self, text: str) -> list[Span]:
        spans: list[Span] = []
        while text:
            if self._reader is not None:
                text = self._read_on(self._reader, text, spans)
            else:
                text = self._look_for_call(self._held + text, spans)
        return spans

    def finish(self) -> list[Span]:
        if self._reader is not None:
            spans: list[Span] = []
            complete = self._reader.over and self._reader.problem is None
            self._end(self._reader, None if complete else "the call's object is never closed", spans)
            return spans
        return [TextSpan(text=self._held)] if self._held else []

    def _look_for_call(self, text: str, spans: list[Span]) -> str:
        self._held = ""
        if self._start:
            bare = _begins(text)
            if bare is None:
                self._held = text
                return ""
            self._start = False
            if bare:
                return self._open("", "", text)
        said, tag, rest = text.partition(_TAG)
        if tag:
            words = said.rstrip()
            if words:
                spans.append(TextSpan(text=words))
            return self._open(said[len(words) :], tag, rest)
        safe = len(text[: len(text) - measure_overlap(text, _TAG)].rstrip())
        if safe:
            spans.append(TextSpan(text=text[:safe]))
        self._held = text[safe:]
        return ""

    def _open(self, space: str, tag: str, rest: str) -> str:
        self._space, self._tag = space, tag
        self._reader = JsonCallReader(self._signatures, "parameters", optional=frozenset({"type"}))
        return rest

    def _read_on(self, reader: JsonCallReader, text: str, spans: list[Span]) -> str:
        """Gives back what belongs to the attempt no more."""
        spans += reader.push(text)
        behind = reader.text[reader.end :]
        if reader.problem is not None:
            return self._end(reader, None, spans)
        if reader.over and behind.strip():
            return self._end(reader, "there is text after the call", spans)
        return ""

    def _end(self, reader: JsonCallReader, problem: str | None, spans: list[Span]) -> str:
        self._reader = None
        ended = reader.finish(problem)
        written, rest = reader.text[: reader.end], reader.text[reader.end :]
        if not isinstance(ended, str):
            spans.append(ended)
            return rest
        if self._space:
            spans.append(TextSpan(text=self._space))
        spans.append(MalformedSpan(text=self._tag + written + rest[:1], problem=ended))
        return rest[1:]


def _begins(text: str) -> bool | None:
    """Whether a reply begins as a bare call; None while that is open."""
    compact = "".join(text.lstrip()[:256].split())
    if any(compact.startswith(beginning) for beginning in _BEGINNINGS):
        return True
    return None if any(beginning.startswith(compact) for beginning in _BEGINNINGS) else False
