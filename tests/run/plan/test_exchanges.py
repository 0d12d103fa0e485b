"""Laws of what is read off a compiled program's text."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from forgejax.run.plan.exchanges import Exchanges, read_exchanges

_GATHER = 'all-gather(%p.1), channel_id=1, replica_groups=[2,4]<=[8], frontend_attributes={chain_id="3"}'
_LOOP = """HloModule jit_f, num_partitions=8

%cond (p.0: (s32[], f32[8,16])) -> pred[] {
  %bound = s32[]{:T(128)} constant(36), backend_config={}
  %at = s32[] get-tuple-element(%p.0), index=0
  ROOT %lt = pred[]{:T(512)} compare(%at, %bound), direction=LT
}

%fused (p.1: bf16[4,16]) -> bf16[16,16] {
  ROOT %gather.1 = bf16[16,16]{1,0:T(8,128)(2,1)} GATHER
}

%fused.2 (p.1: bf16[4,16]) -> bf16[16,16] {
  ROOT %gather.2 = bf16[16,16]{1,0:T(8,128)(2,1)} GATHER
}

%body (p.2: (s32[], f32[8,16])) -> (s32[], f32[8,16]) {
  %a = bf16[16,16] fusion(%x), kind=kCustom, calls=%fused
  %b = bf16[16,16] fusion(%x), kind=kCustom, calls=%fused.2
  ROOT %t = (s32[], f32[8,16]) tuple(%i, %y)
}

ENTRY %main (p.3: f32[8,16]) -> f32[8,16] {
  %w = (s32[], f32[8,16]) while(%init), condition=%cond, body=%body
  %start = (f32[8,16], f32[8,16]) all-reduce-start(%v), channel_id=9, replica_groups={{0,1},{2,3}}, to_apply=%add
  %p = f32[8,16] collective-permute(%v), channel_id=10, source_target_pairs={{0,1},{1,0}}
  %s = bf16[2,16] reduce-scatter(%v), channel_id=1, replica_groups=mesh['a'=4,'b'=2] {'b'}, dimensions={0}
  %e = bf16[8,16] all-gather(%v), channel_id=1, replica_groups={}, dimensions={0}
  ROOT %r = f32[8,16] get-tuple-element(%w), index=1
}
""".replace("GATHER", _GATHER)


def test_a_collective_counts_as_often_as_its_loop_goes_round_and_once_however_it_is_spread_over_fusions() -> None:
    gathered = 36 * 16 * 16 * 2 * 3 // 4  # a chip of four sends three quarters of the whole
    array = 8 * 16 * 4
    assert read_exchanges(_LOOP) == Exchanges(
        runs={"all-gather": 37, "all-reduce": 1, "collective-permute": 1, "reduce-scatter": 1},
        sent={
            "all-gather": gathered + 8 * 16 * 2 * 7 // 8,  # without groups all eight are one
            "all-reduce": 2 * array // 2,
            "collective-permute": array,
            "reduce-scatter": 2 * 2 * 16 * 2 // 2,
        },
    )


def test_programs_one_after_the_other_add_up() -> None:
    once = read_exchanges(_LOOP)
    both = Exchanges.join([once, once])
    assert (both.runs["all-gather"], both.bytes) == (74, 2 * once.bytes)


def test_what_the_compiler_of_this_machine_writes_is_read() -> None:
    mesh = Mesh(np.array(jax.devices()[:4]), ("x",), axis_types=(AxisType.Auto,))
    split, whole = (NamedSharding(mesh, spec) for spec in (P("x"), P()))
    gather = jax.jit(lambda x: x, out_shardings=whole)
    text = gather.trace(jax.ShapeDtypeStruct((64, 8), jnp.float32, sharding=split)).lower().compile().as_text()
    found = read_exchanges(text)
    assert found.sent == {"all-gather": 64 * 8 * 4 * 3 // 4}
