"""Windows by position: a token sees so many tokens of its path, whatever lies between them in the row."""

from __future__ import annotations

import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh
from numpy.typing import NDArray

from forgejax.ops import TreeMeta, split_meta, tree_attention, tree_meta
from forgejax.ops.tree.attention import Kernel
from forgejax.ops.tree.cpu import CpuKernel
from forgejax.ops.tree.gpu import GpuKernel
from forgejax.ops.tree.tpu import TpuKernel
from tests.ops.tree.trees import (
    QUICKLY,
    ancestry,
    attention,
    depths,
    normal,
    oracle,
    out_and_grads,
    real_tokens,
    rows,
)

_KERNELS = [CpuKernel(), TpuKernel(interpret=True), GpuKernel(interpret=True)]


def _visible(end: NDArray[np.int32], window: int) -> NDArray[np.bool_]:
    """[B, i, j] by the definition."""
    positions = depths(end)
    seen: NDArray[np.bool_] = ancestry(end) & (positions[:, :, None] - positions[:, None, :] < window)
    return seen


def _comb() -> NDArray[np.int32]:
    """A chain of 32, then a leaf of each of its nodes, from the last up: each leaf sees a token further up."""
    return np.concatenate([64 - np.arange(32), np.arange(33, 65)]).astype(np.int32)[None]


def _listed(meta: TreeMeta, row: int) -> list[tuple[int, int]]:
    n = meta.n_pairs[row]
    return list(zip(meta.q_block[row, :n].tolist(), meta.kv_block[row, :n].tolist(), strict=True))


@pytest.mark.parametrize(
    ("kernel", "heads", "kv_heads"),
    [(CpuKernel(), 3, 1), (TpuKernel(interpret=True), 4, 2), (GpuKernel(interpret=True), 4, 2)],
)
def test_every_backend_equals_the_oracle_and_compiles_once_for_all_windows(
    kernel: Kernel, heads: int, kv_heads: int
) -> None:
    lengths = [512, 300, 0]
    q, k, v, w = normal(0, *[(3, 512, h, 16) for h in (heads, kv_heads, kv_heads, heads)])
    weight = w * real_tokens(lengths, 512)
    end = rows(1, 512, lengths, branching=0.01)
    positions = depths(end)
    traced = []

    @functools.partial(jax.jit, compiler_options=QUICKLY)
    def ours(meta: TreeMeta) -> list[jax.Array]:
        traced.append(meta)
        return out_and_grads(attention(meta, kernel), q, k, v, weight)

    assert positions.max() > 256  # the deepest path crosses blocks that the windows shut out
    for window in (1, 40, 130, 256):
        meta = tree_meta(end, np.array(lengths), 128, window=window, positions=positions)
        expected = out_and_grads(oracle(end, window, positions), q, k, v, weight)
        for a, b in zip(ours(meta), expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)
    assert len(traced) == 1


@pytest.mark.parametrize("block", [8, 64])
def test_blocks_equal_the_dense_mask_to_rounding_in_fp64(block: int) -> None:
    lengths = [64, 50, 9, 33]
    with jax.enable_x64(True):
        q, k, v, w = normal(2, *[(4, 64, h, 8) for h in (4, 2, 2, 4)], dtype="float64")
        weight = w * real_tokens(lengths, 64).astype("float64")
        end = rows(3, 64, lengths, branching=0.1)
        positions = depths(end)
        ours = jax.jit(lambda meta: out_and_grads(attention(meta, CpuKernel()), q, k, v, weight))
        for window in (1, 3, 8, 20):
            meta = tree_meta(end, np.array(lengths), block, window=window, positions=positions)
            expected = out_and_grads(oracle(end, window, positions), q, k, v, weight)
            for a, b in zip(ours(meta), expected, strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kernel", _KERNELS)
def test_a_window_no_shorter_than_the_deepest_path_gives_the_very_numbers_of_none(kernel: Kernel) -> None:
    lengths = [256, 100]
    q, k, v, w = normal(4, *[(2, 256, h, 16) for h in (2, 1, 1, 2)])
    end = rows(5, 256, lengths, branching=0.02)
    positions = depths(end)
    deepest = int(positions.max()) + 1
    run = jax.jit(lambda meta: out_and_grads(attention(meta, kernel), q, k, v, w), compiler_options=QUICKLY)

    without = tree_meta(end, np.array(lengths), 128)
    expected = run(without)
    for window in (deepest, 1 << 40):
        meta = tree_meta(end, np.array(lengths), 128, window=window, positions=positions)
        assert [_listed(meta, row) for row in range(2)] == [_listed(without, row) for row in range(2)]
        jax.tree.map(np.testing.assert_array_equal, run(meta), expected)
    assert meta.first_seen.tolist() == ancestry(end).argmax(axis=2).tolist()  # the roots


@pytest.mark.parametrize("kernel", _KERNELS)
def test_leaves_behind_a_padded_trunk_count_its_positions(kernel: Kernel) -> None:
    block, trunk, used = 128, 256, 200
    leaves = rows(6, 256, [256, 90], branching=0.02)
    lengths = np.array([trunk + 256, trunk + 90])
    end = np.concatenate([np.tile(np.arange(1, trunk + 1, dtype=np.int32), (2, 1)), leaves + np.int32(trunk)], axis=1)
    end[:, :used] = lengths[:, None]
    path = np.concatenate([np.arange(used), np.zeros(trunk - used)]).astype(np.int32)  # its padding is at 0
    positions = np.concatenate([np.tile(path, (2, 1)), depths(leaves) + np.int32(used)], axis=1)
    index = jnp.tile(jnp.arange(trunk, trunk + 256), (2, 1))
    q, w, k, v = normal(7, *[(2, 256, 2, 16)] * 2, *[(2, 512, 1, 16)] * 2)
    weight = w * real_tokens([256, 90], 256)
    run = jax.jit(lambda meta: out_and_grads(attention(meta, kernel), q, k, v, weight), compiler_options=QUICKLY)

    for window in (30, 150, 300, 1000):
        meta = tree_meta(end, lengths, block, q_offset=trunk, window=window, positions=positions)
        expected = out_and_grads(oracle(end, window, positions, index), q, k, v, weight)
        for a, b in zip(run(meta), expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


def test_rows_split_over_devices_give_the_same_numbers() -> None:
    lengths, window = [64, 41], 11
    q, k, v, w = normal(8, *[(2, 64, h, 8) for h in (2, 1, 1, 2)])
    end = rows(9, 64, lengths)
    positions = depths(end)
    mesh = Mesh(np.array(jax.devices()[:4]), ("length",), axis_types=(AxisType.Auto,))
    logical_at = np.stack([np.random.default_rng(row).permutation(8) for row in range(2)])
    meta = tree_meta(end, np.array(lengths), 8, window=window, positions=positions)
    split = split_meta(meta, logical_at, 4)
    stored = (logical_at[:, :, None] * 8 + np.arange(8)).reshape(2, 64)
    weight = w * real_tokens(lengths, 64)

    ours = jax.jit(
        lambda *arrays: out_and_grads(
            functools.partial(tree_attention, meta=split, mesh=mesh, length_axis="length"), *arrays
        )
    )(*(jnp.take_along_axis(x, stored[:, :, None, None], axis=1) for x in (q, k, v, weight)))

    for a, b in zip(ours, out_and_grads(oracle(end, window, positions), q, k, v, weight), strict=True):
        np.testing.assert_allclose(a, jnp.take_along_axis(b, stored[:, :, None, None], axis=1), rtol=2e-5, atol=2e-5)
    assert split.shards.n_pairs.sum(axis=1).tolist() == meta.n_pairs.tolist()


@pytest.mark.parametrize("window", [1, 2, 5, 8, 9, 16, 30])
@pytest.mark.parametrize("branching", [0.0, 0.02, 0.1, 0.5])
def test_pairs_hold_every_visible_entry_and_none_is_empty(window: int, branching: float) -> None:
    lengths = np.array([64, 64, 64, 45, 0])
    end = np.concatenate([_comb(), rows(10, 64, [64, 64, 45, 0], branching)])
    meta = tree_meta(end, lengths, 8, window=window, positions=depths(end))

    visible = _visible(end, window)
    for row in range(5):
        seen = visible[row].reshape(8, 8, 8, 8).any(axis=(1, 3)) & (np.arange(8)[:, None] * 8 < lengths[row])
        assert _listed(meta, row) == [(int(a), int(b)) for a, b in np.argwhere(seen)]
    np.testing.assert_array_equal(meta.first_seen, visible.argmax(axis=2))


@pytest.mark.parametrize("window", [8, 15, 16, 30, 64])
def test_pairs_without_a_mask_are_those_in_which_every_query_sees_every_key(window: int) -> None:
    end = np.concatenate([rows(11, 64, [64], branching=0.0), rows(12, 64, [64, 64], branching=0.02)])
    meta = tree_meta(end, np.full(3, 64), 8, window=window, positions=depths(end))

    counts = []
    for row in range(3):
        full = _visible(end, window)[row].reshape(8, 8, 8, 8).all(axis=(1, 3))
        unmasked = {
            (a, b) for a, b in _listed(meta, row) if b < a < meta.full_until[row, b] and meta.full_from[row, a] <= b
        }
        assert unmasked == {(int(a), int(b)) for a, b in np.argwhere(full)}
        counts.append(len(unmasked))
    assert counts[0] == {8: 0, 15: 0, 16: 7, 30: 13, 64: 28}[window]


def test_a_row_of_two_hundred_thousand_tokens_is_described_in_well_under_a_second() -> None:
    length, window = 391 * 512, 4096
    end, positions = np.full((1, length), length, np.int32), np.arange(length, dtype=np.int32)[None]
    started = time.process_time()
    meta = tree_meta(end, np.array([length]), 512, window=window, positions=positions)
    taken = time.process_time() - started

    assert taken < 0.5
    # Of the 8 blocks before its own the first query sees 4,095 tokens: some of each.
    assert meta.n_pairs.tolist() == [sum(range(1, 9)) + (391 - 8) * 9]


def test_a_window_that_cannot_be_is_refused_with_what_to_give() -> None:
    end, lengths = rows(13, 64, [64, 41]), np.array([64, 41])
    positions = depths(end)

    with pytest.raises(ValueError, match=r"a window of 0 tokens: expected at least 1, .*; None is no window"):
        tree_meta(end, lengths, 8, window=0, positions=positions)
    with pytest.raises(ValueError, match=r"by position, got none: pass the depth .* in the shape of end, \(2, 64\)"):
        tree_meta(end, lengths, 8, window=4)
    with pytest.raises(ValueError, match=r"token \d+ of row \d has position .*: a window goes by depth in the tree"):
        tree_meta(end, lengths, 8, window=4, positions=np.tile(np.arange(64, dtype=np.int32), (2, 1)))
    assert tree_meta(end, lengths, 8, positions=positions).first_seen is None
