"""A folder of records: one file a session, which is written to as things happen and never changed."""

from __future__ import annotations

import hashlib
import logging
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import msgspec
import numpy as np

from forgejax.errors import GatewayError
from forgejax.gateway.asked import AskedRequest
from forgejax.gateway.config import GatewayConfig
from forgejax.gateway.metrics import GatewayMetrics
from forgejax.gateway.records.base import RecordedDraw, SessionRecord, SessionRecords
from forgejax.gateway.records.lines import (
    FORMAT,
    ITEM_LISTS,
    AgainLine,
    AskLine,
    CannedLine,
    CloseLine,
    FailedLine,
    OpenLine,
    RecordLine,
    RefusedLine,
    TurnLine,
    encode_line,
    pack_floats,
    pack_runs,
)
from forgejax.gateway.refusals import RefusedError
from forgejax.gateway.side_calls.rules import SideCall
from forgejax.types import SessionSpec
from forgejax.types.compact import Tip, Tips, pack_ids

_log = logging.getLogger(__name__)
_ASKS_KEPT = 8  # whose messages a later one may begin with


class RecordFolder(SessionRecords):
    """Keeps sessions in ``path``, each in ``ID.jsonl``. Raises GatewayError where that cannot be a folder.

    Each line is handed to the operating system before what it tells of goes on: a killed process loses nothing it has
    answered, a machine that loses its power may lose the last seconds. A session that cannot be written is served all
    the same; its file then ends early, and ``record_errors`` counts it.
    """

    def __init__(self, path: Path, config: GatewayConfig, context_length: int, metrics: GatewayMetrics) -> None:
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise GatewayError(f"nothing can be recorded in {path}: {error}; give another folder") from error
        self._path, self._config, self._context, self._metrics = path, config, context_length, metrics

    def open(self, session_id: str, spec: SessionSpec) -> SessionRecord:
        config = self._config
        line = OpenLine(
            format=FORMAT,
            session=session_id,
            purpose=spec.purpose,
            law=spec.law,
            seed=spec.seed,
            context_length=self._context,
            model_name=config.model_name,
            tool_format=config.tool_format,
            max_tokens_default=config.max_tokens_default,
            max_tokens_limit=config.max_tokens_limit,
            side_calls=config.side_calls,
        )
        return FileRecord(self._path / f"{session_id}.jsonl", line, self._metrics)


class FileRecord(SessionRecord):
    """The file of one session, made when its first request comes."""

    def __init__(self, path: Path, opening: OpenLine, metrics: GatewayMetrics) -> None:
        self._path, self._opening, self._metrics = path, opening, metrics
        self._file: IO[bytes] | None = None
        self._failed = False
        self._calls = 0
        self._tips: Tips[int] = Tips()
        self._lists: deque[tuple[int, list[bytes]]] = deque(maxlen=_ASKS_KEPT)

    def begin(self, asked: AskedRequest, unread: frozenset[int], left: frozenset[int]) -> int:
        number, self._calls = self._calls, self._calls + 1
        like, shared, body = self._share_items(number, asked.body)
        self._write(
            AskLine(
                ask=number,
                dialect=asked.dialect,
                stream=asked.stream,
                retries=asked.hints.count,
                key=asked.hints.key,
                unread=sorted(unread),
                left=sorted(left),
                like=like,
                shared=shared,
                body=msgspec.Raw(msgspec.json.encode(body)),
            )
        )
        return number

    def repeat(self, ask: int, number: int) -> None:
        self._write(AgainLine(ask=ask, number=number))

    def can(self, ask: int, rule: SideCall) -> None:
        self._write(CannedLine(ask=ask, rule=rule.name))

    def draw(self, ask: int, drawn: RecordedDraw) -> None:
        completion, turn = drawn.completion, drawn.turn
        prompt_ids = np.asarray(drawn.prompt.ids, np.int32)
        tip = Tip(key=drawn.number, prompt_ids=prompt_ids, sampled_ids=np.asarray(completion.token_ids, np.int32))
        like, shared = self._tips.add(tip)
        self._write(
            TurnLine(
                ask=ask,
                number=drawn.number,
                parent=drawn.prompt.parent,
                branch=drawn.prompt.branch,
                like=like,
                shared=shared,
                prompt=pack_ids(prompt_ids[shared:]),
                max_tokens=drawn.request.max_tokens,
                seed=drawn.request.seed,
                law=completion.law,
                ids=pack_ids(completion.token_ids),
                logprobs=pack_floats(completion.logprobs),
                versions=pack_runs(completion.versions),
                oldest=pack_runs(completion.oldest_versions),
                finish=completion.finish_reason.value,
                cached=completion.cached_tokens,
                queued_s=completion.queued_s,
                generate_s=completion.generate_s,
                requested_at=0.0 if turn is None else turn.requested_at,
                finished_at=0.0 if turn is None else turn.finished_at,
                abandoned=drawn.abandoned,
                untrainable=None if turn is None else turn.untrainable,
                tool_calls=0 if turn is None else turn.tool_calls,
                malformed=0 if turn is None else turn.malformed_tool_calls,
            )
        )

    def refuse(self, ask: int, refusal: RefusedError) -> None:
        self._write(RefusedLine(ask=ask, status=refusal.status, code=refusal.code, message=refusal.message))

    def fail(self, ask: int, number: int, why: str) -> None:
        self._write(FailedLine(ask=ask, number=number, why=why))

    def close(self, unread: frozenset[int]) -> None:
        if self._file is not None:
            self._write(CloseLine(unread=sorted(unread)))
        if self._file is not None:
            self._file.close()
        self._failed = True  # nothing more is written

    def _share_items(self, number: int, body: Mapping[str, Any]) -> tuple[int | None, int, Mapping[str, Any]]:
        """The earlier request whose messages this one's begin with, how many of them, and the body without these."""
        field = next((name for name in ITEM_LISTS if isinstance(body.get(name), list)), None)
        if field is None:
            return None, 0, body
        digests = [hashlib.blake2b(msgspec.json.encode(item), digest_size=16).digest() for item in body[field]]
        like, shared = None, 0
        for ask, earlier in self._lists:
            same = _count_same(earlier, digests)
            if same > shared:
                like, shared = ask, same
        self._lists.append((number, digests))
        return like, shared, body if like is None else {**body, field: body[field][shared:]}

    def _write(self, line: RecordLine) -> None:
        if self._failed:
            return
        try:
            if self._file is None:
                self._file = self._path.open("xb", buffering=0)
                self._put(encode_line(self._opening))
            self._put(encode_line(line))
        except OSError as error:
            self._failed = True
            self._metrics.record_errors.inc()
            _log.error("%s ends here, for it cannot be written: %s; the session goes on", self._path, error)

    def _put(self, line: bytes) -> None:
        assert self._file is not None
        unwritten = memoryview(line + b"\n")
        while unwritten:
            unwritten = unwritten[self._file.write(unwritten) or 0 :]


def _count_same(a: Sequence[bytes], b: Sequence[bytes]) -> int:
    same = 0
    for one, other in zip(a, b, strict=False):
        if one != other:
            break
        same += 1
    return same
