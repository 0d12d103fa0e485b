"""Laws of a layout: what a mesh and its rules do to arrays, and what one device leaves alone."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, Mesh, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from forgejax.errors import MeshError
from forgejax.sharding import ONE_DEVICE, Layout, MeshConfig, Rules, build_mesh, constrain, current_layout, resolve


def layout_of(name: str = "cpu-8", *, rules: Rules | None = None, **axes: int) -> Layout:
    return Layout(mesh=build_mesh(resolve(MeshConfig(name=name, **axes))), rules=rules or Rules())


def weight(shape: tuple[int, ...], *names: str) -> nnx.Param:
    return nnx.Param(jax.ShapeDtypeStruct(shape, jnp.float32), logical_axes=names)


def spec_of(shape: tuple[int, ...], *names: str, layout: Layout) -> P:
    (sharding,) = jax.tree.leaves(layout.placements({"w": weight(shape, *names)}))
    spec: P = sharding.spec
    return spec


def answers(layout: Layout) -> dict[str, Any]:
    """What callers ask of a layout without knowing which it is."""
    batch = layout.put({"x": np.arange(16.0).reshape(4, 4)}, {"x": ("rows", "length")})
    with layout.scope():
        doubled = jax.jit(lambda x: constrain(x * 2, "rows", "length"), out_shardings=layout.sharding("rows"))
        return {
            "platform": layout.platform,
            "shards": layout.shards("rows", "length"),
            "axes": (layout.axes("rows"), layout.axis("heads"), layout.kv_heads_axis(4), layout.axes(None)),
            "sum": float(
                layout.shard_map(lambda x: x * 2, P(layout.axes("rows")), P(layout.axes("rows")))(batch["x"]).sum()
            ),
            "doubled": np.asarray(doubled(batch["x"])).tolist(),
            "held": batch["x"].addressable_shards[0].data.shape,
            "scope": current_layout() == layout,
        }


def test_one_device_and_a_mesh_answer_alike_questions() -> None:
    one, split = answers(ONE_DEVICE), answers(layout_of("cpu-8", fsdp=2, tensor=2, context=2))

    assert one["axes"] == ((), None, None, ())
    assert split["axes"] == (("fsdp",), "tensor", "tensor", ())
    assert (one["shards"], split["shards"]) == (1, 4)
    assert (one["held"], split["held"]) == ((4, 4), (2, 2))
    for alike in ("platform", "sum", "doubled", "scope"):
        assert one[alike] == split[alike]
    assert (one["platform"], one["sum"], one["scope"]) == ("cpu", 240.0, True)


def test_one_device_splits_no_weight_and_leaves_the_choice_to_jax() -> None:
    tree = {"w": weight((7, 5), "embed", "mlp"), "count": jnp.zeros(())}
    assert Layout() == ONE_DEVICE and not ONE_DEVICE.on_mesh and layout_of("cpu-1").on_mesh
    assert ONE_DEVICE.shardings(tree) is ONE_DEVICE.sharding("rows") is ONE_DEVICE.sharding() is None
    with jax.default_device(jax.devices()[3]):
        placements = jax.tree.leaves(ONE_DEVICE.placements(tree))
    assert placements == [SingleDeviceSharding(jax.devices()[3])] * 2
    assert jax.tree.leaves(ONE_DEVICE.placements(tree)) == [SingleDeviceSharding(jax.devices()[0])] * 2


def test_an_unknown_axis_is_refused_on_one_device_too() -> None:
    for layout in (ONE_DEVICE, layout_of()):
        with pytest.raises(MeshError, match="unknown logical axis 'hedas'; expected one of vocab"):
            layout.axes("hedas")


def test_a_mesh_of_other_axes_is_refused() -> None:
    other = Mesh(np.array(jax.devices()[:2]), ("model",), axis_types=(AxisType.Auto,))
    with pytest.raises(MeshError, match=r"a mesh with axes model; expected those of build_mesh: .*'tensor'"):
        Layout(mesh=other)


def test_other_rules_shard_otherwise() -> None:
    rules = Rules(embed=("tensor",), mlp=("fsdp",), rows=("data",), length=("fsdp",))
    default, other = layout_of(), layout_of(rules=rules)

    assert spec_of((8, 16), "embed", "mlp", layout=default) == P("fsdp", "tensor")
    assert spec_of((8, 16), "embed", "mlp", layout=other) == P("tensor", "fsdp")
    found = [layout.sharding("rows", "length") for layout in (default, other)]
    assert [each.spec for each in found if each] == [P(("data", "fsdp"), None), P("data", "fsdp")]
    assert (default.shards("rows"), other.shards("rows"), other.shards("length")) == (4, 2, 2)


def test_a_weight_is_split_as_its_logical_axes_say() -> None:
    layout = layout_of()
    found = spec_of((2, 8, 4, 6), "layers", "embed", "heads", "head_dim", layout=layout)
    assert found == P(None, "fsdp", "tensor", None)
    assert spec_of((512, 8), "vocab", "embed", layout=layout) == P("tensor", "fsdp")


def test_mesh_axes_of_one_device_leave_no_trace_in_a_spec() -> None:
    assert spec_of((512, 7), "vocab", "embed", layout=layout_of("cpu-1")) == P(None, None)


def test_key_value_heads_fewer_than_their_shards_are_whole_and_others_must_divide() -> None:
    layout = layout_of(tensor=4)
    names = ("layers", "embed", "kv_heads", "head_dim")
    assert spec_of((2, 8, 2, 6), *names, layout=layout)[2] is None
    assert spec_of((2, 8, 4, 6), *names, layout=layout)[2] == "tensor"
    with pytest.raises(MeshError, match="kv_heads dimension 6 does not divide over tensor 4"):
        spec_of((2, 8, 6, 6), *names, layout=layout)
    with pytest.raises(MeshError, match="kv_heads dimension 3 does not divide over tensor 4"):
        spec_of((2, 8, 3, 6), *names, layout=layout)


def test_a_dimension_that_does_not_divide_names_the_weight_its_shape_and_the_axis() -> None:
    with pytest.raises(MeshError, match=r"weight .*'gate'.* of shape \(2, 8, 15\): its mlp dimension 15 .* tensor 2"):
        layout_of().shardings({"gate": weight((2, 8, 15), "layers", "embed", "mlp")})


def test_one_mesh_axis_never_splits_two_dimensions_of_a_weight() -> None:
    with pytest.raises(MeshError, match="split twice by one mesh axis"):
        layout_of(rules=Rules(mlp=("fsdp",))).shardings({"w": weight((8, 8), "embed", "mlp")})


def test_names_that_do_not_fit_a_weight_are_refused() -> None:
    with pytest.raises(MeshError, match="unknown logical axis 'hedas'; expected one of vocab"):
        spec_of((8, 8), "embed", "hedas", layout=layout_of())
    with pytest.raises(MeshError, match="1 axis names"):
        spec_of((8, 8), "embed", layout=layout_of())


def test_optimizer_moments_are_split_like_their_weights_and_counts_are_whole() -> None:
    params = nnx.State({"w": weight((8, 16), "embed", "mlp")})
    state = jax.eval_shape(optax.adamw(1e-3).init, params)
    shardings = layout_of().shardings(state)
    jax.tree.map(lambda sharding, leaf: None, shardings, state)  # raises where the structures differ
    specs = [sharding.spec for sharding in jax.tree.leaves(shardings)]
    assert sorted(map(str, specs)) == sorted(map(str, [P(), P("fsdp", "tensor"), P("fsdp", "tensor")]))


def test_rows_fall_into_equal_shards_in_mesh_order() -> None:
    layout = layout_of()
    rows = layout.put(np.arange(8, dtype=np.int32)[:, None], ("rows",))
    by_device = {shard.device.id: shard.data[:, 0].tolist() for shard in rows.addressable_shards}
    assert by_device == {0: [0, 1], 1: [0, 1], 2: [2, 3], 3: [2, 3], 4: [4, 5], 5: [4, 5], 6: [6, 7], 7: [6, 7]}
    assert (layout.axes("rows"), layout.shards("rows")) == (("data", "fsdp"), 4)
    whole = layout.sharding()
    assert whole is not None and whole.spec == P()

    alone = layout_of("cpu-1").sharding("rows")
    assert layout_of("cpu-1").axes("rows") == ()
    assert alone is not None and alone.spec == P(None)


def test_the_heads_axis_is_none_where_heads_are_whole() -> None:
    assert layout_of().axis("heads") == "tensor"
    assert layout_of("cpu-1").axis("heads") is None
    assert layout_of(tensor=4).kv_heads_axis(2) is None
    assert layout_of(tensor=4).kv_heads_axis(4) == "tensor"
    assert layout_of(rules=Rules(kv_heads=())).kv_heads_axis(4) is None
    with pytest.raises(MeshError, match="takes one at most"):
        layout_of(rules=Rules(heads=("fsdp", "tensor"))).axis("heads")


def test_constrain_splits_an_activation_within_a_scope_and_does_nothing_outside() -> None:
    layout, x = layout_of(), jnp.ones((8, 4, 6))

    @jax.jit
    def split(x: jax.Array) -> jax.Array:
        with layout.scope():
            return constrain(x * 2, "rows", "heads", None)

    assert split(x).sharding.spec == P(("data", "fsdp"), "tensor")
    assert len(jax.jit(lambda x: constrain(x * 2, "rows", "heads", None))(x).sharding.device_set) == 1
    assert constrain(x, "rows") is x and current_layout() is ONE_DEVICE


def test_a_dimension_too_small_to_split_is_left_to_the_compiler() -> None:
    layout = layout_of()

    @jax.jit
    def split(x: jax.Array) -> jax.Array:
        with layout.scope():
            return constrain(x * 2, "rows", "heads")

    out = split(jnp.ones((3, 4)))
    assert out.shape == (3, 4) and float(out.sum()) == 24.0


def test_constrain_wants_a_name_for_each_dimension() -> None:
    with layout_of().scope(), pytest.raises(MeshError, match=r"shape \(4, 4\) was given 1 axis names"):
        constrain(jnp.ones((4, 4)), "rows")
