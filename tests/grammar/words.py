"""A vocabulary of single bytes and a few longer words, for grammars to be followed in."""

from __future__ import annotations

import numpy as np

from forgejax.grammar import GrammarCompiler, TextMatcher

END = 256
WORDS = [*(bytes([byte]) for byte in range(256)), b"", b'{"', b'":', b"</think>", b"<think>", b"true", b"  ", b'>{"']
COMPILER = GrammarCompiler(WORDS)


def list_allowed(matcher: TextMatcher) -> set[int]:
    """The tokens that may be drawn next."""
    words = np.zeros(len(WORDS) // 32 + 3, np.uint32)
    matcher.fill(words)
    bits = np.unpackbits(words.view(np.uint8), bitorder="little")
    return set(np.flatnonzero(bits).tolist())


def spell(*words: bytes) -> set[int]:
    return {WORDS.index(word) for word in words}
