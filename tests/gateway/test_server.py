"""The gateway's port: taken, stopped, not ours."""

from __future__ import annotations

import json

import pytest

from forgejax.chat import ChatFormat
from forgejax.errors import GatewayError
from forgejax.gateway import Gateway, GatewayConfig
from forgejax.types import SessionSpec
from tests.gateway.asking import status_of
from tests.gateway.fakes import TRAINING, ScriptedSampler, started


async def test_a_taken_port_gives_way_to_a_free_one(chat_format: ChatFormat) -> None:
    first = await started(ScriptedSampler(chat_format))
    port = int(first.url.rsplit(":", 1)[1])
    second = Gateway(ScriptedSampler(chat_format), chat_format, 64, first._config)
    url = await second.start(port=port)
    assert url == second.url != first.url and second.open(TRAINING).base_url == url + "/v1"
    await first.stop()
    await second.stop()


async def test_stopping_closes_every_session_and_opening_needs_a_running_gateway(chat_format: ChatFormat) -> None:
    gateway = await started(ScriptedSampler(chat_format, "5<|im_end|>"))
    session = gateway.open(TRAINING)
    await status_of(session, session.api_key)
    await gateway.stop()
    await gateway.stop()
    assert len(await gateway.close(session.id)) == 1
    with pytest.raises(GatewayError, match="not running"):
        gateway.open(SessionSpec())


async def test_a_host_that_is_not_ours_is_refused(chat_format: ChatFormat) -> None:
    gateway = Gateway(ScriptedSampler(chat_format), chat_format, 64, GatewayConfig())
    with pytest.raises(GatewayError, match=r"cannot listen on 192\.0\.2\.1"):
        await gateway.start("192.0.2.1", 0)


def test_the_gateway_never_imports_jax() -> None:
    import subprocess  # noqa: PLC0415
    import sys  # noqa: PLC0415

    code = "import forgejax.gateway, sys, json; print(json.dumps([m for m in ('jax', 'torch') if m in sys.modules]))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert json.loads(out.stdout) == []
