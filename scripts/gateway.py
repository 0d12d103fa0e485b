"""Serves an LLM API to unmodified agents, in front of any server of tokens, and records what was sampled.

- ``python scripts/gateway.py --engine http://127.0.0.1:8800 --tokenizer models/SmolLM2-135M`` stands in front of
  scripts/serve.py;
- ``python scripts/gateway.py --engine http://127.0.0.1:30000 --engine-kind sglang --tokenizer DIR --record sessions``
  in front of SGLang, and keeps each session;
- ``python scripts/gateway.py replay sessions/ID.jsonl --tokenizer DIR`` plays recorded sessions again.

It prints what to set in an agent's environment. Each key that an agent sends is a session of its own.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import secrets
import signal
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import tyro

from forgejax.chat.format import ChatFormat
from forgejax.chat.tool_calls import ToolFormatName
from forgejax.errors import ConfigError, EngineError, ForgejaxError
from forgejax.gateway import Gateway, GatewayConfig
from forgejax.gateway.config import is_loopback
from forgejax.gateway.limits import LimitsConfig
from forgejax.gateway.records.reader import read_session
from forgejax.gateway.records.replay import replay_session
from forgejax.gateway.side_calls.rules import read_side_calls
from forgejax.gateway.walk_in import StandAlone
from forgejax.rollout.clients.base import ServerFacts, TokenServer
from forgejax.rollout.clients.own import ServeClient
from forgejax.rollout.clients.sglang import SglangClient
from forgejax.rollout.clients.vllm import VllmClient, gives_logprobs_of
from forgejax.types import SamplingLaw, SessionSpec

EngineKind = Literal["serve", "sglang", "vllm"]
_CLIENTS: Mapping[EngineKind, Callable[..., TokenServer]] = {
    "serve": ServeClient,
    "sglang": SglangClient,
    "vllm": VllmClient,
}
_DIFFERENT = 1


@dataclass(frozen=True, kw_only=True)
class AloneConfig:
    """A gateway without a run."""

    engine: str
    """Address of the server of tokens, as http://127.0.0.1:8800."""
    engine_kind: EngineKind = "serve"
    """What runs there: scripts/serve.py, SGLang (its /generate) or vLLM (its /v1/completions)."""
    tokenizer: Path
    """Folder with tokenizer.json, tokenizer_config.json and the chat template, or one of these files."""
    tool_format: ToolFormatName = "auto"
    """How the policy writes tool calls; auto takes the format its chat template writes."""
    host: str = "127.0.0.1"
    """Address to listen on; beyond this machine only with --token."""
    port: int = 8801
    """Port to listen on; a taken one gives way to a free one."""
    token: str | None = None
    """Agents' keys must be this, or it, a dash and a name for each session; without it any key will do."""
    record: Path | None = None
    """Folder in which each session is kept, in a file of its own that can be played again."""
    side_calls: tuple[Path, ...] = ()
    """TOML files with [[side_calls]]: requests that are no part of a task."""
    context: int | None = None
    """Tokens of prompt and reply together; what the engine says if left out."""
    temperature: float | None = None
    """Of every request, whatever agents ask for; with top_p and top_k 1 and 0 where these are left out."""
    top_p: float | None = None
    """The same of top-p."""
    top_k: int | None = None
    """The same of top-k."""
    seed: int | None = None
    """Of every session's sampling."""
    max_tokens_default: int | None = None
    """Of a reply, where an agent asks for no limit."""
    max_tokens_limit: int | None = None
    """Of every reply, whatever agents ask for."""
    most_sessions: int = 1000
    """Sessions open at once."""
    idle_s: float = 3600.0
    """Sessions that were asked nothing for so long are closed where others need their place."""
    request_timeout_s: float = 600.0
    """For a whole reply."""
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    """What agents may ask for: of each request, of each session, of all of them."""
    model_name: str = "policy"
    """What agents see."""

    def __post_init__(self) -> None:
        if not self.engine.startswith(("http://", "https://")):
            raise ConfigError(f"engine is {self.engine!r}; give an address as http://127.0.0.1:8800")
        if self.token is None and not is_loopback(self.host):
            raise ConfigError(f"host is {self.host}, which others reach; give a --token, or listen on 127.0.0.1")
        if self.context is not None and self.context < 2:
            raise ConfigError(f"context is {self.context}; give at least 2 tokens")
        if self.engine_kind == "vllm" and (self.law is None or not gives_logprobs_of(self.law)):
            raise ConfigError(
                "vLLM gives log-probabilities at temperature 1, whatever is asked for: set the temperature of every "
                "request with --temperature 1 (or 0)"
            )

    @property
    def law(self) -> SamplingLaw | None:
        """What every request is sampled with; None where agents choose."""
        given = {name: getattr(self, name) for name in ("temperature", "top_p", "top_k")}
        if all(value is None for value in given.values()):
            return None
        try:
            return SamplingLaw(**{name: value for name, value in given.items() if value is not None})
        except ValueError as error:
            raise ConfigError(str(error)) from error

    def make_gateway_config(self) -> GatewayConfig:
        """Raises ConfigError."""
        rules = tuple(rule for path in self.side_calls for rule in read_side_calls(path))
        return GatewayConfig(
            host=self.host,
            port=self.port,
            model_name=self.model_name,
            tool_format=self.tool_format,
            max_tokens_default=self.max_tokens_default,
            max_tokens_limit=self.max_tokens_limit,
            request_timeout_s=self.request_timeout_s,
            limits=self.limits,
            record=None if self.record is None else str(self.record),
            side_calls=rules,
        )


@dataclass(frozen=True, kw_only=True)
class ReplayConfig:
    """Recorded sessions, played again."""

    files: tyro.conf.Positional[tuple[Path, ...]]
    """Files that --record has made."""
    tokenizer: Path
    """Folder with tokenizer.json, tokenizer_config.json and the chat template, or one of these files."""
    tool_format: ToolFormatName | None = None
    """Instead of the one it was recorded with."""

    def __post_init__(self) -> None:
        if not self.files:
            raise ConfigError("no file was given to replay; name those that --record has made, as sessions/*.jsonl")


async def serve_alone(config: AloneConfig, stop: asyncio.Event) -> None:
    """Serves until ``stop`` is set. Raises ForgejaxError for what cannot be served."""
    settings = config.make_gateway_config()
    chat_format = load_tokenizer(config.tokenizer)
    async with _CLIENTS[config.engine_kind](config.engine, deadline_s=config.request_timeout_s) as client:
        context = await _find_context(config, client)
        admin_token = config.token or secrets.token_urlsafe(18)
        spec = SessionSpec(purpose="evaluation", law=config.law, seed=config.seed)

        async def look() -> Mapping[str, Any]:
            return dataclasses.asdict(await client.look())

        alone = StandAlone(
            admin_token=admin_token,
            token=config.token,
            spec=spec,
            most=config.most_sessions,
            idle_s=config.idle_s,
            look=look,
        )
        gateway = Gateway(client, chat_format, context, settings, alone=alone)
        try:
            print(describe_access(await gateway.start(), config.token, admin_token), flush=True)
            await stop.wait()
        finally:
            await gateway.stop()


def describe_access(url: str, token: str | None, admin_token: str) -> str:
    """What to set, in one line."""
    key = f"{token}-NAME" if token is not None else "NAME"
    return (
        f"serving: OPENAI_BASE_URL={url}/v1 ANTHROPIC_BASE_URL={url} OPENAI_API_KEY={key} ANTHROPIC_API_KEY={key} "
        f"(each NAME is a session); its owner's pages: {url}/sessions with the token {admin_token}"
    )


def load_tokenizer(path: Path) -> ChatFormat:
    """The tokenizer of a folder, or of the folder that a file of it lies in. Raises ForgejaxError."""
    if path.is_file() and path.suffix != ".json":
        raise ConfigError(f"{path} is no tokenizer.json; give it, or the folder it lies in with its chat template")
    return ChatFormat.load(path.parent if path.is_file() else path)


async def _find_context(config: AloneConfig, client: TokenServer) -> int:
    """The context length: what was given, or what the engine says. One that is down may come up later."""
    facts = ServerFacts(context_length=None)
    try:
        facts = await client.look()
    except EngineError as error:
        if config.context is None:
            raise
        print(f"the engine is not there yet: {error}; until it is, requests get a 503", file=sys.stderr, flush=True)
    context = config.context or facts.context_length
    if context is None:
        raise ConfigError(f"{config.engine} does not say how long its context is; say so with --context")
    if facts.context_length is not None and context > facts.context_length:
        raise ConfigError(f"context is {context}, and that of the engine {facts.context_length}; give so much at most")
    return context


async def replay_files(config: ReplayConfig) -> int:
    """Plays every file and prints what differs; how many sessions do."""
    chat_format = load_tokenizer(config.tokenizer)
    different = 0
    for path in config.files:
        recorded = read_session(path)
        replayed = await replay_session(recorded, chat_format, config.tool_format)
        tokens = sum(len(turn.completion.token_ids) for turn in replayed.turns)
        torn = "; its last line is cut off" if recorded.torn else ""
        said = f"{len(replayed.differences)} differences" if replayed.differences else "the same"
        print(f"{path}: {len(replayed.turns)} turns, {tokens} sampled tokens: {said}{torn}")
        for difference in replayed.differences:
            print(f"  {difference}")
        different += bool(replayed.differences)
    return different


async def _serve_until_signal(config: AloneConfig) -> None:
    stop = asyncio.Event()
    for name in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(name, stop.set)
    await serve_alone(config, stop)


def main() -> int:
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    arguments = sys.argv[1:]
    try:
        if arguments[:1] == ["replay"]:
            config = tyro.cli(ReplayConfig, args=arguments[1:], prog="gateway.py replay")
            return _DIFFERENT if asyncio.run(replay_files(config)) else 0
        asyncio.run(_serve_until_signal(tyro.cli(AloneConfig, args=arguments, description=__doc__)))
    except (ForgejaxError, OSError) as error:
        print(f"gateway: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
