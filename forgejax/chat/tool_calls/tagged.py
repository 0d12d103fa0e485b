"""The parser of every format that puts its calls between two tags."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from forgejax.chat.tool_calls.base import CallSpan, MalformedCallError, MalformedSpan, Span, TextSpan, measure_overlap

ReadBody = Callable[[str], Sequence[CallSpan]]
"""Reads what stands between the tags. Raises MalformedCallError; then all of it is one malformed attempt."""


class TaggedParser:
    """White space beside well-formed calls belongs to the format and is left out of the text.

    Held back is only what may still turn out to be a tag or the white space before one, and the body of an open call.
    """

    def __init__(self, opening: str, closing: str, read: ReadBody) -> None:
        self._opening, self._closing = opening, closing
        self._read = read
        self._held = ""  # text not yet given out: white space and a tag's beginning, or a call's body
        self._space = ""  # the white space before an open call
        self._seen = 0  # characters of an open body in which no closing tag begins
        self._in_call = False
        self._after_call = False

    def push(self, text: str) -> list[Span]:
        self._held += text
        spans: list[Span] = []
        while self._step(spans):
            pass
        return spans

    def finish(self) -> list[Span]:
        spans: list[Span] = []
        if self._in_call:
            self._give_malformed(self._held, f"{self._opening} is never closed", spans)
            return spans
        if not (self._after_call and not self._held.strip()):
            self._give_text(self._held, spans)
        return spans

    def _step(self, spans: list[Span]) -> bool:
        """Moves past one tag, if the next one is there."""
        if self._in_call:
            end = self._held.find(self._closing, self._seen)
            if end < 0:
                self._seen = max(0, len(self._held) - len(self._closing) + 1)
                return False
            self._give_calls(self._held[:end], spans)
            self._held, self._in_call = self._held[end + len(self._closing) :], False
            return True
        text, tag, rest = self._held.partition(self._opening)
        if tag:
            said = text.rstrip()
            self._give_text(said, spans)
            self._space = text[len(said) :]
            self._held, self._in_call, self._seen = rest, True, 0
            return True
        if self._after_call:
            text = text.lstrip()
        safe = len(text) - measure_overlap(text, self._opening)
        safe = len(text[:safe].rstrip())
        self._give_text(text[:safe], spans)
        self._held = text[safe:]
        return False

    def _give_text(self, text: str, spans: list[Span]) -> None:
        if self._after_call:
            text = text.lstrip()
        if text:
            spans.append(TextSpan(text=text))
            self._after_call = False

    def _give_calls(self, body: str, spans: list[Span]) -> None:
        try:
            spans += self._read(body)
            self._after_call = True
        except MalformedCallError as error:
            self._give_malformed(body + self._closing, str(error), spans)

    def _give_malformed(self, body: str, problem: str, spans: list[Span]) -> None:
        self._give_text(self._space, spans)
        spans.append(MalformedSpan(text=self._opening + body, problem=problem))
        self._after_call = False
