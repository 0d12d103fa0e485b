"""A wire format of a few lines, played through the real gateway: what a dialect says is all that a dialect is."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import aiohttp
import pytest

from forgejax.chat import ChatFormat
from forgejax.chat.messages import ChatRequest, Message
from forgejax.chat.reply import Delta, PartEnd, Reply, TextDelta
from forgejax.gateway.dialects import DIALECTS
from forgejax.gateway.dialects.base import AskingSession, Event, Page, ParsedRequest, ReplyHead, Route, find_bearer
from forgejax.gateway.limits import LimitsConfig
from forgejax.gateway.memory import ReplyMemory
from forgejax.gateway.refusals import RefusedError, refuse_field
from forgejax.types import SamplingLaw, Session
from tests.gateway.fakes import TRAINING, ScriptedSampler, started


class Telegram:
    """``{"say": TEXT, "after": ID, "live": BOOL}``: only what is new is sent, the rest is remembered."""

    name = "telegram"
    routes = (Route(path="/telegram"), Route(method="PUT", path="/telegram/wire"))
    credential_form = "X-Stamp: KEY"
    statuses: Mapping[str, int] = {}
    streamed_failures = frozenset({"context_length_exceeded"})

    @property
    def pages(self) -> Sequence[Page]:
        return (Page(method="GET", path="/telegram/{id}/copy", answer=copy_telegram),)

    def credential(self, headers: Mapping[str, str]) -> str | None:
        return headers.get("X-Stamp")

    def reply_id(self, request_id: str) -> str:
        return f"tg/{request_id}"

    def parse(self, body: Mapping[str, Any], memory: ReplyMemory) -> ParsedRequest:
        before: tuple[Message, ...] = ()
        if "after" in body:
            stored = memory.recall(body["after"])
            if stored is None:
                raise refuse_field("after", body["after"], "the id of a telegram of this session")
            before = stored.messages
        chat = ChatRequest(messages=(*before, Message.of_text("user", body["say"])), law=SamplingLaw())
        return ParsedRequest(chat=chat, stream=body.get("live", False), keep=body.get("keep", True), body=body)

    def response(self, head: ReplyHead, request: ParsedRequest, reply: Reply) -> Mapping[str, Any]:
        return {"telegram": head.id, "says": reply.message.text, "asked": request.body["say"], "stop": reply.finish}

    def stream(self, head: ReplyHead, request: ParsedRequest) -> TelegramStream:
        return TelegramStream(head)

    def error(self, refusal: RefusedError) -> Mapping[str, Any]:
        return {"undelivered": refusal.code, "why": refusal.message}


async def copy_telegram(session: AskingSession, body: Mapping[str, Any], names: Mapping[str, str]) -> Mapping[str, Any]:
    stored = session.memory.recall(names["id"].replace("-", "/", 1))
    if stored is None:
        raise RefusedError(404, f"there is no telegram {names['id']}", code="not_found")
    return {"copy of": stored.body, "costs": await session.count_tokens(ChatRequest(messages=stored.messages))}


class TelegramStream:
    def __init__(self, head: ReplyHead) -> None:
        self._head = head

    def start(self) -> Sequence[Event]:
        return [("begin", self._head.id)]

    def delta(self, delta: Delta) -> Sequence[Event]:
        if isinstance(delta, PartEnd):
            return []
        assert isinstance(delta, TextDelta)
        return [("word", json.dumps([delta.part, delta.text]))]

    def end(self, reply: Reply) -> Sequence[Event]:
        return [("end", reply.finish)]

    def error(self, refusal: RefusedError) -> Sequence[Event]:
        return [("undelivered", str(refusal.code))]


async def send(
    url: str, key: str | None, body: bytes | dict[str, Any], method: str = "POST", path: str = "/telegram"
) -> tuple[int, Any]:
    headers = {} if key is None else {"x-stamp": key}
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    async with aiohttp.request(method, url + path, data=data, headers=headers) as response:
        text = await response.text()
        return response.status, text if response.content_type == "text/event-stream" else json.loads(text)


def host(session: Session) -> str:
    return session.base_url.removesuffix("/v1")


@pytest.mark.parametrize(("method", "path"), [("POST", "/telegram"), ("PUT", "/telegram/wire")])
async def test_a_dialect_of_its_own_is_answered_in_its_own_words_on_each_of_its_routes(
    chat_format: ChatFormat, method: str, path: str
) -> None:
    gateway = await started(ScriptedSampler(chat_format, "It is 5.<|im_end|>"), dialects=(*DIALECTS, Telegram()))
    session = gateway.open(TRAINING)
    answer = await send(host(session), session.api_key, {"say": "2+3?"}, method, path)
    (turn,) = await gateway.close(session.id)
    page = gateway.metrics.text().decode()
    await gateway.stop()
    assert answer == (
        200,
        {"telegram": f"tg/{session.id}-0", "says": "It is 5.", "asked": "2+3?", "stop": "stop"},
    )
    assert turn.completion.prompt_ids.tolist() == chat_format.render([{"role": "user", "content": "2+3?"}])
    assert 'forgejax_gateway_requests_total{dialect="telegram",status="200"} 1.0' in page


async def test_a_dialect_of_its_own_is_streamed_in_its_own_events(chat_format: ChatFormat) -> None:
    gateway = await started(ScriptedSampler(chat_format, "ab<|im_end|>"), dialects=(Telegram(),))
    session = gateway.open(TRAINING)
    status, events = await send(host(session), session.api_key, {"say": "?", "live": True})
    await gateway.stop()
    assert status == 200
    assert events == (
        f"event: begin\ndata: tg/{session.id}-0\n\n"
        'event: word\ndata: [0, "a"]\n\nevent: word\ndata: [0, "b"]\n\n'
        "event: end\ndata: stop\n\n"
    )


@pytest.mark.parametrize("live", [False, True])
async def test_what_a_dialect_asks_to_keep_the_session_remembers_and_no_other_session_knows(
    chat_format: ChatFormat, live: bool
) -> None:
    sampler = ScriptedSampler(chat_format, "five<|im_end|>", "seven<|im_end|>", "eight<|im_end|>")
    gateway = await started(sampler, dialects=(Telegram(),))
    session, other = gateway.open(TRAINING), gateway.open(TRAINING)
    await send(host(session), session.api_key, {"say": "2+3?", "live": live})
    following = {"say": "And 3+4?", "after": f"tg/{session.id}-0", "keep": False, "live": live}
    assert (await send(host(session), session.api_key, following))[0] == 200
    assert (await send(host(session), other.api_key, following)) == (
        400,
        {
            "undelivered": "invalid_value",
            "why": f"after is 'tg/{session.id}-0'; expected the id of a telegram of this session",
        },
    )
    forgotten = {"say": "And then?", "after": f"tg/{session.id}-1"}
    assert (await send(host(session), session.api_key, forgotten))[0] == 400
    turns = await gateway.close(session.id)
    await gateway.stop()
    assert [turn.parent for turn in turns] == [None, 0]
    whole = [
        {"role": "user", "content": "2+3?"},
        {"role": "assistant", "content": "five"},
        {"role": "user", "content": "And 3+4?"},
    ]
    assert turns[1].completion.prompt_ids.tolist() == chat_format.render(whole)
    assert [request.session_id for request in sampler.requests] == [session.id, session.id]


async def test_every_refusal_under_a_dialects_paths_is_in_its_own_shape_and_no_other(chat_format: ChatFormat) -> None:
    dialects = (*DIALECTS, Telegram())
    gateway = await started(ScriptedSampler(chat_format), dialects=dialects, limits=LimitsConfig(body_bytes=1000))
    session = gateway.open(TRAINING)
    url, key = host(session), session.api_key
    refusals = {
        (401, "invalid_api_key"): await send(url, None, {}),
        (404, "not_served"): await send(url, key, {}, path="/telegram/nowhere"),
        (405, "not_served"): await send(url, key, {}, method="PATCH"),
        (413, "body_too_large"): await send(url, key, b" " * 2000),
        (400, "invalid_json"): await send(url, key, b"{"),
    }
    elsewhere = await send(url, key, {}, path="/telegrams")
    at_chat = await send(url, key, {}, method="PATCH", path="/v1/chat/completions")
    await gateway.close(session.id)
    closed = await send(url, key, {"say": "?"})
    await gateway.stop()
    assert {(status, body["undelivered"]) for status, body in refusals.values()} == set(refusals)
    assert refusals[401, "invalid_api_key"][1]["why"] == (
        "no API key was sent; send the session's key as 'X-Stamp: KEY'"
    )
    assert (closed[0], closed[1]["undelivered"]) == (410, "session_closed")
    assert (elsewhere[0], elsewhere[1]["error"]["code"]) == (404, "not_served")
    assert (at_chat[0], at_chat[1]["error"]["code"]) == (405, "not_served")


async def test_a_page_of_a_dialects_sees_the_session_it_was_asked_under_and_no_other(chat_format: ChatFormat) -> None:
    gateway = await started(ScriptedSampler(chat_format, "five<|im_end|>"), dialects=(Telegram(),))
    session, other = gateway.open(TRAINING), gateway.open(TRAINING)
    _, sent = await send(host(session), session.api_key, {"say": "2+3?"})
    path = f"/telegram/tg-{session.id}-0/copy"
    seen = await send(host(session), session.api_key, b"", method="GET", path=path)
    hidden = await send(host(session), other.api_key, b"", method="GET", path=path)
    nobody = await send(host(session), None, b"", method="GET", path=path)
    turns = await gateway.close(session.id)
    await gateway.stop()
    whole = [{"role": "user", "content": "2+3?"}, {"role": "assistant", "content": "five"}]
    assert seen == (200, {"copy of": sent, "costs": len(chat_format.render(whole))})
    assert (hidden[0], hidden[1]["undelivered"]) == (404, "not_found")
    assert (nobody[0], nobody[1]["undelivered"]) == (401, "invalid_api_key") and len(turns) == 1


def test_a_key_is_found_wherever_agents_put_it() -> None:
    assert find_bearer({"Authorization": "Bearer  k "}) == "k"
    assert find_bearer({"x-api-key": "k"}) == find_bearer({"api-key": "k"}) == "k"
    assert find_bearer({"Authorization": "Basic k"}) is None and find_bearer({}) is None
