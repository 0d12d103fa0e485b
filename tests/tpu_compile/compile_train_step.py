"""The whole train step through the real TPU compiler: what it needs of a chip's memory, and what chips exchange.

An 8B policy of Qwen3's shape, BF16 weights with FP32 gradients and moments, on a slice of 64 v5e that is described and
not there. Trees are packed by ``pack``, so that shapes are those of a run.
"""

from __future__ import annotations

import os

# Before jax is imported: no TPU is looked for, and other processes may compile at the same time.
os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}

import dataclasses
import math
import re
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
from jax.experimental import topologies

from forgejax.learner import (
    PackConfig,
    PackedBatch,
    PackedStep,
    StepConfig,
    make_supervised_sample,
    make_train_step,
    pack,
)
from forgejax.learner.packing.deal import batch_axes, deal_rows
from forgejax.learner.step.trunk_step import make_trunk_step
from forgejax.models import abstract_policy
from forgejax.sharding import Layout, MeshConfig, build_mesh, resolve
from tests.tpu_compile.policies import COLLECTIVES, GIB, QWEN3_8B, USABLE

_STEP = StepConfig()
_CONTEXT, _TENSOR = 16, 4
_ROW = 204_800  # 25 blocks of 512 for each of the chips that share it
_TRUNK = 32_768


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Exchange:
    """One array of a collective: what a chip has of the result, and the dtype in which it gave its own part."""

    operation: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Program:
    """A compiled function, and what lies on each chip beside it while it runs: bytes."""

    compiled: jax.stages.Compiled
    beside: int

    @property
    def peak(self) -> int:
        """Bytes of a chip's memory while the function runs in a learner."""
        memory = self.compiled.memory_analysis()
        assert memory is not None
        own = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
        return own + memory.temp_size_in_bytes + memory.generated_code_size_in_bytes + self.beside

    def exchanged(self) -> list[_Exchange]:
        """Every array that some collective gives a chip."""
        text = self.compiled.as_text()
        assert text is not None
        dtype_of = dict(re.findall(r"(%[\w.-]+) = \(?(\w+)\[", text))
        found = []
        for results, operation, operand in re.findall(rf"= (.*?) ({COLLECTIVES})(?:-start)?\((%[\w.-]+)", text):
            for dims in re.findall(r"\w\[([\d,]+)\]", results):
                shape = tuple(map(int, dims.split(",")))
                found.append(_Exchange(operation=operation, dtype=dtype_of[operand], shape=shape))
        return found


def _layout(**axes: int) -> Layout:
    """All of a v5e-64; axes that are not named have a size of 1."""
    sizes = dict.fromkeys(("data", "fsdp", "context", "expert", "tensor"), 1) | axes
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:8x8").devices
    return Layout(mesh=build_mesh(resolve(MeshConfig(name="v5e-64", **sizes)), devices))


def _tree(prompt: int, answers: int, tokens: int, layout: Layout, *, row: int) -> PackedStep:
    """One prompt with different answers, in rows of that length."""
    first, later = np.zeros(prompt, np.int32), np.ones(tokens - 1, np.int32)
    group = [make_supervised_sample(str(n), first, np.append(np.int32(n + 2), later)) for n in range(answers)]
    packing = PackConfig(row_length=row, rows=1).on("tpu", layout.shards("length"))
    return pack([group], packing, row_shards=layout.shards("rows"))


def _placed(tree: Any, shardings: Any) -> Any:
    """The shapes of a tree with those shardings."""

    def one(x: Any, sharding: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return jax.tree.map(one, tree, shardings)


def _in(layout: Layout, batch: PackedBatch) -> PackedBatch:
    if (shards := layout.shards("length")) > 1:
        batch = deal_rows(batch, shards)
    return _placed(batch, jax.tree.map(lambda _, names: layout.sharding(*names), batch, batch_axes(batch)))


def _bytes(*trees: Any) -> int:
    """On each chip."""
    leaves = jax.tree.leaves(trees)
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


def _compiled(name: str, function: Callable[..., Any], *args: Any, beside: Any) -> _Program:
    """Compiled for shapes; what it took is printed, for docs/results/tpu_memory.md (``ARGS=-s``)."""
    start = time.monotonic()
    compiled = function.trace(*args).lower(lowering_platforms=("tpu",)).compile()  # type: ignore[attr-defined]
    program = _Program(compiled=compiled, beside=_bytes(beside))
    took = time.monotonic() - start
    memory = compiled.memory_analysis()
    assert memory is not None
    live = (memory.peak_memory_in_bytes + program.beside) / GIB
    print(f"\n{name}: {program.peak / GIB:.2f} GiB ({live:.2f} live at most), {took:.0f} s")
    return program


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Shapes:
    """The policy's step in a layout, and what its functions take."""

    graphdef: Any
    params: Any
    step: Any
    state: Any
    accumulated: Any
    version: Any

    @staticmethod
    def of(layout: Layout) -> _Shapes:
        def placed(tree: Any) -> Any:
            return _placed(tree, layout.placements(tree))

        graphdef, params = abstract_policy(QWEN3_8B)
        params = placed(params)
        step = make_train_step(graphdef, params, _STEP, layout=layout)
        return _Shapes(
            graphdef=graphdef,
            params=params,
            step=step,
            state=placed(jax.eval_shape(step.init, params)),
            accumulated=placed(jax.eval_shape(step.start, params)),
            version=jax.ShapeDtypeStruct((), np.int32, sharding=layout.sharding()),
        )


@pytest.fixture(scope="module")
def tree_step() -> dict[str, _Program]:
    """The step for a tree of 200,000 tokens in one row, of which each chip has a sixteenth."""
    layout = _layout(context=_CONTEXT, tensor=_TENSOR)
    packed = _tree(80_000, 16, 7_500, layout, row=_ROW)
    assert (len(packed.batches), packed.stats.tree_tokens) == (1, 200_000 - 16)  # no answer's last token is fed
    shapes, batch = _Shapes.of(layout), _in(layout, packed.batches[0])
    calls, state = (shapes.params, shapes.accumulated, batch, shapes.version), shapes.state
    return {
        "accumulate": _compiled("accumulate", shapes.step.accumulate, *calls, beside=state),
        "apply": _compiled("apply", shapes.step.apply, state, shapes.accumulated, beside=shapes.params),
        "cast": _compiled("cast", shapes.step.cast, state.params, beside=(shapes.params, state.opt_state)),
    }


@pytest.fixture(scope="module")
def trunk_step() -> dict[str, _Program]:
    """The step in two phases, for a trunk as long as a row and answers behind it, in eight rows."""
    layout = _layout(fsdp=8, tensor=8)
    packed = _tree(_TRUNK, 16, _TRUNK // 2, layout, row=_TRUNK)
    trunk, leaf = (_in(layout, batch) for batch in (packed.trunks[0].trunk, packed.trunks[0].leaves[0]))
    shapes = _Shapes.of(layout)
    params, accumulated, version, state = shapes.params, shapes.accumulated, shapes.version, shapes.state
    step = make_trunk_step(shapes.graphdef, params, _STEP, start=shapes.step.start, layout=layout)
    first = _compiled("trunk", step.trunk, params, trunk, beside=(state, accumulated))
    kv, d_kv = _placed(jax.eval_shape(step.trunk, params, trunk), first.compiled.output_shardings)
    leaves = (params, kv, (accumulated, d_kv), leaf, version)
    back = (params, accumulated, d_kv, trunk, version)
    return {
        "trunk": first,
        "accumulate_leaves": _compiled("accumulate_leaves", step.accumulate_leaves, *leaves, beside=(state, trunk)),
        "pull_back": _compiled("pull_back", step.pull_back, *back, beside=(state, kv)),
    }


@pytest.mark.parametrize("program", ["accumulate", "apply", "cast"])
def test_a_tree_of_two_hundred_thousand_tokens_fits_the_chips_of_a_v5e_64(
    tree_step: dict[str, _Program], program: str
) -> None:
    assert tree_step[program].peak < USABLE


@pytest.mark.parametrize("program", ["trunk", "accumulate_leaves", "pull_back"])
def test_a_trunk_whose_layers_inputs_exceed_the_budget_fits_in_two_phases(
    trunk_step: dict[str, _Program], program: str
) -> None:
    inputs = QWEN3_8B.num_layers * _TRUNK * QWEN3_8B.d_model * 2

    assert inputs > _STEP.activation_gib * GIB
    assert trunk_step[program].peak < USABLE


def test_chips_that_share_a_row_exchange_weights_and_keys_but_neither_its_hidden_states_nor_logits(
    tree_step: dict[str, _Program],
) -> None:
    vocab, width = QWEN3_8B.vocab_size // _TENSOR, QWEN3_8B.d_model
    columns = vocab * width  # a chunk of logits is no such part of them: it has 253 edges
    keys = _ROW * QWEN3_8B.num_kv_heads // _TENSOR * QWEN3_8B.head_size
    own = _ROW // _CONTEXT * width
    exchanged = tree_step["accumulate"].exchanged()
    with_vocabulary = [each for each in exchanged if vocab in each.shape or QWEN3_8B.vocab_size in each.shape]

    assert max(each.size for each in exchanged if each not in with_vocabulary) <= max(keys, own)
    assert {each.size for each in with_vocabulary} <= {columns, columns // _CONTEXT}


def test_gradients_of_the_vocabularys_weights_are_summed_over_chips_before_they_are_rounded(
    tree_step: dict[str, _Program],
) -> None:
    vocab = QWEN3_8B.vocab_size // _TENSOR
    sums = [
        each
        for each in tree_step["accumulate"].exchanged()
        if vocab in each.shape and each.operation in ("all-reduce", "reduce-scatter")
    ]

    assert [each.dtype for each in sums] == ["f32", "f32"]  # of the embedding and of the head


def test_chips_that_share_no_row_exchange_no_tokens_of_another_row(trunk_step: dict[str, _Program]) -> None:
    width = QWEN3_8B.d_model
    for name, program in trunk_step.items():
        assert max(each.size for each in program.exchanged()) <= _TRUNK * width, name
