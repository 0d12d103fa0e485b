"""Builders of small samples, turns and groups."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from forgejax.learner.packing.samples import Sample
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


def sample(
    context: Sequence[int],
    sampled: Sequence[int],
    *,
    name: str = "r",
    advantage: float = 1.0,
    old_logp: Sequence[float] | None = None,
    temperature: float = 1.0,
    version: int = 0,
) -> Sample:
    n = len(sampled)
    return Sample(
        request_id=name,
        context_ids=np.array(context, np.int32),
        token_ids=np.array(sampled, np.int32),
        old_logp=np.array([-2.0] * n if old_logp is None else old_logp, np.float32),
        versions=np.full(n, version, np.int32),
        oldest_versions=np.full(n, version, np.int32),
        advantage=advantage,
        temperature=temperature,
    )


def random_group(
    rng: np.random.Generator,
    *,
    vocab: int = 4,
    samples: int = 8,
    longest: int = 12,
    temperatures: Sequence[float] = (1.0,),
) -> list[Sample]:
    """Samples over a small vocabulary, so that prefixes, duplicates and strict prefixes abound."""
    found: list[Sample] = []
    for index in range(samples):
        kind = rng.integers(4) if found else 0
        if kind == 0:  # a root of its own, likely to share a few tokens
            ids = rng.integers(0, vocab, rng.integers(2, longest + 1))
        else:
            other = found[rng.integers(len(found))]
            ids = np.concatenate([other.context_ids, other.token_ids])
            if kind == 1:  # continues another sample
                ids = np.concatenate([ids, rng.integers(0, vocab, rng.integers(1, 4))])
            elif kind == 2:  # a strict prefix of it
                ids = ids[: max(2, len(ids) - 1)]
        split = int(rng.integers(1, len(ids)))
        found.append(
            sample(
                ids[:split].tolist(),
                ids[split:].tolist(),
                name=f"r{index}",
                advantage=float(rng.normal()),
                old_logp=rng.normal(-1.5, 1.5, len(ids) - split).tolist(),
                temperature=float(rng.choice(temperatures)),
            )
        )
    return found


def turn(
    index: int,
    *,
    requested_at: float,
    prompt: Sequence[int] = (1, 2),
    sampled: Sequence[int] = (3, 4),
    untrainable: str | None = None,
    temperature: float = 1.0,
    request_id: str | None = None,
) -> Turn:
    n = len(sampled)
    law = SamplingLaw(temperature=temperature)
    completion = Completion(
        request_id=request_id or f"q{index}",
        prompt_ids=np.array(prompt, np.int32),
        token_ids=np.array(sampled, np.int32),
        logprobs=np.full(n, -1.0, np.float32),
        versions=np.zeros(n, np.int32),
        oldest_versions=np.zeros(n, np.int32),
        finish_reason=FinishReason.STOP,
        law=law,
    )
    return Turn(
        index=index,
        completion=completion,
        parent=None,
        requested_at=requested_at,
        finished_at=requested_at + 0.5,
        requested_law=law,
        untrainable=untrainable,
    )


def trajectory(
    member: int, turns: Sequence[Turn], rewards: Sequence[tuple[float, float]], *, masked: str | None = None
) -> Trajectory:
    """``rewards`` are pairs of value and time."""
    return Trajectory(
        task_id="t",
        session_id=f"s{member}",
        member=member,
        turns=tuple(turns),
        rewards=tuple(Reward(kind="outcome", value=value, at=at) for value, at in rewards),
        outcome=0.0,
        started_at=0.0,
        finished_at=100.0,
        stop_reason=StopReason.COMPLETED,
        masked=masked,
    )


def group(trajectories: Sequence[Trajectory], index: int = 0) -> Group:
    return Group(
        dispatch=Dispatch(index=index, attempt=0, version=0),
        task=Task(id="t", family="f", level="easy", question="?"),
        trajectories=tuple(trajectories),
    )
