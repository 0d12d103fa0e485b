"""Llama 3: the whole reply is ``{"name": ..., "parameters": {...}}``, or that stands behind ``<|python_tag|>``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from forgejax.chat.tool_calls.base import (
    CallSpan,
    MalformedCallError,
    MalformedSpan,
    Signatures,
    Span,
    TextSpan,
    ToolCallParser,
    measure_overlap,
    read_json,
)

_TAG = "<|python_tag|>"
_BEGINNINGS = ('{"name":', '{"parameters":', '{"type":"function"')


class Llama3Format:
    markers = (_TAG,)

    def make_parser(self, tools: Sequence[Mapping[str, Any]]) -> ToolCallParser:
        return Llama3Parser(Signatures(tools))


class Llama3Parser:
    """A reply that begins as a call is held back until it can be none; behind the tag everything is an attempt.

    A call ends its reply: with more than white space after the object the attempt is malformed.
    """

    def __init__(self, signatures: Signatures) -> None:
        self._signatures = signatures
        self._held = ""
        self._space = ""  # the white space before an open attempt
        self._start = True  # nothing but white space has come yet, so that a bare object may follow
        self._object: _ObjectEnd | None = None  # while an attempt is open
        self._body = 0  # where the attempt's object begins in what is held
        self._call: CallSpan | None = None

    def push(self, text: str) -> list[Span]:
        self._held += text
        spans: list[Span] = []
        while self._step(spans):
            pass
        return spans

    def finish(self) -> list[Span]:
        if self._call is not None:
            return [self._call]
        if self._object is not None:
            spans: list[Span] = []
            self._give_up(len(self._held), "the call's object is never closed", spans)
            return spans
        return [TextSpan(text=self._held)] if self._held else []

    def _step(self, spans: list[Span]) -> bool:
        if self._object is not None:
            return self._read_object(self._object, spans)
        if self._start:
            bare = _begins(self._held)
            if bare is None:
                return False
            self._start = False
            if bare:
                self._open(0)
                return True
        text, tag, _ = self._held.partition(_TAG)
        if tag:
            if said := text.rstrip():
                spans.append(TextSpan(text=said))
            self._space, self._held = text[len(said) :], self._held[len(text) :]
            self._open(len(_TAG))
            return True
        safe = len(text[: len(text) - measure_overlap(text, _TAG)].rstrip())
        if safe:
            spans.append(TextSpan(text=text[:safe]))
        self._held = text[safe:]
        return False

    def _open(self, body: int) -> None:
        self._object, self._body = _ObjectEnd(body), body

    def _read_object(self, scanner: _ObjectEnd, spans: list[Span]) -> bool:
        end = scanner.find(self._held)
        if end is None:
            return False
        if self._call is None:
            try:
                self._call = self._read(self._held[self._body : end])
            except MalformedCallError as error:
                return self._give_up(end, str(error), spans)
        if self._held[end:].strip():
            return self._give_up(end, "there is text after the call", spans)
        return False

    def _give_up(self, end: int, problem: str, spans: list[Span]) -> bool:
        if self._space:
            spans.append(TextSpan(text=self._space))
        spans.append(MalformedSpan(text=self._held[:end], problem=problem))
        self._held, self._space, self._object, self._call = self._held[end:], "", None, None
        return bool(self._held)

    def _read(self, text: str) -> CallSpan:
        call = read_json(text)
        named = isinstance(call, dict) and call.get("type", "function") == "function"
        if not named or set(call) - {"type"} != {"name", "parameters"}:
            raise MalformedCallError('not an object of "name" and "parameters"')
        return self._signatures.check_call(call["name"], call["parameters"], text)


class _ObjectEnd:
    """Finds where the JSON object that begins at ``start`` ends, in a text that grows."""

    def __init__(self, start: int) -> None:
        self._at = start
        self._depth = 0
        self._quoted = self._escaped = False
        self._end: int | None = None

    def find(self, text: str) -> int | None:
        """The index behind the object; None while it is open. What begins no object ends at its first character."""
        while self._end is None and self._at < len(text):
            character = text[self._at]
            self._at += 1
            if self._escaped:
                self._escaped = False
            elif self._quoted:
                self._escaped = character == "\\"
                self._quoted = character != '"'
            elif character == '"' and self._depth:
                self._quoted = True
            elif not character.isspace():
                self._depth += (character in "{[") - (character in "}]")
                if self._depth <= 0:
                    self._end = self._at
        return self._end


def _begins(text: str) -> bool | None:
    """Whether a reply begins as a bare call; None while that is open."""
    compact = "".join(text.lstrip()[:256].split())
    if any(compact.startswith(beginning) for beginning in _BEGINNINGS):
        return True
    return None if any(beginning.startswith(compact) for beginning in _BEGINNINGS) else False
