"""Weights on their way out of a run: what serve.py serves and export.py writes is what the run has trained."""

import asyncio
import json
import socket
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np
import pytest

from forgejax.chat import ChatFormat
from forgejax.errors import CheckpointError, ConfigError
from forgejax.models import PolicyConfig, init_params, load_params, read_policy_config
from forgejax.rollout import EngineConfig, LocalSampler, RemoteSampler
from forgejax.rollout.server.served import ServedEngine
from forgejax.run import rundir
from forgejax.run.checkpoint import Checkpoints, save_tree
from forgejax.run.config import TrainConfig, to_mapping
from forgejax.run.serving import program as serve
from forgejax.run.serving.options import ServeConfig
from forgejax.types import Grammar
from scripts import export
from tests.models.folders import SETTINGS, tensors_of, write_folder
from tests.rollout import tiny
from tests.rollout.driving import until
from tests.run.tiny_run import tiny_config


def saved_run(config: TrainConfig, steps: tuple[int, ...]) -> tuple[Path, dict[int, Any]]:
    """A run folder that was left behind with checkpoints, each of other weights."""
    place = rundir.create(Path(config.run.root), config.run.name, "tiny")
    place.save_config(to_mapping(config))
    checkpoints = Checkpoints(place.checkpoints, keep=len(steps))
    weights = {step: init_params(config.policy, seed=step) for step in steps}
    for step, params in weights.items():
        data = iter(grain.MapDataset.range(3).to_iter_dataset())
        checkpoints.save(step, {"params": params, "moments": np.zeros(3)}, {}, data)
    checkpoints.wait()
    checkpoints.close()
    place.close()
    return place.path, weights


def open_weights(folder: Path, family: str) -> Path:
    return write_folder(folder, SETTINGS[family], tensors_of(family, SETTINGS[family]))


def assert_same(found: Any, expected: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, found, expected)  # raises where the structures differ


def test_a_run_is_served_from_its_newest_checkpoint_or_the_one_named(tmp_path: Path) -> None:
    run, weights = saved_run(tiny_config(tmp_path), steps=(4, 7))
    newest = serve.load_served(ServeConfig(run=run))
    named = serve.load_served(ServeConfig(run=run, step=4))
    assert (newest.version, named.version) == (7, 4)
    assert_same(newest.params, weights[7])
    assert_same(named.params, weights[4])


@pytest.mark.parametrize(
    ("settings", "largest"),
    [
        ({"engine": EngineConfig(slots=10**8)}, r"engine\.slots 100000000 of engine\.max_context 512"),
        ({"policy": PolicyConfig(d_model=10**6)}, "the engine's copy of the weights"),
    ],
)
def test_what_no_memory_holds_is_refused_before_it_is_made(settings: dict[str, Any], largest: str) -> None:
    with pytest.raises(ConfigError, match=rf"GiB of memory at least, and device 0 has .* GiB for {largest}"):
        serve.make_engine(ServeConfig(**settings))


def test_a_run_is_served_when_the_folder_it_began_with_is_gone(tmp_path: Path) -> None:
    policy = f"--policy.path={open_weights(tmp_path / 'began', 'llama')}"
    config = tiny_config(tmp_path / "runs", policy)
    run, weights = saved_run(config, steps=(1,))
    (tmp_path / "began").rename(tmp_path / "elsewhere")
    served = serve.load_served(ServeConfig(run=run))
    assert served.policy.d_ff == config.policy.d_ff == 20
    assert_same(served.params, weights[1])


def test_bare_weights_and_open_weights_are_served(tmp_path: Path) -> None:
    policy = PolicyConfig(num_layers=1, d_model=8, num_heads=2, num_kv_heads=1, d_ff=12, vocab_size=16)
    params = init_params(policy, seed=3)
    save_tree(tmp_path / "bare", params)
    assert_same(serve.load_served(ServeConfig(policy=policy, weights=tmp_path / "bare")).params, params)

    path = str(open_weights(tmp_path / "open", "qwen3"))
    served = serve.load_served(ServeConfig(policy=PolicyConfig(path=path)))
    assert (served.version, served.policy.qk_norm) == (0, "head")
    assert_same(served.params, load_params(read_policy_config(path, PolicyConfig(path=path))))


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"step": 5}, CheckpointError, r"no checkpoint of step 5; kept are \[2\]"),
        ({"run": Path("nowhere")}, ConfigError, "give the folder of a run"),
    ],
)
def test_what_cannot_be_served_is_named(
    tmp_path: Path, settings: dict[str, Any], error: type[Exception], words: str
) -> None:
    run, _ = saved_run(tiny_config(tmp_path), steps=(2,))
    with pytest.raises(error, match=words):
        serve.load_served(ServeConfig(**{"run": run, **settings}))


def test_an_exported_run_is_read_again_bit_for_bit_with_its_tokenizer(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    run, weights = saved_run(config, steps=(4, 7))
    out = tmp_path / "exported"
    export.main(export.Options(run=run, out=out, step=4))
    again = read_policy_config(out, PolicyConfig(path=str(out)))
    assert_same(load_params(again), weights[4])
    tokenizer = Path(config.tokenizer_folder) / "tokenizer.json"
    assert (out / "tokenizer.json").read_bytes() == tokenizer.read_bytes()


@pytest.mark.parametrize("option", ["port", "grpc_port"])
async def test_a_port_that_is_taken_is_told_with_the_option_for_another(
    option: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve, "make_served", lambda config: ServedEngine(tiny.engine(), None))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        ports = {"port": 0, "grpc_port": 0, option: taken.getsockname()[1]}
        with pytest.raises(ConfigError, match=rf"127\.0\.0\.1:{ports[option]}: .*--{option.replace('_', '-')}, 0 for"):
            await serve.serve(ServeConfig(**ports), asyncio.Event())


async def test_it_says_that_it_serves_once_everything_is_compiled_and_a_stop_before_that_ends_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stop, engines = asyncio.Event(), []

    def make_served(config: ServeConfig) -> ServedEngine:
        engines.append(ServedEngine(tiny.engine(), None))
        return engines[-1]

    monkeypatch.setattr(serve, "make_served", make_served)
    monkeypatch.setattr(serve, "_QUIET_S", 0.05)
    config = ServeConfig(port=0, grpc_port=0, policy=tiny.POLICY, drain_s=5.0)
    serving = asyncio.create_task(serve.serve(config, stop))
    said = ""
    async with asyncio.timeout(120):
        while "\nserving http://127.0.0.1:" not in said:
            await asyncio.sleep(0.02)
            said += capsys.readouterr().out
    assert said.startswith("loading the weights ...\n") and "\ncompiling the engine's programs ...\n" in said
    assert "compiling the engine's programs, for 0.05 s so far\n" in said
    address = said.split("serving ")[1].split(" ")[0]
    async with RemoteSampler(address) as remote:
        under_way = asyncio.create_task(remote.sample(tiny.request("a", [1, 2], 100)))
        await until(lambda: engines[0].metrics().active == 1)
        stop.set()
        assert len((await under_way).token_ids) == 100  # it is drained first
    assert "stopping: new requests are refused, open ones have 5 s to end\n" in capsys.readouterr().out
    await asyncio.wait_for(serving, 60)
    await asyncio.wait_for(serve.serve(config, stop), 60)  # stopped already: it never serves
    assert "serving" not in capsys.readouterr().out


async def test_with_a_tokenizer_it_draws_under_grammars_and_has_compiled_for_them(tokenizer_folder: Path) -> None:
    policy = PolicyConfig(num_layers=1, d_model=8, num_heads=2, num_kv_heads=1, d_ff=12, vocab_size=405)
    engine = EngineConfig(slots=1, max_context=128, prefill_buckets=(8,))
    config = ServeConfig(policy=policy, engine=engine, tokenizer=tokenizer_folder)
    served, loaded = serve.make_served(config), serve.load_served(config)
    await served.publish(loaded.params, loaded.version, "", idle_s=0.0)
    await served.start(asyncio.Event())
    try:
        grammar = Grammar(schema='{"enum": [true, null]}')
        asked = tiny.request("r", [1, 2], 100, seed=1, grammar=grammar, stop_ids=frozenset({0}))
        done = await LocalSampler(served.driver).sample(asked)
    finally:
        await served.stop()
    codec = ChatFormat.load(tokenizer_folder).codec
    assert json.loads(codec.decode(done.token_ids[:-1])) in (True, None) and done.token_ids[-1] == 0
