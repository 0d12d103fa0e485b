"""The parser of every format that puts its calls between two tags."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from forgejax.chat.tool_calls.base import MalformedSpan, Span, TextSpan, measure_overlap


class CallBody(Protocol):
    """Reads what stands behind one opening tag, up to the closing one. ``rest``, once that was read, is what follows.

    Ends in a MalformedSpan of all of it, opening tag included, or in nothing but calls.
    """

    @property
    def rest(self) -> str | None: ...

    def push(self, text: str) -> list[Span]: ...

    def finish(self) -> list[Span]: ...


class TaggedParser:
    """White space beside calls belongs to the format and is left out of the text.

    Held back is only what may still turn out to be a tag or the white space before one.
    """

    def __init__(self, opening: str, make_body: Callable[[], CallBody]) -> None:
        self._opening = opening
        self._make_body = make_body
        self._body: CallBody | None = None
        self._held = ""  # white space and a tag's beginning
        self._space = ""  # the white space before an open call
        self._after_call = False

    def push(self, text: str) -> list[Span]:
        spans: list[Span] = []
        while text:
            if self._body is not None:
                self._take(self._body.push(text), spans)
                if self._body.rest is None:
                    break
                text, self._body = self._body.rest, None
            else:
                text = self._look_for_tag(self._held + text, spans)
        return spans

    def finish(self) -> list[Span]:
        spans: list[Span] = []
        if self._body is not None:
            self._take(self._body.finish(), spans)
        elif not (self._after_call and not self._held.strip()):
            self._give_text(self._held, spans)
        return spans

    def _look_for_tag(self, text: str, spans: list[Span]) -> str:
        """Gives out what is text for certain, and what follows an opening tag if there is one."""
        text, tag, rest = text.partition(self._opening)
        if tag:
            said = text.rstrip()
            self._give_text(said, spans)
            self._space, self._held, self._body = text[len(said) :], "", self._make_body()
            return rest
        if self._after_call:
            text = text.lstrip()
        safe = len(text[: len(text) - measure_overlap(text, self._opening)].rstrip())
        self._give_text(text[:safe], spans)
        self._held = text[safe:]
        return ""

    def _give_text(self, text: str, spans: list[Span]) -> None:
        if self._after_call:
            text = text.lstrip()
        if text:
            spans.append(TextSpan(text=text))
            self._after_call = False

    def _take(self, given: list[Span], spans: list[Span]) -> None:
        for span in given:
            if isinstance(span, MalformedSpan):
                self._give_text(self._space, spans)
            self._after_call = not isinstance(span, MalformedSpan)
            spans.append(span)
