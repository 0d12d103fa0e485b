"""Bodies that are no JSON are refused in the same way, whether half a character is in them or not."""

from __future__ import annotations

import aiohttp
import pytest

from forgejax.chat import ChatFormat
from tests.gateway.asking import post
from tests.gateway.fakes import TRAINING, ScriptedSampler, started


@pytest.mark.parametrize("number", ["1e400", "-1e400", "Infinity", "NaN"])
@pytest.mark.parametrize("text", ["x", "\\ud800"])
async def test_a_number_beyond_all_floats_is_refused_wherever_it_stands(
    chat_format: ChatFormat, number: str, text: str
) -> None:
    gateway = await started(ScriptedSampler(chat_format))
    session = gateway.open(TRAINING)
    raw = f'{{"messages": [{{"role": "user", "content": "{text}"}}], "metadata": {{"x": {number}}}}}'
    status, error = await post(session, raw.encode())
    turns = await gateway.close(session.id)
    await gateway.stop()
    assert (status, error["code"], turns) == (400, "invalid_json", ())


@pytest.mark.parametrize(
    ("sent", "read"),
    [
        (r"a\ud800z", "a\ufffdz"),
        (r"\ud83d\ude00", "\N{GRINNING FACE}"),
        (r"\ud83d\ud83d\ude00", "\ufffd\N{GRINNING FACE}"),
        (r"\uDE00\uD83D", "\ufffd\ufffd"),
        (r"\\ud800\ud800", "\\ud800\ufffd"),
        (r"\\\ud83d\u00e9\n", "\\\ufffd\N{LATIN SMALL LETTER E WITH ACUTE}\n"),
    ],
)
async def test_half_a_character_is_read_as_one_that_stands_for_what_is_none(
    chat_format: ChatFormat, sent: str, read: str
) -> None:
    sampler = ScriptedSampler(chat_format, "5<|im_end|>")
    gateway = await started(sampler)
    raw = f'{{"messages": [{{"role": "user", "content": "{sent}\ud800"}}]}}'.encode("utf-8", "backslashreplace")
    url, session = f"{gateway.url}/v1/responses", gateway.open(TRAINING)
    body = raw.replace(b'"messages"', b'"input"')
    async with (
        aiohttp.ClientSession(headers={"x-api-key": session.api_key}) as http,
        http.post(url, data=body) as response,
    ):
        assert response.status == 200
    await gateway.stop()
    assert f"{read}\ufffd" in chat_format.decode(sampler.requests[0].prompt_ids.tolist())
