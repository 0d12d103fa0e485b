"""A follower: its part of the learner, of checkpoints and of publications, and its engine, as the leader orders."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax

from forgejax.errors import PodError
from forgejax.grammar import GrammarCompiler
from forgejax.learner import Learner, PackedStep
from forgejax.models import abstract_policy
from forgejax.rollout import PolicyEngine
from forgejax.run.checkpoint import Shards, read_shards, write_shards
from forgejax.run.config import TrainConfig
from forgejax.run.pod.followed import Followed
from forgejax.run.pod.hello import Hello
from forgejax.run.pod.host_engine import HostEngine
from forgejax.run.pod.lead import Phase
from forgejax.run.preflight import load_chat
from forgejax.run.warm_start import find_first_weights
from forgejax.sharding import Layout, Replicas, build_mesh, pick_engine_mesh, resolve

_ASKED = frozenset({"see_run", "serve", "await_publication"})


def follow(config: TrainConfig, followed: Followed, own: Hello) -> int:
    """Does its part until the leader ends the job; gives the exit code. Raises PodError where the leader refuses."""
    with ExitStack() as stack:
        follower = Follower(config, followed, own, stack)
        return followed.carry_out(follower.list_orders(), _ASKED)


class Follower:
    """What each order means here. For one thread."""

    def __init__(self, config: TrainConfig, followed: Followed, own: Hello, stack: ExitStack):
        self._config, self._followed, self._own, self._stack = config, followed, own, stack
        self._layout = Layout(mesh=build_mesh(resolve(config.mesh)), shared=True)
        graphdef, abstract = abstract_policy(config.policy)
        self._graphdef = graphdef
        engine_mesh = pick_engine_mesh(config.rollout.mesh, len(jax.local_devices()))
        self._replicas = Replicas(engine_mesh, self._layout, abstract)
        self._params: Any = None
        self._learner: Learner | None = None
        self._shards: Shards | None = None
        self._engine: HostEngine | None = None

    def list_orders(self) -> dict[str, Callable[..., Any]]:
        """By name."""
        learning = (self.begin, self.make_learner, self.update, self.score, self.copy_params, self.digest, self.compile)
        keeping = (self.see_run, self.write_tree, self.read_tree, self.open_checkpoints, self.save, self.restore)
        serving = (self.serve, self.publish, self.await_publication, self.gather)
        return {order.__name__: order for order in (*learning, *keeping, *serving)}

    # -- Learning ----------------------------------------------------------------------------------------------------

    def begin(self, fresh: bool) -> None:
        """The first weights; a run that goes on only needs arrays to restore into."""
        config = self._config
        self._params = find_first_weights(config.policy, self._layout, seed=config.run.seed, fresh=fresh)

    def make_learner(self, phase: Phase) -> None:
        config = self._config
        base = config.step
        step = config.warm_start.step_config(base) if phase == "warm_start" else base.ending_at(config.run.steps)
        params, self._params = self._params, None
        self._learner = Learner(self._graphdef, params, step, layout=self._layout)

    def update(self, step: PackedStep, version: int) -> None:
        self._require_learner().update(step, version)

    def score(self, step: PackedStep) -> None:
        self._require_learner().score(step)

    def compile(self, step: PackedStep) -> None:
        self._require_learner().compile(step)

    def copy_params(self) -> None:
        self._params = self._require_learner().params()

    def digest(self) -> None:
        self._require_learner().digest()

    # -- Keeping -----------------------------------------------------------------------------------------------------

    def see_run(self, path: str) -> None:
        """Raises PodError where this host does not see the run's folder."""
        if not Path(path).is_dir():
            raise PodError(
                f"there is no folder {path} here; every host writes its part of a checkpoint there: put --run.root "
                "where all of them see it under the same path"
            )

    def write_tree(self, path: str) -> None:
        write_shards(Path(path), self._params)

    def read_tree(self, path: str) -> None:
        self._params = read_shards(Path(path), self._params)

    def open_checkpoints(self, directory: str) -> None:
        self._shards = Shards(Path(directory))
        self._stack.callback(self._shards.close)

    def save(self, step: int) -> None:
        assert self._shards is not None
        self._shards.wait()
        self._shards.save(step, self._require_learner().state, {}, {})

    def restore(self, step: int) -> None:
        assert self._shards is not None
        learner = self._require_learner()
        learner.state = self._shards.restore(step, learner.state)[0]

    # -- Serving -----------------------------------------------------------------------------------------------------

    def serve(self, folder: str) -> str:
        """Begins to serve this host's engine; gives its address. Its log lies in a folder of its own in ``folder``."""
        engine = PolicyEngine(self._config.policy, self._config.engine, self._replicas.engine)
        chat = load_chat(self._config)
        log = Path(folder) / f"process-{self._own.process}" / "requests.log"
        grammars = GrammarCompiler(chat.codec.spell_vocabulary())
        served = HostEngine(engine, log, host=self._followed.address, secret=self._followed.secret, grammars=grammars)
        self._engine = self._stack.enter_context(served)
        return served.url

    def publish(self, transfer: str, version: int) -> None:
        assert self._engine is not None
        self._engine.hand_over(transfer, self._replicas.take(self._require_learner().weights), version)

    def await_publication(self) -> None:
        """What was published is here: orders are carried out one after another."""

    def gather(self) -> None:
        """Its part of whole weights on the leader's host; what arrives here is forgotten."""
        self._replicas.take(self._require_learner().weights)

    def _require_learner(self) -> Learner:
        assert self._learner is not None
        return self._learner
