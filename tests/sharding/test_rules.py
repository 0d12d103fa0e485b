"""Laws of the partition rules."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from forgejax.errors import ConfigError, MeshError
from forgejax.sharding import (
    MeshConfig,
    Rules,
    batch_sharding,
    build_mesh,
    constrain,
    heads_axis,
    kv_heads_axis,
    param_shardings,
    replicated,
    resolve,
    rows_axes,
    rows_shards,
    scope,
)


def mesh_of(name: str = "cpu-8", **axes: int) -> Mesh:
    return build_mesh(resolve(MeshConfig(name=name, **axes)))


def weight(shape: tuple[int, ...], *names: str) -> nnx.Param:
    return nnx.Param(jax.ShapeDtypeStruct(shape, jnp.float32), logical_axes=names)


def spec_of(shape: tuple[int, ...], *names: str, mesh: Mesh) -> P:
    (sharding,) = jax.tree.leaves(param_shardings({"w": weight(shape, *names)}, mesh, Rules()))
    spec: P = sharding.spec
    return spec


def test_a_weight_is_split_as_its_logical_axes_say() -> None:
    mesh = mesh_of()
    assert spec_of((2, 8, 4, 6), "layers", "embed", "heads", "head_dim", mesh=mesh) == P(None, "fsdp", "tensor", None)
    assert spec_of((512, 8), "vocab", "embed", mesh=mesh) == P("tensor", "fsdp")


def test_mesh_axes_of_one_device_leave_no_trace_in_a_spec() -> None:
    assert spec_of((512, 7), "vocab", "embed", mesh=mesh_of("cpu-1")) == P(None, None)


def test_key_value_heads_fewer_than_their_shards_are_replicated_and_others_must_divide() -> None:
    mesh = mesh_of(tensor=4)
    assert spec_of((2, 8, 2, 6), "layers", "embed", "kv_heads", "head_dim", mesh=mesh)[2] is None
    assert spec_of((2, 8, 4, 6), "layers", "embed", "kv_heads", "head_dim", mesh=mesh)[2] == "tensor"
    with pytest.raises(MeshError, match="kv_heads dimension 6 does not divide over tensor 4"):
        spec_of((2, 8, 6, 6), "layers", "embed", "kv_heads", "head_dim", mesh=mesh)
    with pytest.raises(MeshError, match="kv_heads dimension 3 does not divide over tensor 4"):
        spec_of((2, 8, 3, 6), "layers", "embed", "kv_heads", "head_dim", mesh=mesh)


def test_a_dimension_that_does_not_divide_names_the_weight_its_shape_and_the_axis() -> None:
    with pytest.raises(MeshError, match=r"weight .*'gate'.* of shape \(2, 8, 15\): its mlp dimension 15 .* tensor 2"):
        param_shardings({"gate": weight((2, 8, 15), "layers", "embed", "mlp")}, mesh_of(), Rules())


def test_one_mesh_axis_never_splits_two_dimensions_of_a_weight() -> None:
    with pytest.raises(MeshError, match="split twice by one mesh axis"):
        param_shardings({"w": weight((8, 8), "embed", "mlp")}, mesh_of(), Rules(mlp=("fsdp",)))


def test_names_that_do_not_fit_the_rules_are_refused() -> None:
    with pytest.raises(MeshError, match="unknown logical axis 'hedas'; expected one of vocab"):
        spec_of((8, 8), "embed", "hedas", mesh=mesh_of())
    with pytest.raises(MeshError, match="1 axis names"):
        spec_of((8, 8), "embed", mesh=mesh_of())
    with pytest.raises(ConfigError, match=r"rules.mlp is \['model'\]; expected distinct axes of data, fsdp"):
        Rules(mlp=("model",))


def test_optimizer_moments_are_split_like_their_weights_and_counts_are_replicated() -> None:
    mesh = mesh_of()
    params = nnx.State({"w": weight((8, 16), "embed", "mlp")})
    state = jax.eval_shape(optax.adamw(1e-3).init, params)
    shardings = param_shardings(state, mesh, Rules())
    jax.tree.map(lambda sharding, leaf: None, shardings, state)  # raises where the structures differ
    specs = [sharding.spec for sharding in jax.tree.leaves(shardings)]
    assert sorted(map(str, specs)) == sorted(map(str, [P(), P("fsdp", "tensor"), P("fsdp", "tensor")]))


def test_rows_fall_into_equal_shards_in_mesh_order() -> None:
    mesh = mesh_of()
    rows = jax.device_put(np.arange(8, dtype=np.int32)[:, None], batch_sharding(mesh, Rules()))
    by_device = {shard.device.id: shard.data[:, 0].tolist() for shard in rows.addressable_shards}
    assert by_device == {0: [0, 1], 1: [0, 1], 2: [2, 3], 3: [2, 3], 4: [4, 5], 5: [4, 5], 6: [6, 7], 7: [6, 7]}
    assert (rows_axes(mesh, Rules()), rows_shards(mesh, Rules())) == (("data", "fsdp"), 4)
    assert rows_axes(mesh_of("cpu-1"), Rules()) == ()
    assert batch_sharding(mesh_of("cpu-1"), Rules()).spec == P(None)
    assert replicated(mesh).spec == P()


def test_the_heads_axis_is_none_where_heads_are_whole() -> None:
    assert heads_axis(mesh_of(), Rules()) == "tensor"
    assert heads_axis(mesh_of("cpu-1"), Rules()) is None
    assert kv_heads_axis(mesh_of(tensor=4), Rules(), num_kv_heads=2) is None
    assert kv_heads_axis(mesh_of(tensor=4), Rules(), num_kv_heads=4) == "tensor"
    assert kv_heads_axis(mesh_of(), Rules(kv_heads=()), num_kv_heads=4) is None
    with pytest.raises(MeshError, match="takes one at most"):
        heads_axis(mesh_of(), Rules(heads=("fsdp", "tensor")))


def test_constrain_splits_an_activation_within_a_scope_and_does_nothing_outside() -> None:
    mesh = mesh_of()
    x = jnp.ones((8, 4, 6))

    @jax.jit
    def split(x: jax.Array) -> jax.Array:
        with scope(mesh, Rules()):
            return constrain(x * 2, "rows", "heads", None)

    assert split(x).sharding.spec == P(("data", "fsdp"), "tensor")
    assert len(jax.jit(lambda x: constrain(x * 2, "rows", "heads", None))(x).sharding.device_set) == 1
    assert constrain(x, "rows") is x


def test_a_dimension_too_small_to_split_is_left_to_the_compiler() -> None:
    mesh = mesh_of()

    @jax.jit
    def split(x: jax.Array) -> jax.Array:
        with scope(mesh, Rules()):
            return constrain(x * 2, "rows", "heads")

    out = split(jnp.ones((3, 4)))
    assert out.shape == (3, 4) and float(out.sum()) == 24.0


def test_constrain_wants_a_name_for_each_dimension() -> None:
    with scope(mesh_of(), Rules()), pytest.raises(MeshError, match=r"shape \(4, 4\) was given 1 axis names"):
        constrain(jnp.ones((4, 4)), "rows")
