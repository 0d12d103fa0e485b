"""Laws of the mixture of experts."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec as P

from forgejax.errors import ConfigError
from forgejax.models import PolicyConfig, abstract_policy, init_params, ragged
from forgejax.models.moe import Experts, MoEConfig, RouterLoad, Routing, expert_mlp, layer_load, route
from forgejax.models.ragged import ragged_matmul
from forgejax.sharding import Layout, MeshConfig, build_mesh, resolve
from tests.models.reference import causal, mixture

SOFTMAX = MoEConfig(num_experts=7, experts_per_token=3)
KINDS = [
    SOFTMAX,
    MoEConfig(num_experts=7, experts_per_token=1, normalize=False),
    MoEConfig(num_experts=4, experts_per_token=4, router="sigmoid", scale=2.5),
    MoEConfig(num_experts=7, experts_per_token=2, router="sigmoid", correction_bias=True),
]


def weights(moe: MoEConfig, width: int = 5, hidden: int = 6, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    X, D, F = moe.num_experts, width, hidden
    shapes = {"router": (D, X), "expert_gate": (X, D, F), "expert_up": (X, D, F), "expert_down": (X, F, D)}
    if moe.correction_bias:
        shapes["router_bias"] = (X,)
    return {name: rng.normal(size=shape) for name, shape in shapes.items()}


def mixed(moe: MoEConfig, w: dict[str, jax.Array], x_BTD: jax.Array) -> jax.Array:
    routing = route(x_BTD, w["router"], w.get("router_bias"), moe)
    return expert_mlp(x_BTD, routing, Experts(w["expert_gate"], w["expert_up"], w["expert_down"]))


def dense(moe: MoEConfig, w: dict[str, jax.Array], x_BTD: jax.Array) -> jax.Array:
    """Every expert on every token, those not chosen weighted by zero."""
    routing = route(x_BTD, w["router"], w.get("router_bias"), moe)
    chosen = jax.nn.one_hot(routing.expert_BTk, moe.num_experts, dtype=x_BTD.dtype)
    weight_BTX = jnp.einsum("BTkX,BTk->BTX", chosen, routing.weight_BTk)
    gate, up = (jnp.einsum("BTD,XDF->BTXF", x_BTD, w[name]) for name in ("expert_gate", "expert_up"))
    return jnp.einsum("BTXF,XFD,BTX->BTD", jax.nn.silu(gate) * up, w["expert_down"], weight_BTX)


@pytest.mark.parametrize("moe", KINDS)
@pytest.mark.parametrize(("dtype", "bound"), [("float64", 1e-12), ("float32", 1e-5)])
def test_every_token_gets_what_its_experts_say_one_by_one(moe: MoEConfig, dtype: str, bound: float) -> None:
    w, x = weights(moe), np.random.default_rng(1).normal(size=(2, 9, 5))
    expected = np.stack([[mixture(moe, w, token) for token in row] for row in x])
    with jax.enable_x64(dtype == "float64"):
        cast = {name: jnp.asarray(value, dtype) for name, value in w.items()}
        ours = jax.jit(functools.partial(mixed, moe))(cast, jnp.asarray(x, dtype))
    assert ours.dtype == dtype
    np.testing.assert_allclose(ours, expected, rtol=0, atol=bound * np.max(np.abs(expected)))


@pytest.mark.parametrize("moe", KINDS)
def test_gradients_are_those_of_all_experts_computed_and_masked(moe: MoEConfig) -> None:
    with jax.enable_x64(True):
        w = {name: jnp.asarray(value) for name, value in weights(moe).items()}
        x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 40, 5)))

        def gradient(mlp: Callable[..., jax.Array]) -> Any:
            return jax.jit(jax.grad(lambda w, x: jnp.sum(jnp.sin(mlp(moe, w, x))), argnums=(0, 1)))(w, x)

        ours, oracle = gradient(mixed), gradient(dense)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12), ours, oracle)
        # A lone expert whose weights are normalised to one teaches its router nothing.
        assert float(jnp.max(jnp.abs(ours[0]["router"]))) > 1e-3


@pytest.mark.parametrize(
    "sizes", [[0, 9, 0, 31, 1], [0, 0, 0, 0, 0], [41, 0, 0, 0, 0], [8, 8, 8, 8, 9], [0, 0, 0, 0, 17]]
)
def test_runs_of_any_length_meet_their_own_matrix_and_rows_after_them_give_zeros(sizes: list[int]) -> None:
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        x, w, sizes_X = (
            jnp.asarray(rng.normal(size=(41, 3))),
            jnp.asarray(rng.normal(size=(5, 3, 4))),
            jnp.asarray(sizes),
        )
        run = np.repeat(np.arange(5), sizes)
        expected = np.zeros((41, 4))
        expected[: len(run)] = np.einsum("AD,ADF->AF", np.asarray(x)[: len(run)], np.asarray(w)[run])
        np.testing.assert_allclose(ragged_matmul(x, w, sizes_X), expected, atol=1e-14)

        def gradient(product: Callable[..., jax.Array]) -> Any:
            return jax.grad(lambda x, w: jnp.sum(jnp.sin(product(x, w, sizes_X)) + product(x, w, sizes_X)), (0, 1))(
                x, w
            )

        for ours, theirs in zip(gradient(ragged_matmul), gradient(lax.ragged_dot), strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-12)


def test_the_accelerators_instruction_and_the_blocks_agree() -> None:
    rng = np.random.default_rng(0)
    x, dout = (jnp.asarray(rng.normal(size=(50, size)), jnp.float32) for size in (6, 4))
    w, sizes = jnp.asarray(rng.normal(size=(3, 6, 4)), jnp.float32), jnp.asarray([11, 0, 39])
    pairs = [
        (ragged._rows_by_blocks(x, w, sizes), ragged._rows_by_instruction(x, w, sizes)),
        (ragged._matrices_by_blocks(x, dout, sizes), ragged._matrices_by_instruction(x, dout, sizes)),
    ]
    for blocks, instruction in pairs:
        np.testing.assert_allclose(blocks, instruction, atol=1e-5)


def test_the_correction_bias_moves_the_choice_and_neither_weights_nor_gradients() -> None:
    moe = MoEConfig(num_experts=4, experts_per_token=2, router="sigmoid", correction_bias=True, normalize=False)
    x, router = jnp.ones((1, 1, 1)), jnp.asarray([[3.0, 2.0, 1.0, 0.0]])
    plain = route(x, router, jnp.zeros(4), moe)
    moved = route(x, router, jnp.asarray([0.0, 0.0, 0.0, 5.0]), moe)
    assert (plain.expert_BTk.tolist(), moved.expert_BTk.tolist()) == ([[[0, 1]]], [[[3, 0]]])
    np.testing.assert_allclose(moved.weight_BTk[0, 0], [0.5, 1 / (1 + np.exp(-3.0))], rtol=1e-6)
    slope = jax.grad(lambda bias: route(x, router, bias, moe).weight_BTk.sum())(jnp.ones(4))
    np.testing.assert_array_equal(slope, np.zeros(4))


def test_the_router_of_a_bf16_policy_chooses_in_fp32() -> None:
    """Two experts whose logits differ by less than a bf16 step are still told apart."""
    x = jnp.ones((1, 1, 2), jnp.bfloat16)
    router = jnp.asarray([[100.0, 100.0], [0.0, 0.01]], jnp.float32)
    routing = route(x, router, None, MoEConfig(num_experts=2, experts_per_token=1))
    assert routing.expert_BTk.tolist() == [[[1]]]
    assert routing.chance_BTX.dtype == jnp.float32


def test_load_counts_a_token_as_often_as_samples_pass_through_it() -> None:
    chance = jnp.asarray([[[0.5, 0.5, 0.0], [1.0, 0.0, 0.0], [0.25, 0.25, 0.5]]])
    expert = jnp.asarray([[[0, 1], [0, 2], [2, 1]]])
    routing = Routing(expert_BTk=expert, weight_BTk=jnp.ones((1, 3, 2)), chance_BTX=chance)
    load, entropy = layer_load(routing, jnp.asarray([[4.0, 1.0, 0.0]]))
    assert load.tolist() == [5.0, 4.0, 1.0]
    assert float(entropy) == pytest.approx(4 * np.log(2), rel=1e-6)
    one = RouterLoad(load_LX=load[None], entropy_L=entropy[None], weight=jnp.asarray(5.0))
    metrics = one.merge(RouterLoad.nothing(1, 3)).merge(one).metrics()
    assert {name: float(value) for name, value in metrics.items()} == pytest.approx(
        {"router/load_max": 0.5, "router/load_max_over_mean": 1.5, "router/entropy": 0.8 * np.log(2)}, rel=1e-6
    )


EIGHT = MoEConfig(num_experts=8, experts_per_token=3)


def gradient_of(mlp: Callable[..., jax.Array]) -> Any:
    return jax.jit(jax.value_and_grad(lambda w, x: jnp.sum(jnp.sin(mlp(EIGHT, w, x))), argnums=(0, 1)))


@functools.cache
def eight_experts_alone() -> tuple[Any, Any]:
    """Weights and tokens, and the loss and gradient that any mesh must give."""
    w = {name: jnp.asarray(value) for name, value in weights(EIGHT, width=4, hidden=8).items()}
    x = jnp.asarray(np.random.default_rng(1).normal(size=(8, 6, 4)))
    return (w, x), gradient_of(dense)(w, x)


@pytest.mark.parametrize(
    "axes",
    [
        {"name": "cpu-1"},
        {"name": "cpu-2", "expert": 2, "tensor": 1},
        {"name": "cpu-4", "fsdp": 2, "tensor": 2},
        {"name": "cpu-4", "expert": 2, "data": 2, "tensor": 1},
        {"name": "cpu-8", "expert": 2, "tensor": 2, "fsdp": 2},
        {"name": "cpu-8", "expert": 8, "tensor": 1},
        {"name": "cpu-8", "expert": 2, "context": 2, "fsdp": 1, "tensor": 2},
    ],
    ids=lambda axes: "-".join(f"{key}{value}" for key, value in axes.items()),
)
def test_a_mesh_changes_neither_the_mixture_nor_its_gradient(axes: dict[str, Any]) -> None:
    layout = Layout(mesh=build_mesh(resolve(MeshConfig(**axes))))

    def scoped(moe: MoEConfig, w: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        with layout.scope():
            return mixed(moe, w, x)

    with jax.enable_x64(True):
        inputs, expected = eight_experts_alone()
        found = gradient_of(scoped)(*inputs)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12), found, expected)


MIXTURE = PolicyConfig(
    num_layers=2, d_model=16, num_heads=4, num_kv_heads=2, d_ff=12, vocab_size=32,
    moe=MoEConfig(num_experts=8, experts_per_token=3),
)  # fmt: skip


def loss_of(config: PolicyConfig, params: Any, tokens_BT: jax.Array) -> tuple[jax.Array, RouterLoad | None]:
    policy = nnx.merge(abstract_policy(config)[0], params)
    positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)[None], tokens_BT.shape)
    weight_BT = positions_BT.astype(jnp.float32)
    hidden, _, load = policy.with_router_load(
        tokens_BT, positions_BT, causal, token_weight_BT=weight_BT, keep="nothing"
    )
    logp = jax.nn.log_softmax(policy.logits(hidden)[:, :-1])
    return -jnp.mean(jnp.take_along_axis(logp, tokens_BT[:, 1:, None], axis=-1)), load


def test_a_mesh_changes_neither_loss_nor_gradient_nor_load_of_a_policy() -> None:
    layout = Layout(mesh=build_mesh(resolve(MeshConfig(name="cpu-4", expert=2, fsdp=2))))
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 32, (8, 6)), jnp.int32)

    def scoped(params: Any, tokens: jax.Array) -> Any:
        with layout.scope():
            return loss_of(MIXTURE, params, tokens)

    gradient = functools.partial(jax.value_and_grad, has_aux=True)
    split = init_params(MIXTURE, layout)
    assert split["blocks"]["expert_gate"][...].sharding.spec == P(None, "expert", "fsdp", None)
    (loss, load), grads = jax.jit(gradient(scoped))(split, jax.device_put(tokens, layout.sharding("rows")))
    (wanted, load_alone), alone = jax.jit(gradient(lambda p, t: loss_of(MIXTURE, p, t)))(init_params(MIXTURE), tokens)
    assert float(loss) == pytest.approx(float(wanted), rel=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), grads, alone)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), load, load_alone)


def test_rows_that_do_not_divide_are_computed_whole_on_every_shard() -> None:
    layout = Layout(mesh=build_mesh(resolve(MeshConfig(name="cpu-4", expert=2, tensor=1))))
    moe = MoEConfig(num_experts=4, experts_per_token=2)
    w = {name: jnp.asarray(value, jnp.float32) for name, value in weights(moe).items()}
    x = jnp.asarray(np.random.default_rng(1).normal(size=(1, 7, 5)), jnp.float32)

    @jax.jit
    def scoped(w: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        with layout.scope():
            return mixed(moe, w, x)

    np.testing.assert_allclose(scoped(w, x), dense(moe, w, x), atol=1e-5)


def test_a_dense_policy_has_no_router_to_report() -> None:
    config = PolicyConfig(num_layers=1, d_model=16, num_heads=2, num_kv_heads=1, d_ff=8, vocab_size=32)
    assert loss_of(config, init_params(config), jnp.zeros((1, 4), jnp.int32))[1] is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_experts": -1}, r"moe.num_experts is -1"),
        ({"num_experts": 4, "experts_per_token": 5}, r"experts_per_token is 5; expected 1 to the 4 of"),
        ({"num_experts": 4, "experts_per_token": 0}, r"experts_per_token is 0"),
        ({"scale": 0.0}, r"moe.scale is 0.0"),
    ],
)
def test_an_impossible_mixture_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        MoEConfig(**changes)
