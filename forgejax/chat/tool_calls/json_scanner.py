"""A JSON object read while it is drawn: where its members lie, where it ends, and the first character that is wrong."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from forgejax.chat.tool_calls.base import MalformedCallError

_PLAIN = re.compile(r'[^"\\\x00-\x1f]+')
_SPACE = re.compile(r"[ \t\n\r]*")
_SCALAR = re.compile(r"[-+.0-9A-Za-z]*")
_WHOLE_SCALAR = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][-+]?[0-9]+)?|true|false|null")

Expected = Literal["object", "value", "value or end", "key", "key or end", "colon", "comma or end"]


@dataclass(kw_only=True)
class Member:
    """A member of the outermost object; its value lies from ``start`` to ``end``, None where not known yet."""

    key: str
    start: int | None = None
    end: int | None = None


class JsonScanner:
    """Scans one text that grows. ``at`` is behind what is known to be the beginning of a JSON object."""

    def __init__(self) -> None:
        self.at = 0
        self.members: list[Member] = []
        self._stack: list[str] = []
        self._expected: Expected = "object"
        self._string: Literal["key", "value"] | None = None
        self._begin = 0  # of the open string or scalar
        self._escape = 0  # characters an open escape still needs
        self._escape_at = 0
        self._scalar = False
        self.complete = False

    @property
    def safe(self) -> int:
        """Up to here the text is the beginning of a JSON object whatever follows: no half escape, no half scalar."""
        if self._scalar:
            return self._begin
        return self._escape_at if self._escape else self.at

    def scan(self, text: str) -> None:
        """Goes on in ``text``, which begins with all that was scanned before. Raises MalformedCallError."""
        while self.at < len(text) and not self.complete:
            if self._string is not None:
                self._scan_string(text)
            elif self._scalar:
                self._scan_scalar(text)
            else:
                self._scan_structure(text)

    def _scan_string(self, text: str) -> None:
        character = text[self.at]
        if self._escape:
            self._scan_escape(character)
        elif plain := _PLAIN.match(text, self.at):
            self.at = plain.end()
            return
        elif character == "\\":
            self._escape, self._escape_at = 1, self.at
        elif character == '"':
            kind, self._string = self._string, None
            self.at += 1
            if kind == "value":
                self._end_value()
                return
            if len(self._stack) == 1:
                self.members.append(Member(key=text[self._begin + 1 : self.at - 1]))
            self._expected = "colon"
            return
        else:
            raise MalformedCallError(f"not JSON: {character!r} in a string, where it must be escaped")
        self.at += 1

    def _scan_escape(self, character: str) -> None:
        first = self.at == self._escape_at + 1
        if first and character == "u":
            self._escape = 4
        elif (first and character in '"\\/bfnrt') or (not first and character in "0123456789abcdefABCDEF"):
            self._escape -= 1
        else:
            raise MalformedCallError(f"not JSON: the escape ends in {character!r}")

    def _scan_scalar(self, text: str) -> None:
        found = _SCALAR.match(text, self.at)
        self.at = found.end() if found else self.at
        if self.at == len(text):
            return
        scalar = text[self._begin : self.at]
        if _WHOLE_SCALAR.fullmatch(scalar) is None:
            self.at = self._begin
            raise MalformedCallError(f"not JSON: {scalar[:40]!r}")
        self._scalar = False
        self._end_value()

    def _scan_structure(self, text: str) -> None:
        space = _SPACE.match(text, self.at)
        self.at = space.end() if space else self.at
        if self.at == len(text):
            return
        character = text[self.at]
        if self._expected in ("value", "value or end", "object") and not (
            character == "]" and self._expected == "value or end"
        ):
            self._begin_value(character)
        elif character == '"' and self._expected in ("key", "key or end"):
            self._string, self._begin = "key", self.at
        elif character == ":" and self._expected == "colon":
            self._expected = "value"
        elif character == "," and self._expected == "comma or end":
            self._expected = "key" if self._stack[-1] == "{" else "value"
        elif (
            character in "}]" and self._expected.endswith("end") and self._stack[-1] == {"}": "{", "]": "["}[character]
        ):
            self._stack.pop()
            self.at += 1
            self._end_value()
            return
        else:
            raise MalformedCallError(f"not JSON: {character!r} where a {self._expected} belongs")
        self.at += 1

    def _begin_value(self, character: str) -> None:
        if self._expected == "object" and character != "{":
            raise MalformedCallError(f"not JSON: {character!r} where an object belongs")
        if len(self._stack) == 1:
            self.members[-1].start = self.at
        if character in "{[":
            self._stack.append(character)
            self._expected = "key or end" if character == "{" else "value or end"
        elif character == '"':
            self._string, self._begin = "value", self.at
        elif _SCALAR.fullmatch(character):
            self._scalar, self._begin = True, self.at
        else:
            raise MalformedCallError(f"not JSON: {character!r} where a value belongs")

    def _end_value(self) -> None:
        """A value ends before ``at``."""
        if len(self._stack) == 1:
            self.members[-1].end = self.at
        self.complete = not self._stack
        self._expected = "comma or end"
