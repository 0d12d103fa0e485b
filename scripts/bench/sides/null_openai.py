"""An OpenAI-compatible server that answers every chat completion at once with the same words; prints its port."""

from __future__ import annotations

import asyncio
import sys

from aiohttp import web

_ANSWER = {
    "id": "chatcmpl-0",
    "object": "chat.completion",
    "created": 1,
    "model": "policy",
    "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "It is 5."}}],
    "usage": {"prompt_tokens": 1258, "completion_tokens": 5, "total_tokens": 1263},
}


async def answer(request: web.Request) -> web.Response:
    await request.read()
    return web.json_response(_ANSWER)


async def main() -> None:
    app = web.Application(client_max_size=2**24)
    app.router.add_post("/v1/chat/completions", answer)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    print(runner.addresses[0][1], flush=True)
    await asyncio.to_thread(sys.stdin.read)  # until whoever started it is gone


if __name__ == "__main__":
    asyncio.run(main())
