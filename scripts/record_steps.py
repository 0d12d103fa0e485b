"""Records the first five steps of a quickstart for tests/learner/test_learner.py, from the journal of a run.

    python scripts/train.py --run.steps 5 --tasks.eval-tasks 0 --run.eval-every 0 --run.name recorded
    python scripts/record_steps.py runs/recorded

Only where the arithmetic of a step is meant to change: the recording guards it everywhere else.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import numpy as np

from forgejax.learner import Learner, PackGroups
from forgejax.pool.journal import Journal
from forgejax.pool.pool import read_groups
from forgejax.pool.schema import sqlite_url
from forgejax.run.config import TrainConfig
from forgejax.types import Group
from tests.learner import recorded_steps

_STEPS = 5


def main(run: Path) -> None:
    # As the test runs: compiled quickly instead of well.
    jax.config.update("jax_disable_most_optimizations", True)
    config = recorded_steps.quickstart()
    learner = recorded_steps.fresh_learner(config)
    steps = [as_drawn_by(learner, config, groups) for groups in groups_of(run)]
    recorded_steps.write_groups(steps)
    recording = recorded_steps.Recording(
        machine=recorded_steps.this_machine(), steps=recorded_steps.train_on(learner, config, steps)
    )
    recorded_steps.write_recording(recording)
    for number, step in enumerate(recording.steps):
        print(f"step {number}: loss {float.fromhex(step.loss)}, gradient norm {float.fromhex(step.grad_norm)}")


def groups_of(run: Path) -> list[list[Group]]:
    """The groups that each of the first steps trained on, in their order in the batch."""
    journal = Journal.open(sqlite_url(run / "journal.sqlite"))
    kept = {group.dispatch.index: group for group in read_groups(journal)}
    taken = [record for record in journal.consumption() if record.kind == "taken" and record.step < _STEPS]
    journal.close()
    return [[kept[record.index] for record in taken if record.step == step] for step in range(_STEPS)]


def as_drawn_by(learner: Learner, config: TrainConfig, groups: Sequence[Group]) -> list[Group]:
    """The groups with the learner's own log-probabilities in place of those recorded."""
    packed = PackGroups(credit=config.credit, packing=config.packing)(groups).packed
    scored = [np.asarray(scores) for scores in learner.score(packed)]
    logprobs = {
        placement.request_id: scored[placement.batch][placement.row, placement.start : placement.stop]
        for placement in packed.placements
    }

    def rescored(group: Group) -> Group:
        trajectories = [
            dataclasses.replace(
                trajectory,
                turns=tuple(
                    dataclasses.replace(
                        turn,
                        completion=dataclasses.replace(
                            turn.completion,
                            logprobs=logprobs.get(turn.completion.request_id, turn.completion.logprobs),
                        ),
                    )
                    for turn in trajectory.turns
                ),
            )
            for trajectory in group.trajectories
        ]
        return dataclasses.replace(group, trajectories=tuple(trajectories))

    return [rescored(group) for group in groups]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
