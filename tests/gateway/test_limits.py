"""What a session may have, and all of them together: figures first, then as agents hear it."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import aiohttp
import anthropic
import openai
import pytest

from forgejax.chat import ChatFormat
from forgejax.chat.messages import ChatRequest, Message
from forgejax.errors import ConfigError, OverloadedError
from forgejax.gateway.limits import BudgetConfig, Limits, LimitsConfig
from forgejax.gateway.metrics import GatewayMetrics
from forgejax.gateway.refusals import RefusedError
from forgejax.types import Completion, OnTokens, SampleRequest, Session
from tests.chat.tokenizers import CALCULATOR
from tests.gateway.asking import GOOD, USER, ask_messages, client, status_of, until
from tests.gateway.fakes import TRAINING, ScriptedSampler, started

ROOMY = BudgetConfig(requests=9, requests_per_minute=9_000, arriving_bytes=9_000, stored_bytes=9_000)


def small(**limits: int) -> BudgetConfig:
    return BudgetConfig(**{name: getattr(ROOMY, name) for name in ROOMY.__dataclass_fields__} | limits)


class Clock:
    now = 50.0

    def __call__(self) -> float:
        return self.now


def make_limits(clock: Clock, session: BudgetConfig = ROOMY, total: BudgetConfig = ROOMY) -> Limits:
    return Limits(LimitsConfig(session=session, total=total), GatewayMetrics(), clock)


def test_a_rate_allows_a_burst_of_a_minutes_requests_and_then_one_as_each_is_due() -> None:
    clock = Clock()
    limits = make_limits(clock, small(requests_per_minute=30))
    one, other = limits.make_budget("one"), limits.make_budget("other")
    for _ in range(30):
        with limits.admit(one, 10):
            pass
    with pytest.raises(RefusedError, match="30 requests a minute") as refused, limits.admit(one, 10):
        pass
    assert (refused.value.status, refused.value.retry_after_s) == (429, 2.0)
    with limits.admit(other, 10):
        clock.now += 1.5
    with pytest.raises(RefusedError) as refused, limits.admit(one, 10):
        pass
    assert refused.value.retry_after_s == pytest.approx(0.5)
    clock.now += 0.5
    with limits.admit(one, 10):
        clock.now += 3600.0
    for _ in range(30):  # an hour saves up no more than a minute
        with limits.admit(one, 10):
            pass
    with pytest.raises(RefusedError), limits.admit(one, 10):
        pass


def test_requests_at_once_and_the_bytes_of_their_bodies_are_bounded_and_given_back() -> None:
    limits = make_limits(Clock(), small(requests=2, arriving_bytes=100))
    budget = limits.make_budget("one")
    with (
        limits.admit(budget, 500),
        pytest.raises(RefusedError, match="100 bytes of requests at once"),
    ):  # alone it is let in
        limits.admit(budget, 1).__enter__()
    with limits.admit(budget, 50), limits.admit(budget, 50):
        with pytest.raises(RefusedError, match="2 requests at once") as refused, limits.admit(budget, 0):
            pass
        assert (refused.value.status, refused.value.code, refused.value.retry_after_s) == (
            429,
            "rate_limit_exceeded",
            1,
        )
    assert (budget.requests, budget.arriving_bytes) == (0, 0)


def test_all_together_are_overloaded_while_no_one_alone_is_at_fault() -> None:
    limits = make_limits(Clock(), total=small(requests=2, stored_bytes=1000))
    one, other = limits.make_budget("one"), limits.make_budget("other")
    with limits.admit(one, 1), limits.admit(other, 1), pytest.raises(RefusedError, match="overloaded") as refused:
        limits.admit(one, 1).__enter__()
    assert (refused.value.status, refused.value.code, refused.value.retry_after_s) == (503, "overloaded", 1)
    limits.store(one, 700)
    limits.store(other, 300)
    with pytest.raises(RefusedError, match="overloaded") as refused, limits.admit(one, 1):
        pass
    assert refused.value.retry_after_s == 20
    limits.release(other)
    limits.release(other)
    with limits.admit(one, 1):
        pass


def test_a_request_has_so_many_messages_and_tools_at_most() -> None:
    limits = Limits(LimitsConfig(messages=2, tools=1), GatewayMetrics(), Clock())
    said = Message.of_text("user", "?")
    limits.check_request(ChatRequest(messages=(said, said), tools=(CALCULATOR,)))
    with pytest.raises(RefusedError, match="messages has 3 entries; send at most 2") as refused:
        limits.check_request(ChatRequest(messages=(said, said, said)))
    assert (refused.value.status, refused.value.code) == (400, "too_many_messages")
    with pytest.raises(RefusedError, match="tools has 2 entries; send at most 1"):
        limits.check_request(ChatRequest(messages=(said,), tools=(CALCULATOR, CALCULATOR)))


def test_limits_below_one_are_refused() -> None:
    with pytest.raises(ConfigError, match="messages is 0"):
        LimitsConfig(messages=0)
    with pytest.raises(ConfigError, match="stored_bytes is -1"):
        small(stored_bytes=-1)


def anthropic_client(session: Session, **options: Any) -> anthropic.AsyncAnthropic:
    url = session.base_url.removesuffix("/v1")
    return anthropic.AsyncAnthropic(base_url=url, api_key=session.api_key, **{"max_retries": 0} | options)


class Busy(ScriptedSampler):
    """Has no room the first ``refusals`` times."""

    refusals = 0

    async def sample(self, request: SampleRequest, on_tokens: OnTokens | None = None) -> Completion:
        if self.refusals:
            self.refusals -= 1
            raise OverloadedError("9 requests are waiting already")
        return await super().sample(request, on_tokens)


async def test_an_engine_without_room_is_each_vendors_overload_and_their_clients_ask_again(
    chat_format: ChatFormat,
) -> None:
    sampler = Busy(chat_format, *["5<|im_end|>"] * 4)
    gateway = await started(sampler)
    session = gateway.open(TRAINING)
    sampler.refusals = 3
    async with client(session) as agent, anthropic_client(session) as claude:
        with pytest.raises(openai.InternalServerError, match="the engine is overloaded") as refused:
            await agent.chat.completions.create(model="m", messages=[USER])
        with pytest.raises(openai.InternalServerError, match="the engine is overloaded"):
            await agent.responses.create(model="m", input="?", stream=True)
        with pytest.raises(anthropic.APIStatusError, match="overloaded_error") as heard:
            await claude.messages.create(model="m", messages=[USER], max_tokens=9)
        assert (refused.value.status_code, refused.value.code, heard.value.status_code) == (503, "overloaded", 529)
        assert refused.value.response.headers["retry-after"] == heard.value.response.headers["retry-after"] == "2"
        sampler.refusals = 1
        again = agent.with_options(max_retries=1)
        answer = await again.chat.completions.create(model="m", messages=[USER])
    turns = await gateway.close(session.id)
    await gateway.stop()
    assert answer.choices[0].message.content == "5"
    assert [turn.completion for turn in turns] == sampler.returned


async def test_clients_know_a_rate_limit_and_wait_for_it_as_they_are_told(chat_format: ChatFormat) -> None:
    limits = LimitsConfig(session=small(requests_per_minute=60))
    gateway = await started(ScriptedSampler(chat_format, "5<|im_end|>"), limits=limits)
    session = gateway.open(TRAINING)
    budget = gateway._sessions._by_id[session.id].budget
    async with client(session) as agent, anthropic_client(session) as claude:
        budget._left = 0.0  # as after a minute's requests
        with pytest.raises(openai.RateLimitError, match="60 requests a minute") as refused:
            await agent.responses.create(model="m", input="?")
        budget._left = 0.0
        with pytest.raises(anthropic.RateLimitError, match="rate_limit_error") as heard:
            await claude.messages.count_tokens(model="m", messages=[USER])
        assert refused.value.response.headers["retry-after"] == heard.value.response.headers["retry-after"] == "1"
        budget._left = 0.0
        answer = await agent.with_options(max_retries=1).responses.create(model="m", input="?")
    counts = gateway.metrics.counts()
    await gateway.stop()
    assert answer.output_text == "5"
    assert counts["limited_session_requests_per_minute"] == 3


async def test_a_session_that_has_stored_its_share_is_told_so_and_another_is_not(
    chat_format: ChatFormat, caplog: pytest.LogCaptureFixture
) -> None:
    limits = LimitsConfig(session=small(stored_bytes=50))
    gateway = await started(ScriptedSampler(chat_format, *["5<|im_end|>"] * 3), limits=limits)
    session, other = gateway.open(TRAINING), gateway.open(TRAINING)
    assert (await status_of(session, session.api_key))[0] == 200
    assert await status_of(session, session.api_key) == (413, "session_full")
    assert (await ask_messages(session, **GOOD))[1]["error"]["type"] == "request_too_large"
    assert (await status_of(other, other.api_key))[0] == 200
    assert caplog.text.count(f"session {session.id} of task unnamed: gateway.limits session.stored_bytes") == 1
    total = gateway._service.limits._total
    assert total.stored_bytes >= 100
    await gateway.stop()
    assert total.stored_bytes == 0


async def test_a_request_counts_until_its_stream_has_ended(chat_format: ChatFormat) -> None:
    sampler = ScriptedSampler(chat_format, "a b c d e f g<|im_end|>", "5<|im_end|>", delay_s=0.02)
    gateway = await started(sampler, limits=LimitsConfig(session=small(requests=1)))
    session = gateway.open(TRAINING)
    headers = {"x-api-key": session.api_key}
    async with aiohttp.ClientSession(headers=headers) as http:
        async with http.post(f"{session.base_url}/messages", json={**GOOD, "stream": True}) as stream:
            await stream.content.readline()
            assert await status_of(session, session.api_key) == (429, "rate_limit_exceeded")
            await stream.read()
        await until(lambda: gateway._service.limits._total.requests == 0)
        assert (await status_of(session, session.api_key))[0] == 200
    await gateway.stop()


async def test_more_messages_or_tools_than_allowed_are_a_400_in_every_dialect(chat_format: ChatFormat) -> None:
    gateway = await started(ScriptedSampler(chat_format), limits=LimitsConfig(messages=1, tools=1))
    key = gateway.open(TRAINING).api_key
    several = {"messages": [USER, USER], "input": [USER, USER]}
    async with aiohttp.ClientSession(headers={"x-api-key": key}) as http:
        for path in ("chat/completions", "responses", "messages", "messages/count_tokens", "responses/input_tokens"):
            async with http.post(f"{gateway.url}/v1/{path}", json=several) as response:
                body = await response.json()
                assert response.status == 400 and "messages has 2 entries; send at most 1" in body["error"]["message"]
    await gateway.stop()


async def test_a_body_too_large_is_a_413_that_both_vendors_clients_know(chat_format: ChatFormat) -> None:
    gateway = await started(ScriptedSampler(chat_format), limits=LimitsConfig(body_bytes=200))
    session = gateway.open(TRAINING)
    long: Any = {"role": "user", "content": "x" * 300}
    async with client(session) as agent, anthropic_client(session) as claude:
        with pytest.raises(openai.APIStatusError, match="more than 200 bytes") as refused:
            await agent.chat.completions.create(model="m", messages=[long])
        with pytest.raises(anthropic.APIStatusError, match="request_too_large") as heard:
            await claude.messages.create(model="m", messages=[long], max_tokens=9)
    await gateway.stop()
    assert (refused.value.status_code, heard.value.status_code) == (413, 413)


async def test_past_its_deadline_a_key_opens_nothing_and_open_requests_end_with_their_tokens_recorded(
    chat_format: ChatFormat,
) -> None:
    sampler = ScriptedSampler(chat_format, list(chat_format.codec.encode("x")) * 500, delay_s=0.005)
    gateway = await started(sampler)
    session = gateway.open(type(TRAINING)(deadline_s=0.2, task_id="sum-3"))
    status, code = await status_of(session, session.api_key)
    assert (status, code) == (410, "session_expired")
    assert await status_of(session, session.api_key) == (410, "session_expired")
    async with client(session) as agent, anthropic_client(session, max_retries=3) as claude:
        with pytest.raises(openai.APIStatusError, match="deadline has passed"):
            await agent.with_options(max_retries=3).responses.create(model="m", input="?")
        with pytest.raises(anthropic.APIStatusError, match="permission_error"):
            await claude.messages.create(model="m", messages=[USER], max_tokens=9)
    assert gateway.metrics.counts()["requests_responses_410"] == 1, "no client asks again"
    (turn,) = await gateway.close(session.id)
    await gateway.stop()
    assert [turn.completion] == sampler.returned and turn.untrainable == "cancelled"
    assert len(turn.completion.token_ids) > 0


async def test_a_deadline_that_has_not_passed_leaves_nothing_behind(chat_format: ChatFormat) -> None:
    gateway = await started(ScriptedSampler(chat_format, "5<|im_end|>"))
    session = gateway.open(type(TRAINING)(deadline_s=60.0))
    assert (await status_of(session, session.api_key))[0] == 200
    assert len(await gateway.close(session.id)) == 1
    await gateway.stop()
    waiting = getattr(asyncio.get_running_loop(), "_scheduled", [])
    assert [handle for handle in waiting if not handle.cancelled() and "_expire" in repr(handle)] == []


async def test_what_an_anonymous_request_leaves_counts_for_nobody(chat_format: ChatFormat) -> None:
    gateway = await started(ScriptedSampler(chat_format, "5<|im_end|>"), allow_anonymous=True)
    async with aiohttp.request("POST", f"{gateway.url}/v1/responses", data=json.dumps({"input": "?"})) as response:
        assert response.status == 200
    assert gateway._service.limits._total.stored_bytes == 0
    await gateway.stop()


async def test_more_messages_or_items_than_allowed_are_refused_before_they_are_read(chat_format: ChatFormat) -> None:
    gateway = await started(ScriptedSampler(chat_format), limits=LimitsConfig(messages=3, tools=2))
    session = gateway.open(TRAINING)
    async with aiohttp.ClientSession(headers={"x-api-key": session.api_key}) as http:
        for path, field, count in (
            ("chat/completions", "messages", 4),
            ("messages", "messages", 4),
            ("messages/count_tokens", "messages", 4),
            ("responses", "input", 4),
            ("responses", "tools", 3),
        ):
            async with http.post(f"{gateway.url}/v1/{path}", json={field: [5] * count}) as response:
                said = (await response.json())["error"]["message"]
                assert response.status == 400 and said.startswith(f"{field} has {count} entries; send at most"), path
    await gateway.close(session.id)
    await gateway.stop()
