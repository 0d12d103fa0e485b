"""Calls written as XML-like elements, a parameter an element, handed over while they are drawn."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Literal

from forgejax.chat.tool_calls.base import (
    CallStart,
    CallText,
    MalformedCallError,
    MalformedSpan,
    Signatures,
    Span,
    measure_overlap,
)
from forgejax.chat.tool_calls.xml_values import is_text, read_value


@dataclass(frozen=True, kw_only=True)
class XmlGrammar:
    """How a family writes it. A function or parameter begins with what stands before its name and what stands behind.

    ``several``: calls may follow one another between the tags. ``line_breaks``: one on either side of a value belongs
    to the format. ``python_words``: True, False and None count as JSON's.
    """

    opening: str
    closing: str
    function: tuple[str, str]
    function_end: str
    parameter: tuple[str, str]
    parameter_end: str = "</parameter>"
    several: bool = False
    line_breaks: bool = False
    python_words: bool = False

    def open_function(self, name: str | None) -> str:
        return self.function[0] if name is None else name.join(self.function)


class XmlBody:
    """What stands behind one opening tag, the closing one included, wherever that comes.

    The arguments are handed over as a JSON object; a value that may be any text while it is drawn.
    """

    def __init__(self, grammar: XmlGrammar, signatures: Signatures) -> None:
        self._grammar = grammar
        self._signatures = signatures
        self._state: Literal["outside", "function", "value", "broken"] = "outside"
        self._written = grammar.opening
        self._held = ""
        self._problem: str | None = None
        self._name: str | None = None  # of the open call
        self._calls = 0
        self._calls_end = 0  # up to here ``_written`` is calls
        self._given: list[str] = []  # of the open call's arguments
        self._keys: set[str] = set()
        self._key = ""
        self._open_text = False  # an argument's string was begun and not ended
        self.rest: str | None = None

    def push(self, text: str) -> list[Span]:
        self._written += text
        self._held += text
        spans: list[Span] = []
        while self.rest is None and self._step(spans):
            pass
        return spans

    def finish(self) -> list[Span]:
        spans: list[Span] = []
        self._give_up(f"{self._grammar.opening} is never closed")
        self._end(self._written, spans)
        return spans

    def _step(self, spans: list[Span]) -> bool:
        if self._state == "value":
            return self._read_value(spans)
        if self._state == "broken":
            return self._look_for_end(spans)
        grammar = self._grammar
        self._held = self._held.lstrip()
        inside = self._state == "function"
        beginning, ending = grammar.parameter if inside else grammar.function
        last = grammar.function_end if inside else grammar.closing
        if self._held.startswith(last):
            if not inside:
                return self._look_for_end(spans)
            self._held = self._held[len(last) :]
            self._give(("" if self._given else "{") + "}", spans)
            self._end_call(spans)
            return True
        name, found, rest = self._held.removeprefix(beginning).partition(ending)
        if self._held.startswith(beginning) and (inside or grammar.several or not self._calls):
            if not found and not set(name) & set("<>\n"):
                return False
            if found and name and not set(name) & set("<>\n"):
                self._held = rest
                self._begin(name, spans)
                return True
        elif beginning.startswith(self._held) or last.startswith(self._held):
            return False
        self._give_up(f"expected {beginning}NAME{ending} or {last}")
        return True

    def _begin(self, name: str, spans: list[Span]) -> None:
        if self._state == "outside":
            self._name, self._given, self._keys, self._state = name, [], set(), "function"
            spans.append(CallStart(name=name))
        elif name in self._keys:
            self._give_up(f"parameter {name} occurs twice")
        else:
            self._keys.add(name)
            self._key, self._open_text, self._state = name, False, "value"

    def _read_value(self, spans: list[Span]) -> bool:
        grammar = self._grammar
        end, closed = self._held.find(grammar.parameter_end), self._held.find(grammar.closing)
        if closed >= 0 and (end < 0 or closed < end):
            self._give_up(f"expected {grammar.parameter_end}, found {grammar.closing}")
            return True
        schema = self._signatures.find_schema(str(self._name), self._key)
        if end < 0:
            if is_text(schema):
                self._give_beginning(spans)
            return False
        value, self._held = self._held[:end], self._held[end + len(grammar.parameter_end) :]
        if grammar.line_breaks:
            value = (value if self._open_text else value.removeprefix("\n")).removesuffix("\n")
        self._state = "function"
        try:
            read = value if is_text(schema) else read_value(value, schema, python_words=grammar.python_words)
        except MalformedCallError as error:
            self._give_up(f"parameter {self._key}: {error}")
            return True
        spelled = json.dumps(read, ensure_ascii=False)
        self._give(spelled[1:] if self._open_text else self._spell_key() + spelled, spans)
        return True

    def _give_beginning(self, spans: list[Span]) -> None:
        """Gives out what is known of a text that goes on."""
        text = self._held
        if self._grammar.line_breaks and not self._open_text:
            text = text.removeprefix("\n")
        end = len(text) - max(
            measure_overlap(text, tag) for tag in (self._grammar.parameter_end, self._grammar.closing)
        )
        if self._grammar.line_breaks and text[:end].endswith("\n"):
            end -= 1
        if end > 0:
            spelled = json.dumps(text[:end], ensure_ascii=False)[:-1]
            self._give(spelled[1:] if self._open_text else self._spell_key() + spelled, spans)
            self._open_text, self._held = True, text[end:]

    def _spell_key(self) -> str:
        return (", " if self._given else "{") + json.dumps(self._key, ensure_ascii=False) + ": "

    def _give(self, text: str, spans: list[Span]) -> None:
        self._given.append(text)
        spans.append(CallText(text=text))

    def _give_up(self, problem: str) -> None:
        self._problem, self._state = self._problem or problem, "broken"

    def _look_for_end(self, spans: list[Span]) -> bool:
        _, closed, rest = self._held.partition(self._grammar.closing)
        if not closed:
            return False
        self.rest = rest
        self._end(self._written[: len(self._written) - len(rest)], spans)
        return False

    def _end_call(self, spans: list[Span]) -> None:
        name, self._name, self._state = str(self._name), None, "outside"
        self._calls += 1
        self._calls_end = len(self._written) - len(self._held)
        spans.append(self._signatures.judge_call(name, "".join(self._given), self._problem))

    def _end(self, written: str, spans: list[Span]) -> None:
        """The closing tag is there, or will never be."""
        if self._name is not None:
            self._end_call(spans)
        elif not self._calls:
            function = "NAME".join(self._grammar.function)
            spans.append(MalformedSpan(text=written, problem=self._problem or f"no {function} between the tags"))
        elif self._problem is not None and (rest := written[self._calls_end :]).strip():
            spans.append(MalformedSpan(text=rest, problem=self._problem))
