from __future__ import annotations

import functools
import time

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from forgejax.ops import TreeMeta, tree_meta
from forgejax.ops.tree_attention import Kernel, kernel_for
from forgejax.ops.tree_attention_cpu import CpuKernel
from forgejax.ops.tree_attention_gpu import GpuKernel
from forgejax.ops.tree_attention_tpu import TpuKernel

from .trees import QUICKLY, attention, normal, oracle, out_and_grads, real_tokens, rows

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
        assert pairs == [(a, b) for a in range(8) for b in range(a + 1) if a < meta.reach[row, b]]
        first = meta.first_pair[row].tolist()
        assert [pairs[first[a] : first[a + 1]] for a in range(8)] == [[p for p in pairs if p[0] == a] for a in range(8)]


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
