"""The gateway as a program of its own, where there is no jax: agents play, it is killed, and what it recorded is played
again."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest
from aiohttp import web
from openai import AsyncOpenAI

from forgejax.chat import ChatFormat
from forgejax.errors import ConfigError, EngineError
from forgejax.gateway.records.reader import read_session
from forgejax.rollout.server.wire import DrawBody, EndBody, Line
from forgejax.types import FinishReason, SamplingLaw
from scripts import gateway
from tests.rollout.serving import served

ROOT = Path(__file__).parents[2]
WITHOUT_JAX = (
    "import sys; sys.modules.update(jax=None, jaxlib=None, flax=None); sys.path.insert(0, 'scripts'); "
    "import gateway; sys.exit(gateway.main())"
)
HELLO: Any = [{"role": "user", "content": "hello"}]


class FakeServe:
    """``scripts/serve.py``: it says the same to everyone, and to whoever asks for it goes on for ever."""

    def __init__(self, chat_format: ChatFormat) -> None:
        self._format = chat_format
        self._ids = chat_format.codec.encode("hi there<|im_end|>")

    def make_app(self) -> web.Application:
        app = web.Application()
        app.router.add_post("/generate", self.generate)
        app.router.add_get("/health", self.health)
        return app

    async def health(self, _: web.Request) -> web.Response:
        return web.json_response({"healthy": True, "version": 4, "max_context": 512})

    async def generate(self, http: web.Request) -> web.StreamResponse:
        asked = await http.json()
        response = web.StreamResponse()
        await response.prepare(http)
        while "for ever" in self._format.decode(asked["prompt_ids"]):
            await self._write(response, Line(draw=DrawBody([5], [-0.5], [4], [4])))
            await asyncio.sleep(0.01)
        count = len(self._ids)
        await self._write(response, Line(draw=DrawBody(self._ids, [-0.25] * count, [4] * count, [4] * count)))
        end = EndBody(finish_reason=FinishReason.STOP, cached_tokens=0, queued_s=0.0, generate_s=0.1)
        await self._write(response, Line(end=end))
        return response

    async def _write(self, response: web.StreamResponse, line: Line) -> None:
        await response.write(msgspec.json.encode(line) + b"\n")


@asynccontextmanager
async def program(*arguments: str) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", WITHOUT_JAX, *arguments, cwd=ROOT, stdout=-1, stderr=-1
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def test_an_agent_plays_by_the_printed_line_and_a_killed_gateway_loses_nothing_it_answered(
    chat_format: ChatFormat, tokenizer_folder: Path, tmp_path: Path
) -> None:
    async with served(FakeServe(chat_format).make_app()) as engine:
        options = ("--engine", engine, "--tokenizer", str(tokenizer_folder), "--port", "0", "--record", str(tmp_path))
        async with program(*options) as process:
            assert process.stdout is not None
            said = (await asyncio.wait_for(process.stdout.readline(), 120)).decode()
            found = re.search(
                r"OPENAI_BASE_URL=(\S+)/v1 ANTHROPIC_BASE_URL=(\S+) OPENAI_API_KEY=NAME .*token (\S+)", said
            )
            assert found is not None and found[1] == found[2], said
            url, token = found[1], found[3]
            async with AsyncOpenAI(base_url=f"{url}/v1", api_key="one", max_retries=0, timeout=30) as agent:
                for _ in range(2):
                    reply = await agent.chat.completions.create(model="m", messages=HELLO)
                    assert reply.choices[0].message.content == "hi there"
                stream = await agent.chat.completions.create(
                    model="m", messages=[{"role": "user", "content": "for ever"}], stream=True
                )
                await anext(aiter(stream))
                owner = {"Authorization": f"Bearer {token}"}
                async with aiohttp.ClientSession(headers=owner) as http, http.get(f"{url}/sessions") as page:
                    (listed,) = (await page.json())["sessions"]
                async with aiohttp.ClientSession() as http, http.get(f"{url}/ready") as page:
                    ready = await page.json()
                process.send_signal(signal.SIGKILL)
                await process.wait()
    assert (listed["name"], listed["turns"]) == ("one", 2)
    assert ready["engine"] == {"context_length": 512, "version": 4}
    path = tmp_path / f"{listed['id']}.jsonl"
    session = read_session(path)
    assert len(session.bodies) == 3 and sorted(session.completions) == [0, 1]
    assert set(session.completions[1].versions.tolist()) == {4}
    async with program("replay", str(path), "--tokenizer", str(tokenizer_folder)) as replay:
        out, errors = await asyncio.wait_for(replay.communicate(), 120)
    assert replay.returncode == 0, errors
    assert out.decode() == f"{path}: 2 turns, {2 * len(session.completions[0].token_ids)} sampled tokens: the same\n"


async def test_an_engine_that_is_down_is_a_503_that_says_when_to_come_again(
    chat_format: ChatFormat, tokenizer_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stop = asyncio.Event()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        engine = f"http://127.0.0.1:{free.getsockname()[1]}"
    config = gateway.AloneConfig(engine=engine, tokenizer=tokenizer_folder, port=0, context=512)
    serving = asyncio.create_task(gateway.serve_alone(config, stop))
    said = ""
    async with asyncio.timeout(60):
        while "serving: " not in said:
            await asyncio.sleep(0.02)
            said += "".join(capsys.readouterr())
    found = re.search(r"OPENAI_BASE_URL=(\S+)", said)
    assert found is not None and "the engine is not there yet: no answer from" in said
    body = json.dumps({"model": "m", "messages": HELLO})
    async with (
        aiohttp.ClientSession(headers={"Authorization": "Bearer k"}) as http,
        http.post(f"{found[1]}/chat/completions", data=body) as response,
    ):
        answer = await response.json()
    stop.set()
    await serving
    assert (response.status, response.headers["Retry-After"]) == (503, "2")
    assert answer["error"]["code"] == "engine_error" and engine in answer["error"]["message"]
    with pytest.raises(EngineError, match="is a server of tokens running there"):
        await gateway.serve_alone(gateway.AloneConfig(engine=engine, tokenizer=tokenizer_folder), stop)


async def test_a_context_that_the_engine_has_not_or_does_not_tell_is_refused(
    chat_format: ChatFormat, tokenizer_folder: Path
) -> None:
    async with served(FakeServe(chat_format).make_app()) as engine:
        config = gateway.AloneConfig(engine=engine, tokenizer=tokenizer_folder, context=513)
        with pytest.raises(ConfigError, match="context is 513, and that of the engine 512; give so much at most"):
            await gateway.serve_alone(config, asyncio.Event())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"engine": "localhost:8800"}, "engine is 'localhost:8800'; give an address as http://"),
        ({"host": "0.0.0.0"}, r"host is 0\.0\.0\.0, which others reach; give a --token, or listen on 127"),
        ({"host": "::"}, "which others reach"),
        ({"context": 1}, "context is 1; give at least 2"),
        ({"engine_kind": "vllm"}, "set the temperature of every request with --temperature 1"),
        ({"engine_kind": "vllm", "temperature": 0.7}, "set the temperature of every request"),
        ({"engine_kind": "vllm", "temperature": -1.0}, "expected 0"),
    ],
)
def test_options_that_cannot_be_served_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        gateway.AloneConfig(**{"engine": "http://127.0.0.1:8800", "tokenizer": Path("t"), **options})


def test_options_become_the_gateways_settings_and_the_law_of_every_request(tmp_path: Path) -> None:
    (tmp_path / "rules.toml").write_text('[[side_calls]]\nname = "a"\nmatch.model = "m"\n', encoding="utf-8")
    config = gateway.AloneConfig(
        engine="http://127.0.0.1:8800",
        tokenizer=tmp_path,
        host="0.0.0.0",
        token="secret",
        temperature=0.5,
        max_tokens_limit=7,
        record=tmp_path / "kept",
        side_calls=(tmp_path / "rules.toml",),
    )
    settings = config.make_gateway_config()
    assert config.law == SamplingLaw(temperature=0.5)
    assert (settings.record, settings.max_tokens_limit) == (str(tmp_path / "kept"), 7)
    assert [rule.name for rule in settings.side_calls] == ["a"]
    assert "OPENAI_API_KEY=secret-NAME" in gateway.describe_access("http://h:1", "secret", "secret")


def test_a_file_of_the_tokenizers_folder_names_it(tokenizer_folder: Path, tmp_path: Path) -> None:
    by_file = gateway.load_tokenizer(tokenizer_folder / "tokenizer.json")
    assert by_file.stop_ids == gateway.load_tokenizer(tokenizer_folder).stop_ids
    (tmp_path / "model.gguf").write_text("")
    with pytest.raises(ConfigError, match=r"model\.gguf is no tokenizer\.json"):
        gateway.load_tokenizer(tmp_path / "model.gguf")


async def test_a_replay_that_differs_says_so_and_how(
    chat_format: ChatFormat, tokenizer_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tests.gateway.records.conversations import record_everything  # noqa: PLC0415

    await record_everything(chat_format, tmp_path)
    (path,) = list(tmp_path.glob("*.jsonl"))  # noqa: ASYNC240
    path.write_bytes(path.read_bytes().replace(b'"tool_calls":1', b'"tool_calls":3', 1))
    different = await gateway.replay_files(gateway.ReplayConfig(files=(path,), tokenizer=tokenizer_folder))
    said = capsys.readouterr().out
    assert different == 1 and ": 1 differences\n  turn 0: its number of calls was 3, and now is 1\n" in said
