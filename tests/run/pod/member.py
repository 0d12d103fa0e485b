"""A process of a job that makes updates on recorded groups, as a program of its own: ``python -m`` with where the
job meets, its number of processes, its own, how many devices they have together, and a folder for what comes of it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

from forgejax.errors import ForgejaxError
from forgejax.learner import Learner, PackGroups
from forgejax.models import abstract_policy
from forgejax.run.checkpoint import Checkpoints
from forgejax.run.config import TrainConfig
from forgejax.run.pod.follow import follow
from forgejax.run.pod.job import JobMember
from forgejax.run.pod.lead import LeadingLearner
from forgejax.run.pod.orders import NOBODY_ELSE, Orders
from forgejax.run.preflight import check_mesh
from forgejax.run.warm_start import find_first_weights
from forgejax.sharding import DistributedConfig, Layout, Replicas, build_mesh, pick_engine_mesh, resolve
from tests.learner.recorded_steps import read_groups
from tests.run.tiny_run import tiny_config

STEPS = 2


class NoPlace:
    """Of a job without data of its own."""

    def get_state(self) -> dict[str, int]:
        return {}

    def set_state(self, state: dict[str, int]) -> None:
        pass


def make_config(folder: Path, mesh: str, *overrides: str) -> TrainConfig:
    return tiny_config(folder, f"--mesh={mesh}", "--policy.num-heads=4", "--policy.num-kv-heads=2", *overrides)


def make_learner(config: TrainConfig, orders: Orders = NOBODY_ELSE) -> tuple[Learner, Layout]:
    layout = Layout(mesh=build_mesh(resolve(config.mesh)), shared=True)
    orders.give("begin", True)
    params = find_first_weights(config.policy, layout, seed=config.run.seed, fresh=True)
    step = config.step.ending_at(config.run.steps)
    graphdef = abstract_policy(config.policy)[0]
    return LeadingLearner(graphdef, params, step, orders=orders, phase="run", layout=layout), layout


def train(learner: Learner, config: TrainConfig) -> dict[str, np.ndarray]:
    """Loss and gradient norm of each of the recorded steps, and a score after the last."""
    packer = PackGroups(credit=config.credit, packing=config.packing, row_shards=learner.row_shards)
    steps = [packer(groups).packed for groups in read_groups()[:STEPS]]
    metrics = [learner.update(step, version) for version, step in enumerate(steps)]
    return {
        "loss": np.array([float(each["loss"]) for each in metrics]),
        "grad_norm": np.array([float(each["grad_norm"]) for each in metrics]),
        "score": np.concatenate([np.asarray(each).ravel() for each in learner.score(steps[0])]),
    }


def lead(config: TrainConfig, job: JobMember, folder: Path) -> None:
    """Trains, saves; then restores what was saved by others, and says what its weights are."""
    import jax  # noqa: PLC0415

    orders = job.leader
    assert orders is not None
    learner, layout = make_learner(config, orders)
    found = train(learner, config)
    engine = pick_engine_mesh(config.rollout.mesh, len(jax.local_devices()))
    replicas = Replicas(engine, layout, abstract_policy(config.policy)[1], slice_bytes=256)
    orders.give("gather")
    weights = {f"w{at}": np.asarray(x) for at, x in enumerate(jax.tree.leaves(replicas.take(learner.weights)))}
    ours = Checkpoints(folder / "ours", 2, orders)
    ours.save(5, learner.state, {"figure": 5}, NoPlace())
    ours.wait()
    ours.close()
    theirs = Checkpoints(folder / "theirs", 2, orders)
    _, learner.state, _ = theirs.restore(learner.state, NoPlace())
    found["restored"] = np.array(learner.digest())
    kept: dict[str, Any] = found | weights
    np.savez(folder / "found.npz", **kept)


def main(coordinator: str, processes: str, number: str, mesh: str, folder: str) -> int:
    config = make_config(Path(folder) / "runs", mesh)
    told = DistributedConfig(coordinator=coordinator, processes=int(processes), process_id=int(number), start_s=60.0)
    with JobMember(config, told) as job:
        check_mesh(config, job.processes)
        code = 0
        if job.followed is not None:
            code = follow(config, job.followed, job.own)
        else:
            lead(config, job, Path(folder))
        job.end(code)
    return code


if __name__ == "__main__":
    try:
        sys.exit(main(*sys.argv[1:6]))
    except ForgejaxError as error:
        print(error, file=sys.stderr)
        sys.exit(1)
