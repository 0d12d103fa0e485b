"""What the TPU backend hands to JAX's kernel, by that kernel's own reference."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ref_ragged_paged_attention

from forgejax.ops.paged import tpu
from forgejax.ops.paged.attention import PagedKernel, paged_attention, pick_paged_kernel
from forgejax.ops.paged.tpu import TpuPagedKernel
from tests.ops.paged.test_attention import LAYER, LAYERS, PAGES, Case, W, _normal
from tests.ops.tree.trees import QUICKLY

K, C = 2, 24


def _refer(q: jax.Array, *rest: Any, **options: Any) -> jax.Array:
    """The reference, whose output ends where the last run does."""
    assert options.pop("num_kv_pages_per_block") > 0 and options.pop("num_queries_per_block") > 0
    assert options.pop("vmem_limit_bytes") < 128 * 2**20
    out = ref_ragged_paged_attention(q, *rest, **options)
    return jnp.pad(out, ((0, len(q) - len(out)), (0, 0), (0, 0)), constant_values=np.nan)


@pytest.mark.parametrize("window", [None, 21])
def test_it_equals_the_cpus(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tpu, "ragged_paged_attention", _refer)
    case = Case([(70, 1), (0, 1), (30, 9)], 2)
    held = jnp.asarray(_normal(1, LAYERS, PAGES, 2, K, W, C))
    pool = jnp.einsum("LPDKWC->LPWKDC", held).reshape(LAYERS, PAGES, W, 2 * K, C)
    pool = jnp.pad(pool, ((0, 0),) * 4 + ((0, 128 - C),))
    q, k, v = (jnp.asarray(_normal(seed, 40, n, C)) for seed, n in ((2, 4), (3, K), (4, K)))

    def attend(kernel: PagedKernel, pool: jax.Array) -> tuple[jax.Array, jax.Array]:
        return paged_attention(q, k, v, pool, jnp.int32(LAYER), batch=case.batch, kernel=kernel, window=window)

    out, after = attend(TpuPagedKernel(), pool)  # not jitted, for the reference counts sequences in Python
    expected, expected_after = jax.jit(attend, static_argnums=0, compiler_options=QUICKLY)(
        pick_paged_kernel("cpu"), held
    )

    np.testing.assert_allclose(out[:11], expected[:11], atol=3e-6)
    np.testing.assert_array_equal(out[11:], 0.0)
    split = after[..., :C].reshape(LAYERS, PAGES, W, K, 2, C)
    np.testing.assert_array_equal(jnp.einsum("LPWKDC->LPDKWC", split), expected_after)


def test_a_pool_has_whole_lanes_and_sublanes() -> None:
    kernel, shape = TpuPagedKernel(), {"layers": 2, "pages": 3, "kv_heads": 4, "head_size": 64}
    assert kernel.make_pool(**shape, page_tokens=32, dtype="bfloat16").shape == (2, 3, 32, 8, 128)
    with pytest.raises(ValueError, match=r"engine\.page_tokens is 24; expected a multiple of 16"):
        kernel.make_pool(**shape, page_tokens=24, dtype="bfloat16")
    with pytest.raises(ValueError, match="keys and values in float16; expected bfloat16 or float32"):
        kernel.make_pool(**shape, page_tokens=16, dtype="float16")
