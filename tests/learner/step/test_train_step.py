"""The step against an oracle that knows no trees: every sample is its own chain under a dense mask."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import Phase, assume, given, settings
from hypothesis import strategies as st

from forgejax import sharding
from forgejax.learner.learner import Learner
from forgejax.learner.pack import pack
from forgejax.learner.packing.batch import PackedStep
from forgejax.learner.packing.config import PackConfig
from forgejax.learner.packing.lay import lay_empty
from forgejax.learner.packing.samples import Sample, make_supervised_sample
from forgejax.learner.step.losses import LossConfig
from forgejax.learner.step.optimizer import OptimizerConfig
from forgejax.learner.step.train_step import StepConfig, TrainStep, add_gradients, make_train_step
from forgejax.models import PolicyConfig, abstract_policy, init_params
from forgejax.ops.tree.dense import dense_tree_attention
from tests.learner.oracle import relative, unmerged
from tests.learner.samples import random_group, sample

_VOCAB = 8
_CONFIG = PackConfig(row_length=64, rows=4, block_size=16, trunks=False)


def _config(dtype: str = "float32") -> PolicyConfig:
    return PolicyConfig(
        vocab_size=_VOCAB,
        num_layers=2,
        d_model=16,
        num_heads=4,
        num_kv_heads=2,
        d_ff=24,
        param_dtype=dtype,  # type: ignore[arg-type]
        compute_dtype=dtype,  # type: ignore[arg-type]
    )


def test_weights_in_bf16_learn_as_those_in_fp32_do() -> None:
    """At 2e-5 an update is a fiftieth of a weight's last bit; without masters nothing would be learned."""
    rng = np.random.default_rng(0)

    def imitated() -> PackedStep:
        words = [rng.integers(2, _VOCAB, 6).astype(np.int32) for _ in range(8)]
        samples = [make_supervised_sample(str(n), np.append(x, 0), np.append(x, 1)) for n, x in enumerate(words)]
        return pack([samples], PackConfig(row_length=128, rows=1, block_size=32, loss_norm="batch"))

    steps, held_out = [imitated() for _ in range(20)], imitated()
    wide = dataclasses.replace(_config(), compute_dtype="bfloat16", tied_embeddings=False)
    start = jax.tree.map(lambda x: x.astype(jnp.bfloat16), init_params(wide))  # of weights that bf16 can hold

    def learn(config: PolicyConfig) -> tuple[float, dict[str, float]]:
        params = jax.tree.map(lambda x: x.astype(config.param_dtype), start)
        step_config = StepConfig(loss=LossConfig(name="sft"), optimizer=OptimizerConfig(learning_rate=2e-5))
        learner = Learner(abstract_policy(config)[0], params, step_config)

        def score() -> float:
            (part,), (scores,) = held_out.parts, learner.score(held_out)
            return float(np.asarray(scores)[np.asarray(part.batch.term_mask_BM)].mean())

        before = score()
        for step in steps:
            metrics = learner.update(step, 0)
        return score() - before, {name: float(value) for name, value in metrics.items()}

    gain, _ = learn(wide)
    narrow_gain, metrics = learn(dataclasses.replace(wide, param_dtype="bfloat16"))
    assert gain > 0 and narrow_gain >= 0.95 * gain
    assert 0 < metrics["moved_weights"] < 0.5 and 0 < metrics["update_to_weight"] < 2e-4


_ROOM = 24
"""Samples, and tokens of each, that the oracle is compiled for."""


def _some_groups(seed: int) -> list[list[Sample]]:
    """A deep tree of two temperatures, a flat one, and duplicates of opposite advantage, one beyond the clip."""
    rng = np.random.default_rng(seed)
    groups = [
        random_group(rng, vocab=2, samples=8, longest=16, temperatures=(1.0, 0.7)),
        random_group(rng, vocab=_VOCAB, samples=4, longest=16),
        [
            sample([1, 2], [3, 4], advantage=1.5),
            sample([1, 2], [3, 4], advantage=-0.5),
            sample([1, 2], [3], old_logp=[-30.0]),
        ],
    ]
    assume(all(one.fed_tokens <= _ROOM for members in groups for one in members))
    return groups


def _check_against_oracle(step: TrainStep, params: Any, config: PackConfig, bound: float, examples: int) -> None:
    oracle = unmerged(abstract_policy(_config(str(jax.tree.leaves(params)[0].dtype)))[0], _ROOM)

    @settings(max_examples=examples, deadline=None, derandomize=True, phases=[Phase.generate])
    @given(seed=st.integers(0, 10**9))
    def equal(seed: int) -> None:
        groups = _some_groups(seed)
        total = step.start(params)
        for batch in pack(groups, config).batches:
            total = step.accumulate(params, total, batch, np.int32(0))
        loss, grads = oracle(params, groups)

        assert abs(float(total.tally.loss) - float(loss)) <= bound * max(1.0, abs(float(loss)))
        assert int(total.tally.clipped) > 0
        assert relative(jax.device_get(total.grads), jax.device_get(grads)) <= bound

    equal()


def test_the_merged_gradient_is_the_unmerged_one_to_1e12_in_fp64() -> None:
    with jax.enable_x64(True):
        params = init_params(_config("float64"))
        step = make_train_step(abstract_policy(_config("float64"))[0], params, StepConfig(vocab_chunk=8))

        _check_against_oracle(step, params, PackConfig(row_length=_ROOM, rows=1, block_size=8, trunks=False), 1e-12, 25)


def test_the_merged_gradient_is_the_unmerged_one_to_1e5_in_fp32() -> None:
    _check_against_oracle(_learner()._step, init_params(_config()), _CONFIG, 1e-5, 20)


_SHARED: list[tuple[Learner, Any]] = []


def _learner() -> Learner:
    """A learner of fresh state; one for all tests, so that it compiles once."""
    if not _SHARED:
        graphdef, _ = abstract_policy(_config())
        learner = Learner(graphdef, init_params(_config()), StepConfig())
        _SHARED.append((learner, jax.device_get(learner.state)))
    learner, state = _SHARED[0]
    learner.state = jax.device_put(state)
    return learner


def _groups(seed: int = 0) -> list[list[Sample]]:
    rng = np.random.default_rng(seed)
    return [random_group(rng, vocab=4, samples=8, longest=12) for _ in range(4)]


def _gradient_step(learner: Learner, config: PackConfig, groups: list[list[Sample]]) -> tuple[dict[str, float], Any]:
    """Metrics of an update, and the gradient it was made from."""
    step = pack(groups, config, row_shards=learner.row_shards)
    grads = jax.device_get(learner.gradient(step, 0).grads)
    return {name: float(value) for name, value in learner.update(step, 0).items()}, grads


def test_bins_padding_and_order_change_nothing_but_rounding() -> None:
    plain, grads = _gradient_step(_learner(), _CONFIG, _groups())
    others = [
        (PackConfig(row_length=32, rows=1, block_size=8), _groups()),
        (_CONFIG, [group[::-1] for group in _groups()[::-1]]),
    ]
    for config, groups in others:
        metrics, found = _gradient_step(_learner(), config, groups)
        assert metrics["loss"] == pytest.approx(plain["loss"], rel=1e-5, abs=1e-6)
        assert metrics["grad_norm"] == pytest.approx(plain["grad_norm"], rel=1e-5)
        assert metrics["trained_terms"] == plain["trained_terms"] == sum(len(s.token_ids) for g in _groups() for s in g)
        assert metrics["entropy"] == pytest.approx(plain["entropy"], rel=1e-5)
        assert metrics["probability_correlation"] == pytest.approx(plain["probability_correlation"], abs=1e-5)
        assert relative(found, grads) <= 1e-5


def test_a_mesh_of_rows_and_heads_takes_the_same_step() -> None:
    layout = sharding.Layout(mesh=sharding.build_mesh(sharding.resolve(sharding.MeshConfig(name="cpu-4"))))
    config = PackConfig(row_length=64, rows=2, block_size=16)

    alone, alone_grads = _gradient_step(_learner(), config, _groups())
    learner = Learner(abstract_policy(_config())[0], init_params(_config(), layout), StepConfig(), layout=layout)
    split, split_grads = _gradient_step(learner, config, _groups())

    assert learner.row_shards == 2
    for name in ("loss", "grad_norm", "entropy", "gap_max", "gap_sum", "trained_terms", "probability_correlation"):
        assert split[name] == pytest.approx(alone[name], rel=1e-5, abs=1e-5)
    assert relative(split_grads, alone_grads) <= 1e-5
    specs = {str(x.sharding.spec) for x in jax.tree.leaves(learner.state.opt_state) if x.ndim}
    assert any("fsdp" in spec for spec in specs)


def test_a_step_that_is_not_finite_leaves_the_state_as_it_was() -> None:
    learner = _learner()
    _gradient_step(learner, _CONFIG, _groups())
    before = jax.device_get(learner.state)
    bad = _groups(1)
    object.__setattr__(bad[0][0], "advantage", float("nan"))

    metrics, _ = _gradient_step(learner, _CONFIG, bad)

    assert metrics["skipped"] == 1
    for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(jax.device_get(learner.state)), strict=True):
        np.testing.assert_array_equal(a, b)
    metrics, _ = _gradient_step(learner, _CONFIG, _groups(2))
    assert metrics["skipped"] == 0
    assert int(learner.state.step) == 2


def test_every_tree_of_a_bucket_runs_the_same_program() -> None:
    learner = _learner()
    step: Any = learner._step

    def programs_after(seed: int) -> tuple[int, int, tuple[int, ...]]:
        packed = pack([random_group(np.random.default_rng(seed), samples=3, longest=8)], _CONFIG)
        (batch,) = packed.batches
        learner.update(packed, seed)
        shape = *batch.tokens_BT.shape, *batch.edge_src_BE.shape, *batch.term_edge_BM.shape
        return step.accumulate._cache_size(), step.apply._cache_size(), shape

    assert len({programs_after(seed) for seed in range(5)}) == 1


def test_what_is_compiled_ahead_serves_full_batches_that_train_a_third_of_their_tokens() -> None:
    learner = _learner()
    step: Any = learner._step
    learner.compile(lay_empty(_CONFIG))
    programs = step.accumulate._cache_size()

    for seed in range(3):
        ids = np.random.default_rng(seed).integers(0, 4, (8, 30)).tolist()
        distinct = [sample([number, *each[:19]], each[20:], name=f"r{number}") for number, each in enumerate(ids)]
        learner.update(pack([[one] for one in distinct], _CONFIG), seed)

    assert step.accumulate._cache_size() == programs


def test_gaps_are_measured_on_tokens_that_the_trained_weights_drew() -> None:
    learner = _learner()
    config = _CONFIG
    own = [sample([1, 2], [3, 4, 5], version=7, name="a"), sample([1, 2], [6], version=6, name="b")]
    packed = pack([own], config)
    place = next(p for p in packed.placements if p.request_id == "a")
    exact = np.asarray(learner.score(packed)[0])[place.row, place.start : place.stop]
    batch = pack(
        [[sample([1, 2], [3, 4, 5], version=7, old_logp=(exact + np.array([0.0, 0.25, -0.5])).tolist()), own[1]]],
        config,
    )

    metrics = {k: float(v) for k, v in learner.update(batch, 7).items()}

    assert metrics["gap_tokens"] == 3
    assert metrics["gap_max"] == pytest.approx(0.5, abs=1e-5)
    assert metrics["gap_sum"] == pytest.approx(0.75, abs=1e-5)
    assert metrics["trained_terms"] == 4


def test_supervised_samples_run_the_same_step_and_are_learned() -> None:
    config = StepConfig(loss=LossConfig(name="sft"), optimizer=OptimizerConfig(learning_rate=0.02))
    learner = Learner(abstract_policy(_config())[0], init_params(_config()), config)
    told = [make_supervised_sample("a", [1, 2], [3, 4]), make_supervised_sample("b", [1, 5], [6])]
    packed = pack([told], PackConfig(row_length=16, rows=1, block_size=8, loss_norm="batch"))
    logps = np.asarray(learner.score(packed)[0])[packed.batches[0].term_mask_BM]

    losses = [float(learner.update(packed, step)["loss"]) for step in range(30)]

    assert losses[0] == pytest.approx(-logps.mean(), rel=1e-5)
    assert losses[-1] < 0.1 * losses[0]


def test_published_weights_outlive_the_next_update() -> None:
    learner = _learner()
    published = learner.params()
    before = jax.device_get(published)
    _gradient_step(learner, _CONFIG, _groups())

    for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(jax.device_get(published)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_log_probabilities_and_entropy_are_those_at_the_edges_temperature() -> None:
    learner = _learner()
    policy = nnx.merge(abstract_policy(_config())[0], learner.params())
    one = sample([1, 2, 3], [4, 5], temperature=0.5)
    packed = pack([[one]], _CONFIG)

    def attend(layer: Any, q: Any, k: Any, v: Any, memory: Any) -> tuple[Any, Any]:
        return dense_tree_attention(q, k, v, jnp.full((1, 4), 4)), memory

    @jax.jit
    def law(ids: Any) -> Any:
        hidden, _ = policy(ids[None], jnp.arange(4)[None], attend)
        return jax.nn.log_softmax(policy.logits(hidden) / 0.5)[0, 2:]

    expected = np.asarray(law(one.fed_ids))
    logp = learner.score(packed)[0][packed.batches[0].term_mask_BM]
    entropy = learner.update(packed, 0)["entropy"]

    np.testing.assert_allclose(logp, [expected[0, 4], expected[1, 5]], rtol=1e-5)
    assert float(entropy) == pytest.approx(-(np.exp(expected) * expected).sum(axis=-1).mean(), rel=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_are_added_to_what_was_there(dtype: str) -> None:
    keys = jax.random.split(jax.random.key(0), 3)
    layers, head = (jax.random.normal(key, shape, dtype) for key, shape in zip(keys, [(3, 4, 4), (4,)], strict=False))
    before = jax.tree.map(lambda x: jnp.full(x.shape, 0.25, jnp.float32), (layers, {"head": head}))
    x = jax.random.normal(keys[2], (4,), dtype)

    def function(layers: jax.Array, rest: dict[str, jax.Array]) -> jax.Array:
        out, _ = jax.lax.scan(lambda x, layer: (jnp.tanh(layer @ x), None), x, layers)
        return (rest["head"] * out).sum()

    primals = (layers, {"head": head})
    value, pull_back = jax.vjp(function, *primals)

    added = add_gradients(before, primals, pull_back, 2 * jnp.ones_like(value))

    gradients = jax.grad(function, argnums=(0, 1))(*primals)
    expected = jax.tree.map(lambda total, new: total + 2 * new.astype(jnp.float32), before, gradients)
    assert jax.tree.all(jax.tree.map(lambda a, b: a.dtype == b.dtype == jnp.float32, added, expected))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), added, expected)
