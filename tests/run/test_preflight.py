"""What cannot be run is refused before it costs anything, with what to set."""

import dataclasses
import re
import resource
import shutil
import sys
from pathlib import Path
from typing import Any

import jax
import pytest

from forgejax.agents import AgentConfig
from forgejax.errors import AgentError, ConfigError, ForgejaxError, MeshError
from forgejax.ops import Kernel
from forgejax.ops.tree.cpu import CpuKernel
from forgejax.ops.tree.gpu import GpuKernel
from forgejax.ops.tree.tpu import TpuKernel
from forgejax.run import preflight
from forgejax.run.config import TrainConfig, load_config, to_mapping
from forgejax.run.preflight import (
    allow_open_files,
    check_agent,
    check_disk,
    check_kernel,
    check_memory,
    check_mesh,
    check_repeatable,
    check_resumed,
    check_run,
    check_sandbox,
    digest_tokenizer,
    lay_engine,
    load_chat,
)
from forgejax.run.rundir import Attempt
from forgejax.sharding import EngineMesh, MeshConfig, build_mesh, resolve
from tests.run.tiny_run import QUICKSTART, REPOSITORY, tiny_config

DEMONSTRATOR = f"{REPOSITORY / 'examples' / 'quickstart' / 'demonstrations.py'}:CalculatorDemonstrator"
DESCRIBE = (sys.executable, str(REPOSITORY / "examples" / "quickstart" / "agent.py"), "--describe")
GIB = 2**30


def limit_open_files(monkeypatch: pytest.MonkeyPatch, soft: int, hard: int) -> list[tuple[int, int]]:
    """Pretends that these are this process's limits; what they are set to."""
    set_to: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: (soft, hard))
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: set_to.append(limits))
    return set_to


def with_warm_start(config: TrainConfig, demonstrator: str, **options: Any) -> TrainConfig:
    """The configuration with a supervised phase of one step."""
    warm = dataclasses.replace(
        config.warm_start, steps=1, demonstrations=1, batch_size=1, demonstrator=demonstrator, options=options
    )
    return dataclasses.replace(config, warm_start=warm)


@pytest.mark.parametrize(
    ("kernel", "overrides", "words"),
    [
        (TpuKernel(), (), "blocks of 32 tokens; set packing.block_size to a multiple of 128"),
        (GpuKernel(), ("--packing.block-size=8",), "blocks of 8 tokens; for float32 heads of 8 set packing.block_size"),
        (GpuKernel(), ("--policy.compute-dtype=float64",), "got float64; set policy.compute_dtype"),
    ],
)
def test_what_a_kernel_cannot_work_with_is_refused_with_what_to_set(
    tmp_path: Path, kernel: Kernel, overrides: tuple[str, ...], words: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)):
        check_kernel(kernel, tiny_config(tmp_path, *overrides))


def test_the_kernels_take_blocks_of_the_sizes_they_name(tmp_path: Path) -> None:
    check_kernel(TpuKernel(), tiny_config(tmp_path, "--packing.block-size=128"))
    check_kernel(GpuKernel(), tiny_config(tmp_path, "--packing.block-size=16"))
    check_kernel(CpuKernel(), tiny_config(tmp_path, "--policy.compute-dtype=float64"))


@pytest.mark.parametrize(
    ("mesh", "words"),
    [
        ("v5e-64", "mesh v5e-64 needs 64 v5e chips; this machine has no TPU and no GPU"),
        ("cpu-1000", "mesh cpu-1000 asks for 1000 fake devices on this machine's CPU; expected 64 at most, as cpu-64"),
    ],
)
def test_a_mesh_this_machine_cannot_give_is_refused_before_anything_is_made(mesh: str, words: str) -> None:
    with pytest.raises(MeshError, match=words):
        check_mesh(load_config(QUICKSTART, [f"--mesh={mesh}"]))


def test_a_policy_with_fewer_tokens_than_its_tokenizer_is_refused(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    size = load_chat(config).vocab_size

    assert size <= config.policy.vocab_size
    with pytest.raises(ConfigError, match=rf"has {size} tokens and policy\.vocab_size is 64; raise it to at least"):
        load_chat(tiny_config(tmp_path, "--policy.vocab-size=64"))


@pytest.mark.parametrize(
    ("overrides", "largest"),
    [
        (
            ("--policy.d-model=1000000", "--engine.kv-pages=8"),
            r"weights, their gradient and the optimizer \(\[policy\]\)",
        ),
        (
            ("--policy.num-layers=1000000000", "--engine.kv-pages=8"),
            r"weights, their gradient and the optimizer \(\[policy\]\)",
        ),
        (("--engine.slots=100000000",), r"engine\.slots 100000000 of engine\.max_context 128"),
        (("--packing.row-length=38400000", "--policy.d-model=128"), r"packing\.rows 2 of packing\.row_length 38400000"),
    ],
)
def test_sizes_that_no_memory_holds_are_refused_and_the_largest_is_named(
    tmp_path: Path, overrides: tuple[str, ...], largest: str
) -> None:
    config = tiny_config(tmp_path, *overrides)
    with pytest.raises(
        ConfigError, match=rf"of memory at least, and this machine has 24\.0 GiB: [\d.,]+ GiB for .*{largest}"
    ):
        check_memory(config, resolve(config.mesh), 24 * GIB)


def test_the_memory_asked_for_is_that_of_weights_moments_and_pages(tmp_path: Path) -> None:
    """Twelve bytes a weight beside its own four, once; the engine's copy; keys and values of 16 pages and nobody's."""
    config = tiny_config(tmp_path, "--mesh=cpu-1", "--engine.kv-pages=16", "--engine.page-tokens=32")
    weights = 640 * 16 + 16 * (2 * 16 + 2 * 8 + 3 * 32) + 3 * 16
    keys = 2 * 1 * 1 * 8 * 32 * 17 * 4
    stream = 2 * 128 * 16 * 4
    needed = weights * (16 + 4) + keys + stream

    check_memory(config, resolve(config.mesh), needed)
    with pytest.raises(ConfigError, match="of memory at least"):
        check_memory(config, resolve(config.mesh), needed - 1)


def test_the_memory_of_a_chip_is_that_of_its_data_sheet(tmp_path: Path) -> None:
    overrides = ("--mesh=v5e-1", "--policy.d-model=4096", "--policy.d-ff=16384", "--policy.num-layers=16")
    config = tiny_config(tmp_path, *overrides)
    with pytest.raises(ConfigError, match=r"a device of v5e-1 has 16\.0 GiB"):
        check_memory(config, resolve(config.mesh), 10**6 * GIB)


@pytest.mark.parametrize(
    "change",
    [
        *("--policy.d-ff=64", "--tasks.seed=3", "--tasks.eval-tasks=9", "--run.seed=1", "--run.name=a"),
        "--run.deterministic=true",
    ],
)
def test_a_resumed_run_keeps_policy_tasks_seed_name_and_whether_it_can_be_repeated(tmp_path: Path, change: str) -> None:
    before = to_mapping(tiny_config(tmp_path))
    key = change.removeprefix("--").partition("=")[0].replace("-", "_")
    with pytest.raises(ConfigError, match=rf"this would change {key} \(.* so far\); leave it as it is, or start a new"):
        check_resumed(before, tiny_config(tmp_path, change), [], "")


def test_a_resumed_run_may_have_other_steps_places_and_meshes(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, "--run.steps=9", "--mesh=cpu-1", "--policy.compute-dtype=float64")
    config = dataclasses.replace(config, policy=dataclasses.replace(config.policy, path="moved"))
    check_resumed(to_mapping(tiny_config(tmp_path)), config, [], "")


def test_a_deterministic_run_on_gpus_needs_programs_that_add_in_one_order(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, "--run.deterministic=true")
    gpus, flag = resolve(MeshConfig(name="h100-1")), "--xla_gpu_deterministic_ops=true"
    check_repeatable(config, gpus, f"--xla_cpu_x=1 {flag}")
    check_repeatable(config, resolve(config.mesh), "")
    check_repeatable(tiny_config(tmp_path), gpus, "")
    with pytest.raises(ConfigError, match=rf"mesh h100-1 is of GPUs.*; set XLA_FLAGS={flag} in the environment, or"):
        check_repeatable(config, gpus, "--xla_gpu_deterministic_ops=false")


def test_a_tokenizer_is_told_from_another_by_its_files_wherever_they_lie(tmp_path: Path) -> None:
    theirs = REPOSITORY / "examples" / "quickstart" / "tokenizer"
    ours = shutil.copytree(theirs, tmp_path / "tokenizer")
    (ours / "README.md").touch()
    digest = digest_tokenizer(str(theirs))
    assert digest_tokenizer(str(ours)) == digest
    (ours / "chat_template.jinja").write_text("x")
    assert digest_tokenizer(str(ours)) != digest

    config = tiny_config(tmp_path)
    (begun,) = [Attempt(started_at="", folder="", host="", process=1, tokenizer=digest)]
    check_resumed(to_mapping(config), config, [begun], digest)
    with pytest.raises(ConfigError, match="is not the one this run began with: its files differ; bring those back"):
        check_resumed(to_mapping(config), config, [begun], digest_tokenizer(str(ours)))


@pytest.mark.parametrize(("fresh", "checkpoints"), [(True, 4), (False, 1)])
def test_a_disk_without_room_for_the_checkpoints_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh: bool, checkpoints: int
) -> None:
    config = tiny_config(tmp_path, "--run.steps=100", "--run.checkpoint-every=1", "--run.keep-checkpoints=3")
    needed = 2**26 + checkpoints * 12 * (640 * 16 + 16 * (2 * 16 + 2 * 8 + 3 * 32) + 3 * 16)
    asked = []

    def usage(path: Path) -> shutil._ntuple_diskusage:
        asked.append(path)
        return shutil._ntuple_diskusage(total=2**40, used=0, free=free)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    free = needed
    check_disk(config, tmp_path / "not" / "yet", fresh=fresh)
    assert asked == [tmp_path], "the folder is not there yet"
    free = needed - 1
    with pytest.raises(ConfigError, match=rf"for {checkpoints} checkpoints and the journal at least.*GiB free; make"):
        check_disk(config, tmp_path, fresh=fresh)


def test_the_limit_of_open_files_is_raised_to_what_the_episodes_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(tmp_path, "--pool.window.in-flight=50")
    assert config.episodes_at_once == 200

    set_to = limit_open_files(monkeypatch, 128 + 200 * 3, 4096)
    allow_open_files(config)
    assert set_to == [], "there is room"
    set_to = limit_open_files(monkeypatch, 64, 4096)
    allow_open_files(config)
    assert set_to == [(128 + 200 * 3, 4096)]


def test_a_hard_limit_of_open_files_below_that_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit_open_files(monkeypatch, 64, 64)
    with pytest.raises(ConfigError, match=r"32 episodes at once of kind coroutine take about 224 open files, and this"):
        allow_open_files(tiny_config(tmp_path))


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (AgentConfig(command=("nosuchprogram",)), '"nosuchprogram" is not an executable file and not on PATH'),
        (AgentConfig(recipe="codex", command=("nosuchprogram",)), 'is installed by: make scaffolds ARGS="codex"'),
        (AgentConfig(kind="process", command=("python", "nofile.py")), "there is no file nofile.py in"),
        (AgentConfig(kind="coroutine", function="nomodule:f"), "cannot be imported: No module named 'nomodule'"),
        (AgentConfig(kind="coroutine", function="os:getcwd"), 'is no coroutine function; write it as "async def"'),
        (AgentConfig(command=(sys.executable, "-c", "import nothing_at_all")), "No module named 'nothing_at_all'"),
    ],
)
def test_an_agent_that_cannot_be_started_is_told_with_its_own_words(config: AgentConfig, sentence: str) -> None:
    with pytest.raises(ForgejaxError, match=re.escape(sentence)):
        check_agent(config)


def test_a_worker_is_started_once_and_ended(tmp_path: Path) -> None:
    program = f"open({str(tmp_path / 'log')!r}, 'a').write('x'); print('{{\"ready\": true}}', flush=True); input()"
    check_agent(AgentConfig(command=(sys.executable, "-c", program), workers=3))
    assert (tmp_path / "log").read_text() == "x"


def test_a_program_that_is_given_the_question_is_no_file(tmp_path: Path) -> None:
    check_agent(AgentConfig(kind="process", command=("python", "-m", "agent")))
    check_agent(AgentConfig(kind="process", command=("python", "{question}")))


def test_a_run_that_can_be_run_passes_and_nothing_is_made(tmp_path: Path) -> None:
    check_run(tiny_config(tmp_path / "runs"), tmp_path / "runs", fresh=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "name",
    [
        *("check_repeatable", "check_memory", "check_disk", "allow_open_files", "check_mesh", "load_chat"),
        *("make_environment", "check_agent"),
    ],
)
def test_every_check_belongs_to_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise ConfigError(f"{name} refuses")

    monkeypatch.setattr(preflight, name, refuse)
    with pytest.raises(ConfigError, match=f"{name} refuses"):
        check_run(tiny_config(tmp_path), tmp_path, fresh=False)


@pytest.mark.parametrize(
    ("demonstrator", "options", "sentence"),
    [
        ("examples/nowhere.py:x", {}, "warm_start.demonstrator"),
        (DEMONSTRATOR, {"tool_rate": 2.0, "describe": list(DESCRIBE)}, "tool_rate is 2.0; expected a share"),
        (DEMONSTRATOR, {"tool_rate": 0.5, "describe": [sys.executable, "-c", "pass"]}, "expected {"),
        (f"{__file__}:Broken", {}, "could not make the first demonstration: ZeroDivisionError: division by zero"),
    ],
)
def test_a_demonstrator_that_cannot_be_had_is_told_before_the_supervised_phase_of_a_fresh_run_alone(
    tmp_path: Path, demonstrator: str, options: dict[str, Any], sentence: str
) -> None:
    config = with_warm_start(tiny_config(tmp_path), demonstrator, **options)
    with pytest.raises((ConfigError, AgentError), match=re.escape(sentence)):
        check_run(config, tmp_path, fresh=True)
    check_run(config, tmp_path, fresh=False)


class Broken:
    """A demonstrator that fails at its work."""

    identity = "broken"

    def demonstrate(self, task: object, rng: object) -> None:
        raise ZeroDivisionError("division by zero")


def test_weights_that_are_not_there_are_told_by_a_fresh_run_alone(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    config = dataclasses.replace(config, policy=dataclasses.replace(config.policy, path=str(tmp_path / "gone")))
    with pytest.raises(ConfigError, match=r"policy\.path .*gone is no folder; give a Hugging Face folder"):
        check_run(config, tmp_path, fresh=True)
    check_run(config, tmp_path, fresh=False)


def test_an_engine_gets_the_devices_that_the_learner_leaves_and_shares_its_first_where_these_are_too_few() -> None:
    learner = build_mesh(resolve(MeshConfig(name="cpu-4")))
    assert lay_engine(EngineMesh(tensor=2), learner).mesh.devices.flatten().tolist() == jax.devices()[4:6]  # type: ignore[union-attr]
    assert not lay_engine(EngineMesh(tensor=2), learner).shared
    with pytest.raises(MeshError, match=r"takes 6 devices and the learner's mesh has 4"):
        lay_engine(EngineMesh(tensor=6), learner)
    every = build_mesh(resolve(MeshConfig(name="cpu-8")))
    assert lay_engine(EngineMesh(), every).mesh.devices.flatten().tolist() == jax.devices()[:1]  # type: ignore[union-attr]
    two = lay_engine(EngineMesh(tensor=2), every)
    assert two.mesh.devices.flatten().tolist() == jax.devices()[:2] and two.shared  # type: ignore[union-attr]


def test_moves_and_tools_of_a_server_are_for_agents_in_this_process(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, "--tasks.kind=openenv")
    check_sandbox(config)
    worker = dataclasses.replace(config, agent=AgentConfig(kind="worker", command=("python",)))
    with pytest.raises(ConfigError, match=r'agent\.kind is "worker" with tasks\.kind "openenv".*player:play'):
        check_sandbox(worker)
