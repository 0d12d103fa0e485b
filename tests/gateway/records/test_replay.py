"""A session that is played again: the same tokens, the same tree, the same loss."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import aiohttp
import jax
import numpy as np
import pytest

from forgejax.chat import ChatFormat
from forgejax.gateway.records.lines import AgainLine, CannedLine, FailedLine, RefusedLine
from forgejax.gateway.records.reader import read_session
from forgejax.gateway.records.replay import replay_session
from forgejax.grammar import GrammarCompiler
from forgejax.learner import CreditConfig, Learner, PackConfig, PackGroups, StepConfig
from forgejax.models import PolicyConfig, abstract_policy, init_params
from forgejax.types import Dispatch, Grammar, Group, Reward, StopReason, Task, Trajectory, Turn
from tests.chat.families import save_family
from tests.gateway.fakes import TRAINING, ScriptedSampler, started
from tests.gateway.records.conversations import record_everything


@pytest.fixture(scope="module")
def recorded(chat_format: ChatFormat, tmp_path_factory: pytest.TempPathFactory) -> tuple[tuple[Turn, ...], Path]:
    folder = tmp_path_factory.mktemp("records")
    turns = asyncio.run(record_everything(chat_format, folder))
    (path,) = folder.glob("*.jsonl")
    return turns, path


def spell(turns: Sequence[Turn]) -> list[dict[str, Any]]:
    """Turns as plain data, arrays with their dtypes."""
    return [
        {
            field.name: (str(value.dtype), value.tolist()) if isinstance(value, np.ndarray) else value
            for part in (turn, turn.completion)
            for field in dataclasses.fields(part)
            if field.name != "completion"
            for value in [getattr(part, field.name)]
        }
        for turn in turns
    ]


async def test_a_session_played_again_gives_the_same_turns_with_all_that_is_said_of_them(
    chat_format: ChatFormat, recorded: tuple[tuple[Turn, ...], Path]
) -> None:
    turns, path = recorded
    session = read_session(path)
    kinds = {kind: sum(isinstance(line, kind) for line in session.lines) for kind in (AgainLine, CannedLine)}
    ended_badly = [line for line in session.lines if isinstance(line, FailedLine | RefusedLine)]

    replayed = await replay_session(session, chat_format)

    assert replayed.differences == ()
    assert spell(replayed.turns) == spell(turns)
    assert kinds == {AgainLine: 1, CannedLine: 1} and len(ended_badly) == 2
    assert [turn.parent for turn in turns[:3]] == [None, 0, 1] and turns[4].parent == 3
    assert [turn.untrainable for turn in turns if turn.untrainable] == ["side_call_title", "cancelled"]


async def test_what_is_trained_of_it_is_packed_alike_and_has_the_same_loss_to_the_last_bit(
    chat_format: ChatFormat, recorded: tuple[tuple[Turn, ...], Path]
) -> None:
    turns, path = recorded
    replayed = await replay_session(read_session(path), chat_format)
    policy = PolicyConfig(
        vocab_size=chat_format.vocab_size, num_layers=1, d_model=8, num_heads=2, num_kv_heads=1, d_ff=8
    )
    learner = Learner(abstract_policy(policy)[0], init_params(policy, seed=0), StepConfig())
    pack_groups = PackGroups(credit=CreditConfig(), packing=PackConfig(row_length=1024, rows=1, trunks=False))

    steps = [pack_groups([make_group(each)]) for each in (turns, replayed.turns)]
    sums = [learner.gradient(step.packed, version=3) for step in steps]

    assert steps[0].packed.stats == steps[1].packed.stats and steps[0].untrained == steps[1].untrained
    assert steps[0].packed.stats.trained_tokens > 20
    for before, now in ((steps[0].packed.batches, steps[1].packed.batches), (sums[0], sums[1])):
        jax.tree.map(np.testing.assert_array_equal, before, now)


async def test_another_template_is_told_with_the_turn_the_token_and_what_it_read(
    tmp_path: Path, recorded: tuple[tuple[Turn, ...], Path]
) -> None:
    other = ChatFormat.load(save_family(tmp_path / "qwen2.5", "qwen2.5"))

    replayed = await replay_session(read_session(recorded[1]), other)

    assert any(each.startswith("turn 0: its prompt had ") and "now reads" in each for each in replayed.differences)


def make_group(turns: Sequence[Turn]) -> Group:
    """Two episodes of one task: that of the turns, which succeeded, and its first turn, which did not."""
    end = max(turn.finished_at for turn in turns)
    return Group(
        dispatch=Dispatch(index=0, attempt=0, version=3),
        task=Task(id="t", question="?", payload={}, family="f", level="easy"),
        trajectories=tuple(
            Trajectory(
                task_id="t",
                session_id=str(member),
                member=member,
                turns=tuple(kept),
                rewards=(Reward(kind="outcome", value=outcome, at=end),),
                outcome=outcome,
                started_at=turns[0].requested_at,
                finished_at=end,
                stop_reason=StopReason.COMPLETED,
            )
            for member, (kept, outcome) in enumerate(((turns, 1.0), (turns[:1], 0.0)))
        ),
    )


async def test_a_request_whose_agent_left_while_its_schema_compiled_ends_in_its_record_and_in_the_replay(
    chat_format: ChatFormat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway = await started(ScriptedSampler(chat_format, '{"a":1}<|im_end|>'), record=str(tmp_path))
    session = gateway.open(TRAINING)
    prepare = GrammarCompiler.prepare

    async def compile_slowly(grammars: GrammarCompiler, grammar: Grammar) -> None:
        await asyncio.sleep(30 if "slow" in grammar.schema else 0)
        await prepare(grammars, grammar)

    monkeypatch.setattr(GrammarCompiler, "prepare", compile_slowly)
    async with aiohttp.ClientSession(headers={"Authorization": f"Bearer {session.api_key}"}) as http:
        for name, patience_s in (("slow", 0.3), ("a", 30)):
            schema = {"type": "object", "properties": {name: {"type": "integer"}}}
            body = {"messages": [{"role": "user", "content": "?"}], "guided_json": schema}
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(patience_s):
                    async with http.post(f"{session.base_url}/chat/completions", json=body) as response:
                        assert response.status == 200
            await asyncio.sleep(0.1)
    turns = await gateway.close(session.id)
    await gateway.stop()
    monkeypatch.undo()
    recorded = read_session(tmp_path / f"{session.id}.jsonl")

    replayed = await replay_session(recorded, chat_format)

    ended = [(line.ask, line.why) for line in recorded.lines if isinstance(line, FailedLine)]
    assert ended == [(0, "cancelled")] and len(turns) == 1
    assert replayed.differences == () and spell(replayed.turns) == spell(turns)
