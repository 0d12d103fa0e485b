"""A call that is written as one JSON object, handed over while it is drawn."""

from __future__ import annotations

from forgejax.chat.tool_calls.base import (
    CallSpan,
    CallStart,
    CallText,
    MalformedCallError,
    Signatures,
    Span,
    read_json,
)
from forgejax.chat.tool_calls.json_scanner import JsonScanner, Member


class JsonCallReader:
    """Reads ``{"name": NAME, KEY: {...}}``, ``KEY`` being ``arguments_key``.

    The call is handed over once its name is known and its arguments have begun; an object that is none by then is none.
    """

    def __init__(self, signatures: Signatures, arguments_key: str, optional: frozenset[str] = frozenset()) -> None:
        self._signatures = signatures
        self._key = arguments_key
        self._optional = optional
        self._scanner = JsonScanner()
        self._name = ""
        self._started = False
        self._given: list[str] = []
        self._given_to = 0
        self._fault: str | None = None  # of the arguments; the object may be complete for all that
        self.text = ""
        self.problem: str | None = None

    @property
    def started(self) -> bool:
        return self._started

    @property
    def over(self) -> bool:
        """Whether nothing that follows belongs to the object: it is complete, or no object any more."""
        return self._scanner.complete or self.problem is not None

    @property
    def end(self) -> int:
        """Behind what was read of ``text``."""
        return self._scanner.at

    def push(self, text: str) -> list[Span]:
        self.text += text
        if not self.over:
            try:
                self._scanner.scan(self.text)
            except MalformedCallError as error:
                self.problem = str(error)
        return self._give()

    def finish(self, problem: str | None) -> CallSpan | str:
        """The whole call, or why there is none; ``problem`` is what is wrong beside its own text."""
        problem = self.problem or self._fault or self._check_object() or problem
        if not self._started:
            return problem or f'not an object of "name" and "{self._key}"'
        text = "".join(self._given)
        return self._signatures.judge_call(self._name, text, problem)

    def _give(self) -> list[Span]:
        arguments = self._find(self._key)
        if arguments is None or arguments.start is None or (not self._name and not self._read_name()):
            return []
        spans: list[Span] = []
        if self.text[arguments.start] == "{":
            end = self._scanner.safe if arguments.end is None else arguments.end
            piece = self.text[max(arguments.start, self._given_to) : end]
            self._given_to = max(self._given_to, end)
        elif arguments.end is not None and self._given_to == 0:
            piece = _unwrap(self.text[arguments.start : arguments.end])
            self._given_to = arguments.end
            self._fault = "arguments are not an object"
        else:
            return []
        if not self._started:
            self._started = True
            spans.append(CallStart(name=self._name))
        if piece:
            self._given.append(piece)
            spans.append(CallText(text=piece))
        return spans

    def _read_name(self) -> bool:
        member = self._find("name")
        if member is None or member.start is None or member.end is None:
            return False
        try:
            name = read_json(self.text[member.start : member.end])
        except MalformedCallError:
            return False
        self._name = name if isinstance(name, str) else ""
        return bool(self._name)

    def _find(self, key: str) -> Member | None:
        return next((member for member in self._scanner.members if member.key == key), None)

    def _check_object(self) -> str | None:
        if not self._scanner.complete:
            return None
        try:
            call = read_json(self.text[: self._scanner.at])
        except MalformedCallError as error:
            return str(error)
        fits = set(call) - self._optional == {"name", self._key}
        return None if fits else f'not an object of "name" and "{self._key}"'


def _unwrap(value: str) -> str:
    """The text in a JSON string, which may spell an object; any other value as it is."""
    try:
        read = read_json(value)
    except MalformedCallError:
        return value
    return read if isinstance(read, str) else value
