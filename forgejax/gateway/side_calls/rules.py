"""Rules: which requests of a scaffold are side calls, and who answers them."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec

from forgejax.chat.messages import ChatRequest
from forgejax.errors import ConfigError
from forgejax.gateway.side_calls.patterns import TextPattern

_NAME = re.compile(r"[a-z][a-z0-9_]{0,39}")
_POLICY = "policy"
_TEXTS = ("model", "system", "prompt", "path")


@dataclass(frozen=True, kw_only=True)
class SideCallMatch:
    """What a request must be like; None matches anything, and all that is given must hold.

    ``model`` is the one that was asked for, ``system`` all system messages, ``prompt`` the last message of the user,
    ``path`` the route (``/v1/messages``): each must contain the given text, or, of one between slashes
    (``/^quota$/``), the regular expression must be found in it. ``max_tokens``: the request asks for so many at most.
    ``tools``: whether it sends any.
    """

    model: str | None = None
    system: str | None = None
    prompt: str | None = None
    path: str | None = None
    max_tokens: int | None = None
    tools: bool | None = None


@dataclass(frozen=True, kw_only=True)
class SideCall:
    """A rule. ``answer`` is ``policy``, which samples and never trains, or the text of an answer that draws no token.

    Raises ConfigError for a rule that could not be followed, or would match every request.
    """

    name: str
    match: SideCallMatch
    answer: str = _POLICY

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ConfigError(
                f"the side call {self.name!r} has no usable name: give lower-case letters, digits and _, beginning "
                "with a letter, 40 at most"
            )
        if self.match == SideCallMatch():
            names = ", ".join(field.name for field in fields(SideCallMatch))
            raise ConfigError(f"the side call {self.name} matches every request; give at least one of: {names}")
        if self.match.max_tokens is not None and self.match.max_tokens < 1:
            raise ConfigError(f"the side call {self.name} has max_tokens {self.match.max_tokens}; give at least 1")
        if not self.answer:
            raise ConfigError(f'the answer of the side call {self.name} is empty; give "policy" or a text')
        _ = self._patterns

    @property
    def canned(self) -> bool:
        """Whether the answer is given, and nothing is sampled."""
        return self.answer != _POLICY

    @property
    def reason(self) -> str:
        """Why a turn that answered it is not trained."""
        return f"side_call_{self.name}"

    def matches(self, path: str, model: object, chat: ChatRequest) -> bool:
        match = self.match
        if match.tools is not None and match.tools != bool(chat.tools):
            return False
        if match.max_tokens is not None and (chat.max_tokens is None or chat.max_tokens > match.max_tokens):
            return False
        return all(pattern.found_in(_find_text(name, path, model, chat)) for name, pattern in self._patterns.items())

    @cached_property
    def _patterns(self) -> dict[str, TextPattern]:
        given = {name: getattr(self.match, name) for name in _TEXTS}
        return {
            name: TextPattern(words, f"match.{name} of the side call {self.name}")
            for name, words in given.items()
            if words is not None
        }


class SideCallRules:
    """Rules in their order: the first that matches is followed. Raises ConfigError where two have one name."""

    def __init__(self, rules: Sequence[SideCall] = ()) -> None:
        names = [rule.name for rule in rules]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ConfigError(f"there are several side calls of the name {twice[0]}; give each its own")
        self._rules = tuple(rules)

    def find(self, path: str, model: object, chat: ChatRequest) -> SideCall | None:
        """The rule for a request, if there is one. ``path`` is its dialect's route."""
        return next((rule for rule in self._rules if rule.matches(path, model, chat)), None)


def read_side_calls(path: Path) -> tuple[SideCall, ...]:
    """The ``[[side_calls]]`` of a TOML file, which may hold anything else beside them. Raises ConfigError."""
    try:
        given = tomllib.loads(path.read_text(encoding="utf-8")).get("side_calls", [])
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as TOML: {error}") from error
    if not isinstance(given, list):
        raise ConfigError(f"{path}: side_calls is no list of tables; write each of them under [[side_calls]]")
    return tuple(_read_rule(item, f"{path}: side call {number}") for number, item in enumerate(given, start=1))


def _read_rule(given: Any, where: str) -> SideCall:
    _refuse_other_keys(given, SideCall, where)
    _refuse_other_keys(given.get("match"), SideCallMatch, f"{where}: match")
    try:
        return msgspec.convert(given, SideCall, strict=True)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{where}: {error}") from error


def _refuse_other_keys(given: Any, kind: type, where: str) -> None:
    known = [field.name for field in fields(kind)]
    if not isinstance(given, dict):
        raise ConfigError(f"{where} is {given!r}; expected a table with some of: {', '.join(known)}")
    for key in given:
        if key not in known:
            raise ConfigError(f"{where} has the unknown key {key!r}; expected some of: {', '.join(known)}")


def _find_text(name: str, path: str, model: object, chat: ChatRequest) -> str:
    if name == "path":
        return path
    if name == "model":
        return model if isinstance(model, str) else ""
    if name == "system":
        return "\n".join(message.text for message in chat.messages if message.role == "system")
    return next((message.text for message in reversed(chat.messages) if message.role == "user"), "")
