"""The gateway under load, over a sampler that costs nothing: what it adds to every request.

``load``: requests of one prompt at some concurrencies, sessions of ``session_requests`` each. ``long_prompt``: how
prompts of a megabyte in one session delay another's requests. ``streams``: many streams at once, for a time. The
gateway runs in one process and the load in another; ``--peer litellm`` asks the same of litellm's proxy.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import tyro
from _harness import show
from sides.litellm_proxy import run_litellm
from sides.load import Address, Connection, Load, apply_load
from sides.process import SideProcess

_SIDE = Path(__file__).parent / "sides" / "null_gateway.py"
_PATH = "/v1/chat/completions"


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to measure. ``peer_python`` is the interpreter of an environment that has ``litellm[proxy]``.

    ``peer_upstream``: the peer asks a server that answers at once, as where it stands before an engine; without, it
    answers by itself.
    """

    case: tuple[Literal["load", "long_prompt", "streams"], ...] = ("load", "long_prompt", "streams")
    tokenizer: Path = Path("examples/quickstart/tokenizer")
    prompt_tokens: int = 1258
    tools: int = 6
    concurrency: tuple[int, ...] = (1, 32, 100)
    requests: int = 4000
    session_requests: int = 20
    streams: int = 1000
    stream_seconds: float = 60.0
    stream_token_every_s: float = 1.0
    long_prompt_bytes: int = 1_000_000
    peer: Literal["litellm"] | None = None
    peer_python: Path | None = None
    peer_upstream: bool = False
    peer_requests: int = 400
    json: bool = False


class NullGateway:
    """The gateway's process: sessions, and requests as they go over the wire."""

    def __init__(self, options: Options, process: SideProcess) -> None:
        self._options = options
        self.process = process
        self.told = process.read_answer()
        url = urlsplit(self.told["url"])
        assert url.hostname is not None and url.port is not None
        self.address = Address(host=url.hostname, port=url.port, path=_PATH)
        self.body = self.told["body"]

    def word_requests(self, count: int) -> list[bytes]:
        """``count`` requests, in sessions of their own, ``session_requests`` to each."""
        each = self._options.session_requests
        body = json.dumps(self.body).encode()
        worded = [self.address.word(body, key) for key in self.open(-(-count // each))]
        return [worded[index // each] for index in range(count)]

    def open(self, count: int) -> list[str]:
        keys: list[str] = self.process.ask({"open": count})["keys"]
        return keys

    def close(self) -> dict[str, Any]:
        return self.process.ask({"close": True})


def start(options: Options, every_s: float = 0.0) -> SideProcess:
    command = [sys.executable, str(_SIDE), "--tokenizer", str(options.tokenizer)]
    command += ["--prompt-tokens", str(options.prompt_tokens), "--tools", str(options.tools)]
    return SideProcess([*command, "--every-s", str(every_s)])


def word_load(name: str, load: Load) -> dict[str, Any]:
    return {
        f"{name}_requests_a_second": len(load.latencies) / load.seconds,
        f"{name}_p50_ms": 1e3 * load.percentile(0.5),
        f"{name}_p99_ms": 1e3 * load.percentile(0.99),
    }


def measure_load(options: Options) -> Iterator[dict[str, Any]]:
    """Requests a second and their latency, at each concurrency; and the peer's, in turns with it."""
    peer = None if options.peer is None else run_litellm(options.peer_python, _PATH, upstream=options.peer_upstream)
    with start(options) as process:
        gateway = NullGateway(options, process)
        asyncio.run(apply_load(gateway.address, gateway.word_requests(200), 1))  # warm
        for concurrency in options.concurrency:
            count = options.requests if concurrency > 1 else options.requests // 4
            requests = gateway.word_requests(count)
            began = process.ask({})["cpu_s"]
            result = word_load("gateway", asyncio.run(apply_load(gateway.address, requests, concurrency)))
            result["gateway_cpu_ms"] = 1e3 * (process.ask({})["cpu_s"] - began) / count
            turns = gateway.close()["turns"]
            if peer is not None:
                body = json.dumps(gateway.body).encode()
                worded = [peer.address.word(body, peer.key)] * options.peer_requests
                asyncio.run(apply_load(peer.address, worded[:20], 1))
                result |= word_load(peer.name, asyncio.run(apply_load(peer.address, worded, concurrency)))
                rates = result["gateway_requests_a_second"], result[f"{peer.name}_requests_a_second"]
                result["times_the_peer"] = rates[0] / rates[1]
            yield {"case": "load", "concurrency": concurrency, **result, "turns": turns}
    if peer is not None:
        peer.end()


def measure_long_prompt(options: Options) -> Iterator[dict[str, Any]]:
    """One session's latency alone, and beside another whose prompts are new and a megabyte long."""
    with start(options) as process:
        gateway = NullGateway(options, process)
        count = options.requests // 4

        async def ask_long(key: str, done: asyncio.Event) -> int:
            connection, asked = await Connection.open(gateway.address), 0
            while not done.is_set():
                text = f"{asked} " + "the agent reads a line. \n" * (options.long_prompt_bytes // 25)
                body = {"model": "m", "messages": [{"role": "user", "content": text}]}
                await connection.ask(gateway.address.word(json.dumps(body).encode(), key))
                asked += 1
            connection.close()
            return asked

        async def measure(beside: bool) -> tuple[Load, int]:
            done = asyncio.Event()
            requests, key = gateway.word_requests(count), gateway.open(1)[0]
            long = asyncio.create_task(ask_long(key, done)) if beside else None
            load = await apply_load(gateway.address, requests, 1)
            done.set()
            return load, 0 if long is None else await long

        asyncio.run(apply_load(gateway.address, gateway.word_requests(200), 1))  # warm
        alone, _ = asyncio.run(measure(beside=False))
        beside, asked = asyncio.run(measure(beside=True))
        yield {
            "case": "long_prompt",
            "long_prompts": asked,
            **word_load("alone", alone),
            **word_load("beside", beside),
            "p99_moved_ms": 1e3 * (beside.percentile(0.99) - alone.percentile(0.99)),
            "longest_ms": 1e3 * max(beside.latencies),
        }


def measure_streams(options: Options) -> Iterator[dict[str, Any]]:
    """Streams that are all open at once for ``stream_seconds``, a token each ``stream_token_every_s``."""
    with start(options, options.stream_token_every_s) as process:
        gateway = NullGateway(options, process)
        body = json.dumps({**gateway.body, "stream": True}).encode()
        before = process.ask({})
        keys = gateway.open(options.streams)

        async def watch() -> list[tuple[float, int, bool]]:
            connections = [await Connection.open(gateway.address) for _ in keys]
            until = time.perf_counter() + options.stream_seconds
            requests = [gateway.address.word(body, key) for key in keys]
            pairs = zip(connections, requests, strict=True)
            return await asyncio.gather(*(connection.watch(request, until) for connection, request in pairs))

        watched = asyncio.run(watch())
        after = process.ask({})
        firsts = sorted(first for first, _, _ in watched)
        yield {
            "case": "streams",
            "streams": len(watched),
            "dropped": sum(not alive for _, _, alive in watched),
            "seconds": options.stream_seconds,
            "events": sum(events for _, events, _ in watched),
            "fewest_events": min(events for _, events, _ in watched),
            "first_event_p50_ms": 1e3 * firsts[len(firsts) // 2],
            "first_event_max_ms": 1e3 * firsts[-1],
            "idle_rss_mb": before["rss_mb"],
            "rss_mb": after["rss_mb"],
            "peak_mb": after["peak_mb"],
        }


MEASURES = {"load": measure_load, "long_prompt": measure_long_prompt, "streams": measure_streams}


def main(options: Options) -> None:
    for case in options.case:
        for result in MEASURES[case](options):
            show(result, options.json)


if __name__ == "__main__":
    main(tyro.cli(Options))
