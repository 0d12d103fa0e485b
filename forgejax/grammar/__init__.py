"""Texts by their tokens: which can still lead to one that a grammar describes, which ends one. No jax, no HTTP."""

from forgejax.grammar.compiler import GrammarCompiler
from forgejax.grammar.matcher import TextMatcher
from forgejax.grammar.stops import StopWatch

__all__ = ["GrammarCompiler", "StopWatch", "TextMatcher"]
