"""The quickstart, shrunk until a test can afford it: a one-layer policy, four engine slots, two steps."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from forgejax.report.live.progress import Progress
from forgejax.run import rundir
from forgejax.run.build import Outcome, run
from forgejax.run.config import TrainConfig, load_config, to_mapping
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


def tiny_outcome(config: TrainConfig, place: RunDir, progress: Progress) -> Outcome:
    """Runs it to its end in this process, and lets go of the run directory."""
    with contextlib.closing(place):
        return run(config, place, progress, lambda trainer: None)


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
