"""Bodies that are no JSON are refused in the same way, whether half a character is in them or not."""

from __future__ import annotations

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
