"""What requests ask of the text: masks for the slots of the next decode step, and strings that end it."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from forgejax.errors import EngineError, GrammarError
from forgejax.grammar import GrammarCompiler, StopWatch, TextMatcher
from forgejax.rollout.driver.job import Job
from forgejax.types import SampleRequest


class SlotMasks:
    """One row of bits for each slot, as ``draw_tokens`` takes them; those without a grammar may draw anything."""

    def __init__(self, slots: int, vocab_size: int):
        self._mask_SW = np.full((slots, -(-vocab_size // 32)), 0xFFFFFFFF, np.uint32)
        self._filled: set[int] = set()

    def fill(self, active: Mapping[int, Job]) -> tuple[NDArray[np.uint32] | None, dict[int, str]]:
        """The masks of all slots, None where no slot needs one; and the slots whose grammar has failed, with why."""
        for slot in self._filled:
            self._mask_SW[slot] = 0xFFFFFFFF
        self._filled.clear()
        failed: dict[int, str] = {}
        for slot, job in active.items():
            if job.matcher is None:
                continue
            try:
                job.matcher.fill(self._mask_SW[slot])
            except GrammarError as error:
                failed[slot] = str(error)
            self._filled.add(slot)
        # A copy, for on a CPU the device may read the very memory while the next masks are made.
        return (self._mask_SW.copy() if self._filled - failed.keys() else None), failed


async def prepare_grammar(grammars: GrammarCompiler | None, request: SampleRequest) -> None:
    """Has the request's grammar compiled, where it has one, so that the engine need not wait. Raises EngineError."""
    if request.grammar is not None:
        try:
            await _require(grammars, request).prepare(request.grammar)
        except GrammarError as error:
            raise _refuse(request, error) from error


def start_matcher(grammars: GrammarCompiler | None, request: SampleRequest) -> TextMatcher | None:
    """The matcher of the request, None where it has no grammar. Raises EngineError."""
    if request.grammar is None:
        return None
    try:
        return _require(grammars, request).start(request.grammar, request.stop_ids)
    except GrammarError as error:
        raise _refuse(request, error) from error


def start_watch(grammars: GrammarCompiler | None, request: SampleRequest) -> StopWatch | None:
    """What looks for the request's stop strings, None where it has none. Raises EngineError."""
    return _require(grammars, request).watch(request.stop_strings) if request.stop_strings else None


def _require(grammars: GrammarCompiler | None, request: SampleRequest) -> GrammarCompiler:
    if grammars is None:
        raise EngineError(
            f"request {request.request_id}: it has a grammar or stop strings, and this engine was given no tokenizer "
            "to know texts by; start scripts/serve.py with --tokenizer FOLDER, or ask without them"
        )
    return grammars


def _refuse(request: SampleRequest, error: GrammarError) -> EngineError:
    return EngineError(f"request {request.request_id}: {error}")
