"""A server says to a trainer that it is there, again and again; the trainer asks it all else."""

from __future__ import annotations

import asyncio
import logging

import aiohttp
import msgspec

SERVERS_PATH = "/servers"
_ANSWER_S, _RETRY_S, _LONGEST_S = 10.0, 2.0, 60.0
_logger = logging.getLogger(__name__)


class AnnounceBody(msgspec.Struct, frozen=True, kw_only=True):
    """Where the trainer reaches the server."""

    url: str


class AcceptBody(msgspec.Struct, frozen=True, kw_only=True):
    """In how many seconds the server is to say it again."""

    again_s: float


async def announce(trainer: str, url: str, token: str) -> None:
    """Tells the trainer at ``trainer`` of the server at ``url`` until it is cancelled.

    A trainer that does not answer, or refuses, is told again; the log says so once, and once it answers.
    """
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    told, body = "", msgspec.json.encode(AnnounceBody(url=url))
    async with aiohttp.ClientSession(headers=headers, timeout=aiohttp.ClientTimeout(total=_ANSWER_S)) as session:
        while True:
            wait_s, now = _RETRY_S, ""
            try:
                async with session.post(f"{trainer.rstrip('/')}{SERVERS_PATH}", data=body) as response:
                    answer = await response.read()
                    if response.status == 200:
                        wait_s = min(max(msgspec.json.decode(answer, type=AcceptBody).again_s, 0.01), _LONGEST_S)
                    else:
                        now = f"it answers {response.status}: {answer[:300].decode(errors='replace')}"
            except (TimeoutError, aiohttp.ClientError, OSError, ValueError, msgspec.MsgspecError) as error:
                now = f"it does not answer: {error!r}"
            if now != told:
                _logger.warning("the trainer at %s: %s", trainer, now or "it knows of this server")
            told = now
            await asyncio.sleep(wait_s)
