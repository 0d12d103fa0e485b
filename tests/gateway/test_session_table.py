"""Who may ask: keys, closed sessions, and what is kept of them."""

from __future__ import annotations

import gc
import weakref

import pytest

from forgejax.chat import ChatFormat
from forgejax.errors import GatewayError
from forgejax.types import Sessions
from tests.gateway.asking import status_of
from tests.gateway.fakes import TRAINING, ScriptedSampler, started


async def test_only_a_sessions_key_opens_the_door(chat_format: ChatFormat) -> None:
    gateway = await started(ScriptedSampler(chat_format, "5<|im_end|>"))
    session = gateway.open(TRAINING)
    assert await status_of(session, None) == (401, "invalid_api_key")
    assert await status_of(session, "sk-other") == (401, "invalid_api_key")
    assert (await status_of(session, session.api_key))[0] == 200
    await gateway.stop()


async def test_keys_are_long_and_never_repeat(chat_format: ChatFormat) -> None:
    gateway = await started(ScriptedSampler(chat_format))
    door: Sessions = gateway
    sessions = [door.open(TRAINING) for _ in range(20)]
    assert len({s.api_key for s in sessions}) == len({s.id for s in sessions}) == 20
    assert min(len(s.api_key) for s in sessions) >= 36
    await gateway.stop()


async def test_anonymous_requests_are_served_only_where_allowed_and_never_recorded(chat_format: ChatFormat) -> None:
    sampler = ScriptedSampler(chat_format, "5<|im_end|>")
    gateway = await started(sampler, allow_anonymous=True)
    session = gateway.open(TRAINING)
    assert (await status_of(session, None))[0] == 200
    assert sampler.requests[0].purpose == "evaluation"
    assert await gateway.close(session.id) == ()
    await gateway.stop()


async def test_a_closed_session_answers_410_and_closes_again_with_the_same_turns(chat_format: ChatFormat) -> None:
    gateway = await started(ScriptedSampler(chat_format, "5<|im_end|>"))
    session = gateway.open(TRAINING)
    await status_of(session, session.api_key)
    turns = await gateway.close(session.id)
    assert len(turns) == 1 and await gateway.close(session.id) is turns
    assert await status_of(session, session.api_key) == (410, "session_closed")
    with pytest.raises(GatewayError, match="no session nobody"):
        await gateway.close("nobody")
    await gateway.stop()


async def test_what_is_kept_of_closed_sessions_is_bounded_and_late_requests_are_still_told(
    chat_format: ChatFormat,
) -> None:
    gateway = await started(ScriptedSampler(chat_format, "5<|im_end|>"))
    first = gateway.open(TRAINING)
    await status_of(first, first.api_key)
    turns = [weakref.ref(turn) for turn in await gateway.close(first.id)]
    for _ in range(64):
        await gateway.close(gateway.open(TRAINING).id)
    gc.collect()
    assert [turn() for turn in turns] == [None]
    with pytest.raises(GatewayError, match="closed long ago"):
        await gateway.close(first.id)
    assert await status_of(first, first.api_key) == (410, "session_closed")
    await gateway.stop()
