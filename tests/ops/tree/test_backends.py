from __future__ import annotations

import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from forgejax.ops import TreeMeta, tree_meta
from forgejax.ops.tree.attention import Kernel, kernel_for
from forgejax.ops.tree.cpu import CpuKernel
from forgejax.ops.tree.gpu import GpuKernel
from forgejax.ops.tree.tpu import TpuKernel
from tests.ops.tree.trees import (
    QUICKLY,
    attention,
    depths,
    normal,
    oracle,
    out_and_grads,
    real_tokens,
    rows,
)

_LENGTHS = [256, 100, 0]  # three, one and no active pair of blocks of 128


@pytest.mark.parametrize(
    ("kernel", "heads", "kv_heads"),
    [
        (CpuKernel(), 3, 1),
        (TpuKernel(interpret=True), 2, 2),
        (TpuKernel(interpret=True), 3, 1),
        (TpuKernel(interpret=True), 8, 2),
        (GpuKernel(interpret=True), 2, 2),
        (GpuKernel(interpret=True), 8, 2),
    ],
)
def test_every_backend_equals_the_oracle_and_compiles_once_for_all_trees(
    kernel: Kernel, heads: int, kv_heads: int
) -> None:
    q, k, v, w = normal(0, *[(3, 256, h, 16) for h in (heads, kv_heads, kv_heads, heads)])
    weight = w * real_tokens(_LENGTHS, 256)
    traced = []

    @functools.partial(jax.jit, compiler_options=QUICKLY)
    def ours(meta: TreeMeta) -> list[jax.Array]:
        traced.append(meta)
        return out_and_grads(attention(meta, kernel), q, k, v, weight)

    expected = jax.jit(lambda end: out_and_grads(oracle(end), q, k, v, weight), compiler_options=QUICKLY)
    for seed in (1, 2):
        end = rows(seed, 256, _LENGTHS)
        for a, b in zip(ours(tree_meta(end, np.array(_LENGTHS), 128)), expected(end), strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)
    assert len(traced) == 1


@pytest.mark.parametrize("window", [None, 70, 200])
@pytest.mark.parametrize("kernel", [CpuKernel(), TpuKernel(interpret=True), GpuKernel(interpret=True)])
def test_some_of_the_query_blocks_in_any_order_see_what_they_see_among_all(kernel: Kernel, window: int | None) -> None:
    block, at = 128, np.array([[3, 1], [0, 2], [2, 3]])
    lengths = [512, 300, 400]
    q, w, k, v = normal(3, (3, 512, 4, 16), (3, 512, 4, 16), (3, 512, 2, 16), (3, 512, 2, 16))
    end = rows(4, 512, lengths, branching=0.05 if window is None else 0.01)
    positions = depths(end)
    index_BT = (at[:, :, None] * block + np.arange(block)).reshape(3, 2 * block)
    meta = tree_meta(end, np.array(lengths), block, query_blocks=at, window=window, positions=positions)
    q, weight = (jnp.take_along_axis(x, index_BT[..., None, None], axis=1) for x in (q, w * real_tokens(lengths, 512)))

    ours = jax.jit(lambda: out_and_grads(attention(meta, kernel), q, k, v, weight), compiler_options=QUICKLY)()
    expected = out_and_grads(oracle(end, window, positions, index_BT), q, k, v, weight)

    for a, b in zip(ours, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


def test_queries_behind_an_offset_are_the_last_blocks() -> None:
    end, lengths = rows(5, 64, [64, 41]), np.array([64, 41])
    offset, listed = (
        tree_meta(end, lengths, 8, **which) for which in ({"q_offset": 40}, {"query_blocks": np.array([[5, 6, 7]] * 2)})
    )

    jax.tree.map(np.testing.assert_array_equal, offset, listed)
    assert offset.q_block.shape == (2, 6 + 7 + 8)
    with pytest.raises(ValueError, match=r"row length 64 after the first 41 is not a multiple of block size 8"):
        tree_meta(end, lengths, 8, q_offset=41)


def test_queries_and_keys_that_do_not_fit_their_visibility_are_refused() -> None:
    q, k, v = normal(6, (1, 64, 2, 8), (1, 64, 1, 8), (1, 64, 1, 8))
    meta = tree_meta(rows(5, 64, [64]), np.array([64]), 8, q_offset=32)

    with pytest.raises(ValueError, match=r"64 queries over 64 keys with the visibility of 32 over 64"):
        attention(meta, CpuKernel())(q, k, v)


def test_the_platform_of_the_devices_chooses_the_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    mesh = Mesh(np.array(jax.devices("cpu")[:2]), ("r",), axis_types=(AxisType.Auto,))

    assert kernel_for(None) == CpuKernel()
    for platform, kernel in [("tpu", TpuKernel()), ("gpu", GpuKernel()), ("cuda", GpuKernel())]:
        monkeypatch.setattr(jax, "default_backend", lambda platform=platform: platform)
        assert kernel_for(None) == kernel
        assert kernel_for(mesh) == CpuKernel()  # a mesh speaks for itself
    monkeypatch.setattr(jax, "default_backend", lambda: "abacus")
    with pytest.raises(ValueError, match="no tree attention kernel for platform 'abacus'"):
        kernel_for(None)


def _listed(meta: TreeMeta, row: int) -> list[tuple[int, int]]:
    n = meta.n_pairs[row]
    return list(zip(meta.q_block[row, :n].tolist(), meta.kv_block[row, :n].tolist(), strict=True))


def test_the_order_by_keys_holds_the_same_pairs_as_the_order_by_queries() -> None:
    lengths = [64, 41, 0, 17]
    meta = tree_meta(rows(3, 64, lengths), np.array(lengths), 8)

    for row in range(4):
        pairs = _listed(meta, row)
        by_key = meta.pairs_by_key[row, : meta.n_pairs[row]].tolist()
        assert [(p >> 16, p & 0xFFFF) for p in by_key] == sorted(pairs, key=lambda pair: (pair[1], pair[0]))
        assert pairs == sorted(pairs)
        first, first_by_key = meta.first_pair[row].tolist(), meta.first_by_key[row].tolist()
        assert [pairs[first[a] : first[a + 1]] for a in range(8)] == [[p for p in pairs if p[0] == a] for a in range(8)]
        for b in range(8):
            assert {p & 0xFFFF for p in by_key[first_by_key[b] : first_by_key[b + 1]]} <= {b}
        assert first_by_key[8] == len(pairs)


def test_pairs_without_a_mask_are_those_in_which_every_query_sees_every_key() -> None:
    end = np.stack([np.full(64, 64, np.int32), *rows(4, 64, [64, 64])])
    meta = tree_meta(end, np.full(3, 64), 8)

    index = np.arange(64)
    for row in range(3):
        visible = (index[None] <= index[:, None]) & (index[:, None] < end[row][None])
        full = visible.reshape(8, 8, 8, 8).all(axis=(1, 3))
        unmasked = {(a, b) for a, b in _listed(meta, row) if b < a < meta.full_until[row, b]}
        assert unmasked == {(int(a), int(b)) for a, b in np.argwhere(full)}
    assert full.any() and meta.n_pairs[0] == 36


def test_a_row_of_two_hundred_thousand_tokens_is_described_in_well_under_a_second() -> None:
    length = 391 * 512
    started = time.process_time()
    meta = tree_meta(np.full((1, length), length, np.int32), np.array([length]), 512)
    taken = time.process_time() - started

    assert taken < 0.5
    assert meta.n_pairs.tolist() == [391 * 392 // 2]
    assert sum(x.nbytes for x in jax.tree.leaves(meta)) - meta.end.nbytes < 1_000_000


def test_more_blocks_than_a_pair_can_name_are_refused() -> None:
    with pytest.raises(ValueError, match=r"are 40000 blocks; choose a block size that makes at most 32768"):
        tree_meta(np.zeros((1, 40_000), np.int32), np.array([0]), 1)
