"""The GPU kernel, in Pallas' interpreter and lowered for a device that is not there."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from forgejax.ops.paged import gpu
from forgejax.ops.paged.attention import paged_attention, pick_paged_kernel
from forgejax.ops.paged.batch import PagedBatch
from forgejax.ops.paged.gpu import GpuPagedKernel
from tests.ops.paged.test_attention import LAYER, LAYERS, PAGES, Case, W, _normal
from tests.ops.tree.trees import QUICKLY


@pytest.mark.parametrize(("window", "heads", "kv_heads", "width"), [(None, 6, 2, 24), (21, 4, 2, 16)])
def test_it_equals_the_cpus_also_where_programs_share_a_sequences_keys(
    window: int | None, heads: int, kv_heads: int, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "_SHARE_KEYS", 48)  # four programs for the 192 keys of a table
    case = Case([(170, 1), (0, 1), (30, 9), (0, 23)], 2)
    assert gpu._count_shares(2 * kv_heads, 192) == 4
    pool = jnp.asarray(_normal(1, LAYERS, PAGES, 2, kv_heads, W, width))
    q, k, v = (jnp.asarray(_normal(seed, 40, n, width)) for seed, n in ((2, heads), (3, kv_heads), (4, kv_heads)))

    @functools.partial(jax.jit, static_argnums=0, compiler_options=QUICKLY)
    def attend(kernel: object, pool: jax.Array) -> tuple[jax.Array, jax.Array]:
        return paged_attention(q, k, v, pool, jnp.int32(LAYER), batch=case.batch, kernel=kernel, window=window)  # type: ignore[arg-type]

    (out, after), (expected, expected_after) = (
        attend(kernel, pool) for kernel in (GpuPagedKernel(interpret=True), pick_paged_kernel("cpu"))
    )

    np.testing.assert_array_equal(after, expected_after)
    np.testing.assert_allclose(out[:34], expected[:34], atol=3e-6)
    assert np.isfinite(out).all()


@pytest.mark.parametrize(
    ("heads", "kv_heads", "width", "page", "dtype"),
    [(32, 8, 128, 16, jnp.bfloat16), (9, 3, 64, 32, jnp.float32), (28, 4, 96, 64, jnp.bfloat16)],
)
def test_a_mixed_batch_lowers_to_two_triton_kernels(
    heads: int, kv_heads: int, width: int, page: int, dtype: object
) -> None:
    kernel, shape = GpuPagedKernel(), jax.ShapeDtypeStruct
    pool = jax.eval_shape(
        lambda: kernel.make_pool(
            layers=2,
            pages=64,
            page_tokens=page,
            kv_heads=kv_heads,
            head_size=width,
            dtype=dtype,  # type: ignore[arg-type]
        )
    )
    tables, lengths, starts = (jnp.zeros(size, jnp.int32) for size in ((40, 256), 40, 41))
    batch = PagedBatch(
        tables_NM=tables, lengths_N=lengths, starts_O=starts, count=jnp.int32(0), singles=32, page_tokens=page
    )
    q, k = (shape((544, n, width), dtype) for n in (heads, kv_heads))
    step = jax.jit(lambda q, k, pool: paged_attention(q, k, k, pool, jnp.int32(0), batch=batch, kernel=kernel))

    text = step.trace(q, k, pool).lower(lowering_platforms=("cuda",)).as_text()

    assert text.count("__gpu$xla.gpu.triton") == 2


def test_numbers_that_it_cannot_multiply_are_refused() -> None:
    with pytest.raises(ValueError, match=r"keys and values in float64; set policy\.compute_dtype"):
        GpuPagedKernel().make_pool(layers=1, pages=1, page_tokens=16, kv_heads=1, head_size=16, dtype="float64")
