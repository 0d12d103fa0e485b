"""A server that speaks OpenEnv's WebSocket protocol as openenv-core 0.3 does, with one environment: guess a number."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any

from aiohttp import WSMsgType, web

TOOL = {
    "name": "guess",
    "description": "Guess the number.",
    "input_schema": {"type": "object", "properties": {"number": {"type": "integer"}}, "required": ["number"]},
}


class GuessServer:
    """The number is the seed modulo 10. Each wrong guess is rewarded with its nearness, the right one with 1."""

    def __init__(self, room: int = 8) -> None:
        self.room = room
        self.open = self.refused = 0
        self.rewarding = True
        self.breaking = False

    async def talk(self, request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        if self.open >= self.room:
            self.refused += 1
            await socket.send_json(_word_error("CAPACITY_REACHED", "Server at capacity"))
            await socket.close()
            return socket
        self.open += 1
        try:
            state = {"number": 0, "step_count": 0}
            async for message in socket:
                if message.type is not WSMsgType.TEXT or (asked := message.json())["type"] == "close":
                    break
                if self.breaking and asked["type"] == "step":
                    break
                await socket.send_json(self._answer(asked, state))
        finally:
            self.open -= 1
            await socket.close()
        return socket

    def _answer(self, asked: dict[str, Any], state: dict[str, int]) -> dict[str, Any]:
        data = asked.get("data", {})
        if asked["type"] == "reset":
            state |= {"number": data["seed"] % 10, "step_count": 0}
            return self._word({"message": "Guess a number from 0 to 9."}, None, False)
        if asked["type"] == "state":
            return {"type": "state", "data": dict(state)}
        if data.get("type") == "list_tools":
            return self._word({"tools": [TOOL]}, None, False)
        text = data["arguments"]["number"] if data.get("type") == "call_tool" else data.get("message")
        if not str(text).isdigit():
            return _word_error("VALIDATION_ERROR", "Invalid message")
        state["step_count"] += 1
        off = abs(int(text) - state["number"])
        said = "right" if off == 0 else f"off by {off}"
        reward = 1.0 if off == 0 else (10 - off) / 100
        if data.get("type") == "call_tool":
            result = {"content": [{"type": "text", "text": said}], "is_error": False}
            return self._word({"tool_name": "guess", "result": result, "error": None}, reward, off == 0)
        return self._word({"message": said}, reward, off == 0)

    def _word(self, observation: dict[str, Any], reward: float | None, done: bool) -> dict[str, Any]:
        data = {"observation": observation, "reward": reward if self.rewarding else None, "done": done}
        return {"type": "observation", "data": data}


def _word_error(code: str, message: str) -> dict[str, Any]:
    return {"type": "error", "data": {"code": code, "message": message}}


@contextlib.asynccontextmanager
async def serve(server: GuessServer) -> AsyncIterator[str]:
    """Its address, while it is up."""
    app = web.Application()
    app.router.add_get("/ws", server.talk)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()
