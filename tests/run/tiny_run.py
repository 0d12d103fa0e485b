"""The quickstart, shrunk until a test can afford it: a one-layer policy, four engine slots, two steps."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from forgejax.models import abstract_policy
from forgejax.pool.journal import Journal
from forgejax.report.final.summary import Summary
from forgejax.report.live.progress import NoProgress
from forgejax.rollout import RequestLog
from forgejax.run import rundir
from forgejax.run.build import play_run
from forgejax.run.checkpoint import load_trained
from forgejax.run.conclude import summarise
from forgejax.run.config import TrainConfig, load_config, to_mapping
from forgejax.run.loop import Outcome
from forgejax.run.rundir import RunDir

REPOSITORY = Path(__file__).parents[2]
QUICKSTART = REPOSITORY / "configs" / "quickstart.toml"
GROUP = 4
SHRUNK = (
    f"--tokenizer={REPOSITORY / 'examples' / 'quickstart' / 'tokenizer'}",
    "--mesh=cpu-2",
    "--run.steps=2",
    f"--run.group-size={GROUP}",
    "--run.eval-every=0",
    "--run.checkpoint-every=1",
    "--run.probe-every=1",
    "--policy.num-layers=1",
    "--policy.d-model=16",
    "--policy.num-heads=2",
    "--policy.num-kv-heads=1",
    "--policy.d-ff=32",
    "--warm-start.steps=0",
    "--packing.row-length=128",
    "--packing.block-size=32",
    "--packing.rows=2",
    "--pool.take-timeout-s=60",
    "--pool.window.in-flight=4",
    "--pool.window.groups-per-step=2",
    "--engine.slots=4",
    "--engine.max-context=128",
    "--engine.prefill-buckets", "64",
    "--gateway.port=0",
    "--agent.kind=coroutine",
    "--agent.function=tests.run.tiny_agent:play",
    "--agent.deadline-s=120",
    "--tasks.eval-tasks=8",
)  # fmt: skip


def tiny_config(root: Path, *overrides: str) -> TrainConfig:
    """The shrunk quickstart with its runs under ``root``."""
    return load_config(QUICKSTART, (*SHRUNK, f"--run.root={root}", *overrides))


def tiny_place(config: TrainConfig) -> RunDir:
    """A new run directory for it, as the command line makes one."""
    place = rundir.create(Path(config.run.root), config.run.name, "tiny")
    place.save_config(to_mapping(config))
    return place


class Notes(NoProgress):
    """What a run tells."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, text: str) -> None:
        self.lines.append(text)


class NotesAndWaits(Notes):
    """And how far that was, as each wait began, which the run waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []

    @contextlib.contextmanager
    def wait(self, describe: Callable[[], str]) -> Iterator[None]:
        self.waits.append(describe())
        yield


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ended:
    """A run that has ended."""

    config: TrainConfig
    path: Path
    outcome: Outcome
    notes: list[str]
    waits: list[str]

    @property
    def summary(self) -> Summary:
        return summarise(self.outcome, self.config)


def play(root: Path, *overrides: str) -> Ended:
    """A tiny run from its beginning to its end."""
    config = tiny_config(root, *overrides)
    return go_on(config, tiny_place(config))


def go_on(config: TrainConfig, place: RunDir) -> Ended:
    """Runs it to its end in this process, and lets go of the run directory."""
    notes = NotesAndWaits()
    with contextlib.closing(place):
        outcome = play_run(config, place, notes, lambda trainer: None)
    return Ended(config=config, path=place.path, outcome=outcome, notes=notes.lines, waits=notes.waits)


def saved_weights(config: TrainConfig, path: Path) -> list[np.ndarray]:
    """Every weight in the newest checkpoint of the run at ``path``."""
    _, like = abstract_policy(config.policy)
    return jax.tree.leaves(load_trained(rundir.checkpoints_of(path), None, like)[1])


def logged_tokens(path: Path, purpose: str) -> list[int]:
    """Sampled tokens of each request of a purpose, by the engine's log of the run at ``path``."""
    log = RequestLog(path / "requests.log")
    try:
        found = [log.find(request_id) for request_id in log._file.places]
    finally:
        log.close()
    return [len(each.sampled_ids) for each in found if each is not None and each.purpose == purpose]


def group_states(path: Path) -> list[str]:
    with contextlib.closing(Journal.open(f"sqlite:///{path}/journal.sqlite")) as journal:
        return [group.state for group in journal.groups()]


@pytest.fixture(scope="session")
def compiled_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder in which programs are kept as they are compiled: for this process, and for those it starts."""
    folder = tmp_path_factory.mktemp("compiled")
    settings = {"jax_compilation_cache_dir": str(folder), "jax_persistent_cache_min_compile_time_secs": 0.1}
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield folder
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
