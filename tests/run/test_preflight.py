"""What cannot be run is refused before it costs anything, with what to set."""

import re
from pathlib import Path

import pytest

from forgejax.errors import ConfigError, MeshError
from forgejax.ops import Kernel
from forgejax.ops.tree.cpu import CpuKernel
from forgejax.ops.tree.gpu import GpuKernel
from forgejax.ops.tree.tpu import TpuKernel
from forgejax.run.config import load_config
from forgejax.run.preflight import check_kernel, check_mesh, load_chat
from tests.run.tiny_run import QUICKSTART, tiny_config


@pytest.mark.parametrize(
    ("kernel", "overrides", "words"),
    [
        (TpuKernel(), (), "blocks of 32 tokens; set packing.block_size to a multiple of 128"),
        (GpuKernel(), ("--packing.block-size=8",), "blocks of 8 tokens; for float32 heads of 8 set packing.block_size"),
        (GpuKernel(), ("--policy.compute-dtype=float64",), "got float64; set policy.compute_dtype"),
    ],
)
def test_what_a_kernel_cannot_work_with_is_refused_with_what_to_set(
    tmp_path: Path, kernel: Kernel, overrides: tuple[str, ...], words: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)):
        check_kernel(kernel, tiny_config(tmp_path, *overrides))


def test_the_kernels_take_blocks_of_the_sizes_they_name(tmp_path: Path) -> None:
    check_kernel(TpuKernel(), tiny_config(tmp_path, "--packing.block-size=128"))
    check_kernel(GpuKernel(), tiny_config(tmp_path, "--packing.block-size=16"))
    check_kernel(CpuKernel(), tiny_config(tmp_path, "--policy.compute-dtype=float64"))


def test_a_mesh_this_machine_cannot_give_is_refused_before_anything_is_made() -> None:
    with pytest.raises(MeshError, match="mesh v5e-64 needs 64 v5e chips; this machine has no TPU and no GPU"):
        check_mesh(load_config(QUICKSTART, ["--mesh=v5e-64"]))


def test_a_policy_with_fewer_tokens_than_its_tokenizer_is_refused(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    size = load_chat(config).vocab_size

    assert size <= config.policy.vocab_size
    with pytest.raises(ConfigError, match=rf"has {size} tokens and policy\.vocab_size is 64; raise it to at least"):
        load_chat(tiny_config(tmp_path, "--policy.vocab-size=64"))
