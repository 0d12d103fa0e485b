"""Texts that a rule looks for: as they are, or as a regular expression that cannot hold anything up."""

from __future__ import annotations

import logging

import regex

from forgejax.errors import ConfigError

_log = logging.getLogger(__name__)
_LONGEST = 500  # characters of an expression
_TRIAL_S = 0.05
_SEARCH_S = 0.02
_SEARCHED = 50_000  # characters of a text
_TRIAL_LENGTH = 4000


class TextPattern:
    """``words``: a text that must be contained, or a regular expression between slashes, which must be found.

    A search of an expression ends after 20 ms, in the first 50,000 characters: what was not found by then is not there.
    Raises ConfigError, which names ``where`` the words stand, for an expression that cannot be used.
    """

    def __init__(self, words: str, where: str) -> None:
        self._words, self._where = words, where
        self._regex = None
        if not words:
            raise ConfigError(f"{where} is empty; give a text, or leave it out")
        if len(words) > 2 and words[0] == words[-1] == "/":
            self._regex = _compile(words[1:-1], where)

    def found_in(self, text: str) -> bool:
        if self._regex is None:
            return self._words in text
        try:
            return self._regex.search(text[:_SEARCHED], timeout=_SEARCH_S) is not None
        except TimeoutError:
            _log.warning("%s took longer than %g s on a request, which it does not match", self._where, _SEARCH_S)
            return False


def _compile(expression: str, where: str) -> regex.Pattern:
    if len(expression) > _LONGEST:
        raise ConfigError(f"{where} is a regular expression of {len(expression)} characters; give at most {_LONGEST}")
    try:
        compiled = regex.compile(expression)
    except (regex.error, ValueError, RecursionError, OverflowError) as error:
        raise ConfigError(f"{where} is no regular expression: /{expression}/: {error}; correct it") from error
    literal = "".join(character for character in expression if character.isalnum() or character in " _-") or "a"
    trials = {character * _TRIAL_LENGTH + "\n\0" for character in {*literal, "a", "0", " "}}
    for text in (*trials, literal * (_TRIAL_LENGTH // len(literal)) + "\n\0"):
        try:
            compiled.search(text, timeout=_TRIAL_S)
        except TimeoutError as error:
            raise ConfigError(
                f"{where} takes too long on a text of {_TRIAL_LENGTH} characters: /{expression}/; write it without "
                "repeats inside repeats, or give a plain text"
            ) from error
    return compiled
