"""A run's programs through the compiler of chips that are described: what each needs, and what chips exchange."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from forgejax.errors import MeshError
from forgejax.learner import PackedBatch, PackedStep, make_supervised_sample, make_train_step, pack
from forgejax.learner.packing.deal import batch_axes, deal_rows
from forgejax.ops.paged.attention import pick_paged_kernel
from forgejax.rollout.engine.programs import Programs
from forgejax.run.plan.exchanges import Exchanges, read_exchanges
from forgejax.run.plan.needs import Need
from forgejax.run.plan.publication import Move, list_moves
from forgejax.run.plan.residents import Site, join_hosts
from forgejax.sharding import EngineMesh, Layout

Told = Callable[[str], None]
Program = tuple[Callable[..., Any], tuple[Any, ...], Mapping[str, Any]]
_OUT_OF_MEMORY = "RESOURCE_EXHAUSTED"


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompiledProgram:
    """``need``: of ``peak_memory_in_bytes``, what its arguments are not; ``bound``: the sum of all it may hold."""

    need: Need
    bound: int
    exchanges: Exchanges
    seconds: float


def compile_programs(site: Site, told: Told) -> dict[str, CompiledProgram]:
    """Every program of a run on this site. ``told`` gets a line before each.

    Raises:
        MeshError: one of them alone takes more memory than a chip has.
    """
    programs = dict(_learner_programs(site))
    if site.engine is not None:
        programs |= _engine_programs(site)
    found = {}
    for name, program in programs.items():
        told(f"compiling {name}")
        found[name] = _compile(name, *program)
    if site.hosts > 1:
        moves = list_moves(site.abstract[1], site.learner, join_hosts(site.learner, _mesh_of(site.replica)))
        told(f"compiling the publication in {len(moves)} pieces")
        found["publish"] = _compile_publication(moves)
    return found


def lay_chains(site: Site) -> PackedStep:
    """One micro-batch as large as any: every row one sample, every token of it trained."""
    packing, shards = site.config.packing, site.learner.shards("rows")
    answer = np.ones(packing.row_length, np.int32)

    def sample(row: int) -> Any:
        return make_supervised_sample(str(row), np.full(1, row % 64 + 2, np.int32), np.append(answer[1:], row // 64))

    chains = [[sample(row) for row in range(packing.rows * shards)]]
    return pack(chains, dataclasses.replace(packing, trunks=False), row_shards=shards)


def _learner_programs(site: Site) -> Iterator[tuple[str, tuple[Any, ...]]]:
    layout = site.learner
    graphdef, abstract = site.abstract
    params = _place(layout, abstract)
    step = make_train_step(graphdef, params, site.step_config, layout=layout)
    state = _place(layout, jax.eval_shape(step.init, params))
    sums = _place(layout, jax.eval_shape(step.start, params))
    batch = _place_batch(layout, lay_chains(site).batches[0])
    version = jax.ShapeDtypeStruct((), np.int32, sharding=layout.sharding())
    yield "accumulate", (step.accumulate, params, sums, batch, version)
    yield "score", (step.score, params, batch)
    yield "apply", (step.apply, state, sums)
    if hasattr(step.cast, "trace"):
        yield "cast", (step.cast, state.params)


def _engine_programs(site: Site) -> dict[str, tuple[Any, ...]]:
    layout, config = site.engine, site.config.engine
    assert layout is not None
    programs = Programs(
        policy=site.config.policy,
        kernel=pick_paged_kernel(layout.platform, batch_invariant=config.batch_invariant),
        layout=layout,
        page_tokens=config.page_tokens,
        tokens_per_step=config.tokens_per_step,
    )
    params = _place(layout, site.abstract[1])

    def whole(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, np.int32, sharding=layout.sharding())

    pool, slots = jax.eval_shape(functools.partial(Programs.make, programs, config))
    pool = jax.tree.map(lambda x: _with(x, layout.sharding(None, None, None, "heads")), pool)
    slots = jax.tree.map(lambda x: _with(x, layout.sharding()), slots)
    pages, chunk = config.context_pages, config.prefill_buckets[-1]
    tables = (whole(config.slots, pages), None)
    return {
        "decode": (Programs.generate, programs, config.slots, params, (pool, slots), tables, whole()),
        "prefill": (Programs.extend, programs, params, pool, whole(chunk), whole(pages), (whole(), whole())),
    }


def _compile(name: str, function: Any, *args: Any) -> CompiledProgram:
    began = time.monotonic()
    try:
        compiled = function.trace(*args).lower(lowering_platforms=("tpu",)).compile()
    except jax.errors.JaxRuntimeError as error:
        if _OUT_OF_MEMORY not in str(error):
            raise
        raise MeshError(f"the compiler refuses {name}: {' '.join(str(error).split())[:300]}") from error
    memory = compiled.memory_analysis()
    beyond = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return CompiledProgram(
        need=Need(name=name, bytes=max(0, memory.peak_memory_in_bytes - memory.argument_size_in_bytes), compiled=True),
        bound=beyond + memory.temp_size_in_bytes + memory.generated_code_size_in_bytes,
        exchanges=read_exchanges(compiled.as_text()),
        seconds=time.monotonic() - began,
    )


def _compile_publication(moves: Mapping[Move, int]) -> CompiledProgram:
    """All pieces one after the other; the need is that of the largest, its result included."""
    parts = [
        (_compile("publish", jax.jit(_same, out_shardings=move.target), move.source()), n) for move, n in moves.items()
    ]
    return CompiledProgram(
        need=Need(name="publish", bytes=max(part.bound for part, _ in parts), compiled=True),
        bound=max(part.bound for part, _ in parts),
        exchanges=Exchanges.join([part.exchanges for part, times in parts for _ in range(times)]),
        seconds=sum(part.seconds for part, _ in parts),
    )


def _same(x: jax.Array) -> jax.Array:
    return x


def _mesh_of(replica: Layout) -> EngineMesh:
    return EngineMesh(tensor=replica.devices("tensor"), expert=replica.devices("expert"))


def _place(layout: Layout, tree: Any) -> Any:
    return jax.tree.map(_with, tree, layout.placements(tree))


def _with(x: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def _place_batch(layout: Layout, batch: PackedBatch) -> PackedBatch:
    if (shards := layout.shards("length")) > 1:
        batch = deal_rows(batch, shards)
    placed: PackedBatch = jax.tree.map(lambda x, names: _with(x, layout.sharding(*names)), batch, batch_axes(batch))
    return placed
