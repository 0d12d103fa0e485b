"""The lines of a session's file, format 1: one JSON object each, told apart by ``event``.

The file begins with ``open``. Each request is an ``ask``; it ends in one of ``turn``, ``again``, ``canned``,
``refused`` and ``failed``. ``close`` is the last line of a session that ended. Requests are numbered 0, 1, 2, ... as
they came, and turns as the session numbers what it samples, so that gaps are possible. Times are in seconds on the
clock of the process that wrote them.

Ids are ``types.compact`` bytes in base64, log-probabilities little-endian float32 in base64, versions runs of
``[value, count]``. A prompt is the first ``shared`` ids of the sequence (prompt and reply) of turn ``like``, then its
own; a body's list of messages the first ``shared`` items of that of the request ``like``, then its own.
"""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np

from forgejax.chat.tool_calls import ToolFormatName
from forgejax.gateway.side_calls.rules import SideCall
from forgejax.types import Purpose, SamplingLaw

FORMAT = 1
ITEM_LISTS = ("messages", "input")  # where bodies hold what was said
Runs = list[tuple[int, int]]


class OpenLine(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag_field="event", tag="open"):
    """What the session was opened with, and the settings of the gateway that its answers depend on."""

    format: int
    session: str
    purpose: Purpose
    law: SamplingLaw | None = None
    seed: int | None = None
    context_length: int
    model_name: str
    tool_format: ToolFormatName
    max_tokens_default: int | None = None
    max_tokens_limit: int | None = None
    side_calls: tuple[SideCall, ...] = ()


class AskLine(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag_field="event", tag="ask"):
    ask: int
    dialect: str
    stream: bool = False
    retries: int = 0
    key: str | None = None
    unread: list[int] = []
    left: list[int] = []
    like: int | None = None
    shared: int = 0
    body: msgspec.Raw


class TurnLine(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag_field="event", tag="turn"):
    """A completion. ``prompt`` holds the ids behind the shared ones; ``untrainable`` and the calls are the turn's."""

    ask: int
    number: int
    parent: int | None = None
    branch: str | None = None
    like: int | None = None
    shared: int = 0
    prompt: bytes
    max_tokens: int
    seed: int | None = None
    law: SamplingLaw
    ids: bytes
    logprobs: bytes
    versions: Runs
    oldest: Runs
    finish: str
    cached: int = 0
    queued_s: float = 0.0
    generate_s: float = 0.0
    requested_at: float = 0.0
    finished_at: float = 0.0
    abandoned: bool = False
    untrainable: str | None = None
    tool_calls: int = 0
    malformed: int = 0


class AgainLine(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag_field="event", tag="again"):
    ask: int
    number: int


class CannedLine(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag_field="event", tag="canned"):
    ask: int
    rule: str


class RefusedLine(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag_field="event", tag="refused"):
    ask: int
    status: int
    code: str | None = None
    message: str


class FailedLine(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag_field="event", tag="failed"):
    """``why`` is "cancelled" or what the engine said."""

    ask: int
    number: int
    why: str


class CloseLine(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag_field="event", tag="close"):
    unread: list[int] = []


RecordLine = OpenLine | AskLine | TurnLine | AgainLine | CannedLine | RefusedLine | FailedLine | CloseLine

encode_line = msgspec.json.Encoder().encode
decode_line = msgspec.json.Decoder(RecordLine).decode


def pack_runs(values: np.ndarray[Any, np.dtype[np.int32]]) -> Runs:
    """Equal neighbours as ``[value, count]``."""
    starts = [0, *(np.flatnonzero(values[1:] != values[:-1]) + 1).tolist()] if len(values) else []
    return [(int(values[start]), stop - start) for start, stop in zip(starts, [*starts[1:], len(values)], strict=False)]


def unpack_runs(runs: Runs) -> np.ndarray[Any, np.dtype[np.int32]]:
    return np.repeat(np.asarray([value for value, _ in runs], np.int32), [count for _, count in runs])


def pack_floats(values: np.ndarray[Any, np.dtype[np.float32]]) -> bytes:
    return np.asarray(values).astype("<f4", copy=False).tobytes()


def unpack_floats(data: bytes) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.frombuffer(data, "<f4").astype(np.float32)
