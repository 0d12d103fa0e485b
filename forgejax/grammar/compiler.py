"""Grammars compiled for one vocabulary, each once, in threads of their own and within limits."""

from __future__ import annotations

import asyncio
import re
import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

from forgejax.errors import GrammarError
from forgejax.grammar.matcher import TextMatcher
from forgejax.grammar.schema import read_schema
from forgejax.grammar.spelling import spell_lark
from forgejax.grammar.stops import StopWatch
from forgejax.types import Grammar

COMPILE_S = 10.0
_KEPT = 64
_THREADS = 2  # one hostile schema does not keep the others waiting
# Lexer states take 1 to 2 kB each; a row holds an item for each property that may come next.
_LIMITS = LLParserLimits(max_lexer_states=50_000, max_items_in_row=20_000, verbose_errors=False)
_PROBLEM = re.compile(r'failed to (?:compile JSON schema|parse "%json"): (.*?)(?=\n\s+\d+ \| |\Z)', re.DOTALL)


class GrammarCompiler:
    """Makes matchers for one vocabulary. Any thread may call; compiling lets go of Python's lock.

    ``vocabulary[t]`` are the bytes that token t stands for, empty where it is no text: such a token never fits. Making
    a compiler takes a second for a vocabulary of 150,000.
    """

    def __init__(self, vocabulary: Sequence[bytes]):
        self._vocabulary = vocabulary
        self._tokenizer = LLTokenizer(TokenizerWrapper(_Words(vocabulary)), slices=LLTokenizer.json_slices())
        self._threads = ThreadPoolExecutor(_THREADS, "grammars")
        self._lock = threading.Lock()
        self._compiled: OrderedDict[Grammar, Future[LLMatcher]] = OrderedDict()  # the least recently used first

    async def prepare(self, grammar: Grammar) -> None:
        """Returns once ``start`` need not wait. Raises GrammarError where the grammar cannot be compiled, in words for
        whoever wrote the schema, or not within ``COMPILE_S``."""
        compiled = asyncio.wrap_future(self._find(grammar))
        compiled.add_done_callback(lambda done: done.cancelled() or done.exception())  # nobody may be left to ask
        done, _ = await asyncio.wait({compiled}, timeout=COMPILE_S)
        if not done:
            raise _refuse_slow()
        compiled.result()

    def start(self, grammar: Grammar, stop_ids: frozenset[int]) -> TextMatcher:
        """A matcher at the beginning of a text. Compiles where ``prepare`` was not called; raises what it raises."""
        try:
            compiled = self._find(grammar).result(COMPILE_S)
        except FutureTimeoutError as error:
            raise _refuse_slow() from error
        return TextMatcher(compiled.deep_copy(), stop_ids, len(self._vocabulary))

    def watch(self, stops: Sequence[str]) -> StopWatch:
        """Looks for these strings from the beginning of a text on."""
        return StopWatch(self._vocabulary, stops)

    def _find(self, grammar: Grammar) -> Future[LLMatcher]:
        """The compiled grammar, or what became of it, now or later."""
        with self._lock:
            found = self._compiled.pop(grammar, None) or self._threads.submit(self._compile, grammar)
            self._compiled[grammar] = found
            if len(self._compiled) > _KEPT:
                self._compiled.popitem(last=False)
        return found

    def _compile(self, grammar: Grammar) -> LLMatcher:
        lark = spell_lark(grammar, read_schema(grammar.schema))
        compiled = LLMatcher(self._tokenizer, LLMatcher.grammar_from_lark(lark), log_level=0, limits=_LIMITS)
        tried = compiled.deep_copy()  # what is too large, or no text at all, often shows at the first token only
        if tried.compute_bitmask().strip(b"\0") and not tried.is_error():
            return compiled
        error = tried.get_error() or "no text fits it"
        problem = _PROBLEM.search(error)
        words = (error if problem is None else problem[1]).strip()
        raise GrammarError(f"the schema cannot be served: {words[:300]}; leave that out or say it in another way")


class _Words:
    """A vocabulary as llguidance asks for one; its end of text lies behind the last token."""

    bos_token_id = None

    def __init__(self, vocabulary: Sequence[bytes]):
        self.tokens = [*vocabulary, b"<end of text>"]
        self.eos_token_id = len(vocabulary)
        self.special_token_ids = [len(vocabulary)]

    def __call__(self, text: bytes | str) -> list[int]:
        """Asked for where texts are forced, which they never are here."""
        return []


def _refuse_slow() -> GrammarError:
    return GrammarError(f"the schema was not compiled within {COMPILE_S:g} s; make it smaller")
