"""Laws of servers that say by themselves that they are there."""

from __future__ import annotations

import asyncio
from pathlib import Path

import aiohttp
import pytest

from forgejax.errors import ConfigError, EngineError
from forgejax.rollout import RolloutConfig, ServerEngines
from forgejax.rollout.fleet.registry import check_address
from forgejax.rollout.server.announcer import announce
from tests.rollout import tiny
from tests.rollout.driving import gap, until
from tests.rollout.fleet.farm import Farm

PLACE = "127.0.0.1:0"


async def test_a_server_that_says_it_is_there_gets_the_weights_and_then_requests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORGEJAX_SERVER_TOKEN", "secret")  # the farm's servers want none
    config = RolloutConfig(engines=(), register_at=PLACE, poll_s=0.02, silence_s=1.0, start_s=30.0)
    with Farm(tmp_path, 2) as farm:
        engines = ServerEngines(config, tiny.params(3), 3, request_deadline_s=30.0)
        entered = asyncio.create_task(asyncio.to_thread(engines.__enter__))
        await until(lambda: engines.registered_port > 0)
        trainer = f"http://127.0.0.1:{engines.registered_port}"
        telling = [asyncio.create_task(announce(trainer, farm.urls[0], "secret"))]
        await entered  # which waited for it
        try:
            done = await engines.sample(tiny.request("a", tiny.prompt(0, 20), 6))
            telling.append(asyncio.create_task(announce(trainer, farm.urls[1], "secret")))
            await until(lambda: engines.figures()["engine/serving"] == 2)
            await asyncio.gather(*(engines.sample(tiny.request(f"b{i}", tiny.prompt(i, 20), 6)) for i in range(4)))
            async with aiohttp.ClientSession() as session:
                answers = []
                for token, url in (("wrong", farm.urls[0]), ("secret", "ftp://nobody")):
                    headers = {"Authorization": f"Bearer {token}"}
                    async with session.post(f"{trainer}/servers", json={"url": url}, headers=headers) as response:
                        answers.append(response.status)
        finally:
            for each in telling:
                each.cancel()
            await asyncio.to_thread(engines.__exit__)
    assert set(done.versions.tolist()) == {3} and gap(done, tiny.params(3)) < 1e-5
    assert [set(server.generated) for server in farm.servers] == [{3}, {3}]
    assert answers == [401, 400] and not engines.healthy


async def test_a_run_that_no_server_comes_to_ends_with_a_sentence_that_says_where_it_waited() -> None:
    config = RolloutConfig(engines=(), register_at=PLACE, poll_s=0.02, silence_s=0.1, start_s=0.2)
    with pytest.raises(EngineError, match=r"none has said to 127\.0\.0\.1:0 \(rollout\.register_at\) that it is there"):
        await asyncio.to_thread(ServerEngines(config, tiny.params(), 0, request_deadline_s=1.0).__enter__)


@pytest.mark.parametrize("url", ["", "10.0.0.7:8800", "ftp://a", "http://", "http://a:x", "http://u@a", "http://a/?b"])
def test_what_is_no_address_of_a_server_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="is no address of a server"):
        check_address(url)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"engines": ()}, "one at least, or rollout.register_at"),
        ({"engines": 2, "register_at": PLACE}, "rollout.engines is 2"),
        ({"engines": (), "register_at": "here"}, "expected HOST:PORT"),
        ({"engines": (), "register_at": "0.0.0.0:8790"}, "there is no token"),
    ],
)
def test_a_place_for_servers_that_cannot_be_is_refused(settings: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        RolloutConfig(**settings)  # type: ignore[arg-type]
