"""A dry run through the real TPU compiler: every program of a small run on a v5e-16, its publication among them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from forgejax.models import PolicyConfig
from forgejax.run.config import load_shape
from forgejax.run.plan.chips import prepare_compiler
from forgejax.run.plan.dry_run import DryRun, plan_run
from forgejax.run.plan.show import to_text

_ROOT = Path(__file__).parents[2]
_MIB = 2**20
_SMALL = PolicyConfig(
    vocab_size=4096,
    num_layers=4,
    d_model=1024,
    num_heads=8,
    num_kv_heads=4,
    head_dim=128,
    d_ff=4096,
    tied_embeddings=False,
    param_dtype="bfloat16",
    compute_dtype="bfloat16",
)


@pytest.fixture(scope="module")
def found() -> DryRun:
    prepare_compiler()
    options = ["--mesh=v5e-16", "--mesh.fsdp=2", "--mesh.context=2", "--packing.row-length=4096", "--engine.slots=8"]
    tokenizer = f"--tokenizer={_ROOT / 'examples/quickstart/tokenizer'}"
    short = [tokenizer, "--engine.max-context=4096", "--engine.kv-pages=512", "--engine.prefill-buckets", "128"]
    config, _ = load_shape(_ROOT / "configs/qwen3_8b_v5e64.toml", [*options, *short])
    dry = plan_run(dataclasses.replace(config, policy=_SMALL), lambda line: None)
    print(f"\n{to_text(dry)}")
    return dry


def test_every_program_of_a_run_is_compiled_for_the_slice_and_the_run_fits(found: DryRun) -> None:
    assert found.fits, found.reason
    assert set(found.programs) == {"accumulate", "score", "apply", "cast", "decode", "prefill", "publish"}
    assert found.footprint is not None
    assert all(phase.compiled for phase in found.footprint.phases)


def test_weights_reach_every_host_by_gathers_alone_each_part_once(found: DryRun) -> None:
    publish = found.programs["publish"]
    weights = 2 * (4 * 1024 * (2 * 8 * 128 + 2 * 4 * 128 + 3 * 4096) + 2 * 4096 * 1024)  # all but the norms
    assert set(publish.exchanges.sent) == {"all-gather"}
    assert publish.exchanges.bytes == weights // 4 * 3 // 4  # a quarter of them, of which a chip has a quarter


def test_a_step_sums_its_gradients_and_an_engine_its_layers(found: DryRun) -> None:
    assert found.programs["accumulate"].exchanges.runs["all-gather"] > 4  # more than once a layer
    assert found.programs["decode"].exchanges.bytes > 0
    assert found.programs["apply"].exchanges.bytes < _MIB  # the norm of the gradients, and no weights
