"""Grammars as masks: which tokens can still lead to a text that a grammar describes. No jax, no HTTP."""

from forgejax.grammar.compiler import GrammarCompiler
from forgejax.grammar.matcher import TextMatcher

__all__ = ["GrammarCompiler", "TextMatcher"]
