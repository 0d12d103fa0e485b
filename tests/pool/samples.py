"""Small groups and a pool on a journal of its own."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from forgejax.pool.journal import Journal
from forgejax.pool.pool import Pool, PoolConfig
from forgejax.pool.schema import sqlite_url
from forgejax.pool.window import WindowConfig
from forgejax.types import (
    Completion,
    Dispatch,
    FinishReason,
    Group,
    Reward,
    SamplingLaw,
    StopReason,
    Task,
    Trajectory,
    Turn,
)


def group_of(dispatch: Dispatch, tokens: int = 3) -> Group:
    """One trajectory of one turn with ``tokens`` sampled tokens, all equal to the group's index."""
    ids = np.full(tokens, dispatch.index, np.int32)
    law = SamplingLaw()
    completion = Completion(
        request_id=f"r{dispatch.index}",
        prompt_ids=np.arange(1, 5, dtype=np.int32),
        token_ids=ids,
        logprobs=np.linspace(-3.0, -0.1, tokens, dtype=np.float32),
        versions=np.full(tokens, dispatch.version, np.int32),
        oldest_versions=np.full(tokens, dispatch.version, np.int32),
        finish_reason=FinishReason.STOP,
        law=law,
    )
    turn = Turn(index=0, completion=completion, parent=None, requested_at=1.0, finished_at=2.5, requested_law=law)
    trajectory = Trajectory(
        task_id=f"t{dispatch.index}",
        session_id=f"s{dispatch.index}",
        member=0,
        turns=(turn,),
        rewards=(Reward(kind="outcome", value=1.0, at=2.5),),
        outcome=1.0,
        started_at=0.5,
        finished_at=3.0,
        stop_reason=StopReason.COMPLETED,
    )
    task = Task(id=f"t{dispatch.index}", family="f", level="easy", question="?")
    return Group(dispatch=dispatch, task=task, trajectories=(trajectory,))


def tree_group(
    dispatch: Dispatch, episodes: Sequence[Sequence[int | None]], *, tokens: int, prompt: int, told: int, vocab: int
) -> Group:
    """Episodes of random ids, alike in their first prompt. Each is the parents of its turns: a turn's prompt is its
    parent's whole sequence and ``told`` more ids, or ``prompt`` new ids where it has none."""
    rng = np.random.default_rng(dispatch.index)

    def draw(count: int) -> np.ndarray:
        return rng.integers(0, vocab, count, dtype=np.int32)

    first, law = draw(prompt), SamplingLaw()
    trajectories = []
    for member, parents in enumerate(episodes):
        turns: list[Turn] = []
        for number, parent in enumerate(parents):
            if parent is None:
                ids = first if number == 0 else draw(prompt)
            else:
                before = turns[parent].completion
                ids = np.concatenate([before.prompt_ids, before.token_ids, draw(told)])
            versions = np.full(tokens, dispatch.version, np.int32)
            completion = Completion(
                request_id=f"{dispatch.index}-{member}-{number}",
                prompt_ids=ids,
                token_ids=draw(tokens),
                logprobs=rng.normal(size=tokens).astype(np.float32),
                versions=versions + (np.arange(tokens, dtype=np.int32) > tokens // 2),
                oldest_versions=versions,
                finish_reason=FinishReason.STOP,
                law=law,
            )
            turns.append(
                Turn(
                    index=number,
                    completion=completion,
                    parent=parent,
                    requested_at=float(number),
                    finished_at=number + 0.5,
                    requested_law=law,
                )
            )
        trajectories.append(
            Trajectory(
                task_id="t",
                session_id=f"s{dispatch.index}-{member}",
                member=member,
                turns=tuple(turns),
                rewards=(Reward(kind="outcome", value=1.0, at=2.5),),
                outcome=1.0,
                started_at=0.0,
                finished_at=float(len(parents)),
                stop_reason=StopReason.COMPLETED,
            )
        )
    return Group(
        dispatch=dispatch,
        task=Task(id="t", family="f", level="easy", question="?"),
        trajectories=tuple(trajectories),
    )


def open_pool(
    folder: Path, *, n: int = 4, p: int = 2, w: int = 0, resume_step: int = 0, timeout_s: float = 5.0, k: int = 1
) -> Pool:
    config = PoolConfig(
        window=WindowConfig(in_flight=n, groups_per_step=p, window=w), take_timeout_s=timeout_s, max_drop_batches=k
    )
    return Pool.open(Journal.open(sqlite_url(folder / "pool.sqlite")), config, resume_step=resume_step)
