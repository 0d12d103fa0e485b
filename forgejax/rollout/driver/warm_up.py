"""Requests that have an engine compile all its programs, so that nobody's request waits for it."""

from __future__ import annotations

import numpy as np

from forgejax.rollout.engine.config import EngineConfig
from forgejax.types import Grammar, SampleRequest

_TOKENS = 8
_LONG_TEXT = Grammar(schema='{"type": "string", "minLength": 1000}')


def make_warm_ups(config: EngineConfig, owner: str, *, grammars: bool = False) -> list[list[SampleRequest]]:
    """Batches to be drawn one after another, the requests of each at once: every prefill length, every number of busy
    slots that a decode program exists for; with ``grammars`` those under masks as well. Their ids begin with
    ``owner``."""
    # Zeros are drafts of zeros: with speculation the first two steps check some, whatever comes of it; under masks too,
    # for a request without a grammar is beside one with.
    tokens = _TOKENS + (2 * (config.draft_tokens + 1) if config.speculates else 0)
    lengths = [max(1, min(bucket + 1, config.max_context - tokens)) for bucket in config.prefill_buckets]
    return [
        [
            SampleRequest(
                request_id=f"{owner}-{busy}-{number}{'' if grammar is None else '-grammar'}",
                prompt_ids=np.zeros(lengths[number % len(lengths)], np.int32),
                max_tokens=tokens,
                grammar=None if config.speculates and number % 2 else grammar,
                stop_ids=frozenset() if grammar is None else frozenset({0}),
                purpose="probe",
                owner=owner,
            )
            for number in range(busy)
        ]
        for grammar in ((None, _LONG_TEXT) if grammars else (None,))
        for busy in config.decode_rows
    ]
