"""A recorded session played again: the same requests in the same order, answered with the tokens that were drawn."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace

from forgejax.chat.format import ChatFormat
from forgejax.chat.tool_calls import ToolFormatName
from forgejax.chat.tool_format import choose_tool_format, shows_tools
from forgejax.gateway.config import GatewayConfig
from forgejax.gateway.dialects import DIALECTS, Dialect
from forgejax.gateway.limits import Limits, LimitsConfig
from forgejax.gateway.metrics import GatewayMetrics
from forgejax.gateway.records.lines import TurnLine
from forgejax.gateway.records.player import Player, Prompter
from forgejax.gateway.records.reader import RecordedSession
from forgejax.gateway.records.witness import Witness, compare_turn, describe_end
from forgejax.gateway.service import Service
from forgejax.gateway.sessions import SessionLog
from forgejax.gateway.side_calls.rules import SideCallRules
from forgejax.grammar import GrammarCompiler
from forgejax.types import SessionSpec, Turn


@dataclass(frozen=True, kw_only=True)
class ReplayedSession:
    """The turns as they are now, with the times of the record, and each difference in a sentence.

    Where there is none, the turns are those that the session gave when it was closed.
    """

    turns: tuple[Turn, ...]
    differences: tuple[str, ...]


async def replay_session(
    recorded: RecordedSession,
    chat_format: ChatFormat,
    tool_format: ToolFormatName | None = None,
    dialects: Sequence[Dialect] = DIALECTS,
) -> ReplayedSession:
    """Plays ``recorded`` with the settings it was recorded with, or another ``tool_format``.

    Raises GatewayError where it cannot be played at all, ConfigError where its settings are none any more.
    """
    opening = recorded.opening
    config = GatewayConfig(
        model_name=opening.model_name,
        tool_format=tool_format or opening.tool_format,
        max_tokens_default=opening.max_tokens_default,
        max_tokens_limit=opening.max_tokens_limit,
        side_calls=opening.side_calls,
    )
    witness, prompter, metrics = Witness(), Prompter(), GatewayMetrics()
    service = Service(
        sampler=prompter,
        chat_format=chat_format,
        tool_format=choose_tool_format(config.tool_format, chat_format),
        tell_tools=not shows_tools(chat_format),
        context_length=opening.context_length,
        config=config,
        metrics=metrics,
        grammars=GrammarCompiler(chat_format.codec.spell_vocabulary()),
        # What was served once is no matter of limits any more.
        limits=Limits(LimitsConfig(messages=sys.maxsize, tools=sys.maxsize), metrics),
        side_calls=SideCallRules(config.side_calls),
        records=witness,
    )
    spec = SessionSpec(purpose=opening.purpose, law=opening.law, seed=opening.seed)
    session = SessionLog(service, spec, session_id=opening.session)
    speaks = {dialect.name: dialect for dialect in dialects}
    player = Player(recorded, service, session, prompter=prompter, witness=witness, dialects=speaks)
    try:
        await player.play()
    finally:
        turns = await session.close()
    differences = _compare(recorded, player, witness, chat_format)
    return ReplayedSession(turns=_restore_times(recorded, witness, turns), differences=tuple(differences))


def _compare(recorded: RecordedSession, player: Player, witness: Witness, chat_format: ChatFormat) -> list[str]:
    found: list[str] = []
    for line in recorded.lines:
        before = describe_end(line)
        if before is None:
            continue
        ask = line.ask  # type: ignore[union-attr]  # all that end one have it
        problem = player.asks[ask].problem
        now = witness.ends.get(ask, "never came to its session")
        if before != now:
            found.append(f"request {ask}: it {before}, and now {now}{f': {problem}' if problem else ''}")
        elif isinstance(line, TurnLine):
            found += compare_turn(line, recorded.completions[line.number], witness.draws[line.number], chat_format)
    return found


def _restore_times(recorded: RecordedSession, witness: Witness, turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
    lines = {line.number: line for line in recorded.lines if isinstance(line, TurnLine)}
    numbers = sorted(number for number, drawn in witness.draws.items() if drawn.turn is not None)
    return tuple(
        replace(turn, requested_at=lines[number].requested_at, finished_at=lines[number].finished_at)
        if number in lines
        else turn
        for number, turn in zip(numbers, turns, strict=True)
    )
