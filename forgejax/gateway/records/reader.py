"""Reads the file of a session."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from forgejax.errors import GatewayError
from forgejax.gateway.records.lines import (
    FORMAT,
    ITEM_LISTS,
    AskLine,
    OpenLine,
    RecordLine,
    TurnLine,
    decode_line,
    unpack_floats,
    unpack_runs,
)
from forgejax.types import Completion, FinishReason
from forgejax.types.compact import unpack_ids


@dataclass(frozen=True, kw_only=True)
class RecordedSession:
    """A session as its file tells it.

    ``lines`` are all but the first, ``bodies`` the whole bodies of its requests and ``completions`` those of its turns,
    by their numbers. ``torn``: the last line was cut off by the end of the process, and is left out.
    """

    opening: OpenLine
    lines: tuple[RecordLine, ...]
    bodies: Mapping[int, Mapping[str, Any]]
    completions: Mapping[int, Completion]
    torn: bool


def read_session(path: Path) -> RecordedSession:
    """Raises GatewayError for what is no record, or is damaged elsewhere than at its end."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise GatewayError(f"{path} cannot be read: {error}; give the file of a recorded session") from error
    *whole, rest = raw.split(b"\n")
    lines = [_read_line(path, number, line) for number, line in enumerate(whole, start=1)]
    opening, later = lines[0] if lines else None, lines[1:]
    if not isinstance(opening, OpenLine):
        raise GatewayError(f"{path} does not begin as the record of a session does; give a file that --record has made")
    if opening.format != FORMAT:
        raise GatewayError(f"{path} is of format {opening.format}, and this is made for {FORMAT}; use the version then")
    bodies: dict[int, Mapping[str, Any]] = {}
    completions: dict[int, Completion] = {}
    for number, line in enumerate(later, start=2):
        try:
            if isinstance(line, AskLine):
                bodies[line.ask] = _join_body(line, bodies)
            elif isinstance(line, TurnLine):
                completions[line.number] = _join_completion(opening.session, line, completions)
        except (KeyError, ValueError, TypeError, IndexError) as error:
            raise GatewayError(
                f"{path}, line {number} does not fit those before it: {error!r}; it is damaged"
            ) from error
    return RecordedSession(opening=opening, lines=tuple(later), bodies=bodies, completions=completions, torn=bool(rest))


def _read_line(path: Path, number: int, line: bytes) -> RecordLine:
    try:
        return decode_line(line)
    except msgspec.MsgspecError as error:
        raise GatewayError(f"{path}, line {number} cannot be read: {error}; it is damaged") from error


def _join_body(line: AskLine, bodies: Mapping[int, Mapping[str, Any]]) -> Mapping[str, Any]:
    body: dict[str, Any] = json.loads(bytes(line.body))
    if line.like is None:
        return body
    field = next(name for name in ITEM_LISTS if isinstance(body.get(name), list))
    before = next(bodies[line.like][name] for name in ITEM_LISTS if isinstance(bodies[line.like].get(name), list))
    return {**body, field: [*before[: line.shared], *body[field]]}


def _join_completion(session: str, line: TurnLine, completions: Mapping[int, Completion]) -> Completion:
    prompt_ids = unpack_ids(line.prompt)
    if line.like is not None:
        before = completions[line.like]
        known = np.concatenate([before.prompt_ids, before.token_ids])[: line.shared]
        if len(known) != line.shared:
            raise ValueError(f"turn {line.like} has {len(known)} ids, and {line.shared} of them are wanted")
        prompt_ids = np.concatenate([known, prompt_ids])
    return Completion(
        request_id=f"{session}-{line.number}",
        prompt_ids=prompt_ids.astype(np.int32, copy=False),
        token_ids=unpack_ids(line.ids),
        logprobs=unpack_floats(line.logprobs),
        versions=unpack_runs(line.versions),
        oldest_versions=unpack_runs(line.oldest),
        finish_reason=FinishReason(line.finish),
        law=line.law,
        cached_tokens=line.cached,
        queued_s=line.queued_s,
        generate_s=line.generate_s,
    )
