"""Requests that have an engine compile all its programs, so that nobody's request waits for it."""

from __future__ import annotations

import numpy as np

from forgejax.rollout.engine.config import EngineConfig
from forgejax.types import SampleRequest

_TOKENS = 8


def make_warm_ups(config: EngineConfig, owner: str) -> list[list[SampleRequest]]:
    """Batches to be drawn one after another, the requests of each at once: every prefill length, every number of busy
    slots that a decode program exists for. Their ids begin with ``owner``."""
    lengths = [max(1, min(bucket + 1, config.max_context - _TOKENS)) for bucket in config.prefill_buckets]
    return [
        [
            SampleRequest(
                request_id=f"{owner}-{busy}-{number}",
                prompt_ids=np.zeros(lengths[number % len(lengths)], np.int32),
                max_tokens=_TOKENS,
                purpose="probe",
                owner=owner,
            )
            for number in range(busy)
        ]
        for busy in config.decode_rows
    ]
