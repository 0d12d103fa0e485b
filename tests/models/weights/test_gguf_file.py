"""GGUF files give the policy that the same weights in a Hugging Face folder give."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from forgejax.errors import CheckpointError, ConfigError
from forgejax.models import PolicyConfig, RopeConfig, load_params, read_policy_config
from forgejax.models.rope import rotary_frequencies
from tests.models.folders import SETTINGS, C, D, F, H, K, L, Tensors, tensors_of, write_folder
from tests.models.reference import weights_of


def interleaved(matrix: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k with the two numbers that turn together side by side, as llama's GGUF files hold them."""
    return matrix.reshape(heads, 2, C // 2, D).swapaxes(1, 2).reshape(matrix.shape)


def write_llama(path: Path, tensors: Tensors, extra: Tensors | None = None, **counts: int) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(L)
    writer.add_context_length(64)
    writer.add_embedding_length(D)
    writer.add_feed_forward_length(F)
    writer.add_head_count(counts.get("heads", H))
    writer.add_head_count_kv(K)
    writer.add_rope_dimension_count(C)
    writer.add_rope_freq_base(500_000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_token_list(["<s>", "a"])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, L)
    for name, value in tensors.items():
        heads = H if "q_proj" in name else K if "k_proj" in name else 0
        writer.add_tensor(
            names.get_name(name, try_suffixes=(".weight",)), interleaved(value, heads) if heads else value
        )
    for name, value in (extra or {}).items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def same(a: Any, b: Any) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(weights_of(a).values(), weights_of(b).values(), strict=True))


def config_of(path: Path) -> PolicyConfig:
    return read_policy_config(path, PolicyConfig(path=str(path)))


@pytest.mark.parametrize("tied", [True, False])
def test_a_gguf_file_gives_what_the_folder_gives(tmp_path: Path, tied: bool) -> None:
    settings: dict[str, Any] = {**SETTINGS["llama"], "tie_word_embeddings": tied}
    tensors = tensors_of("llama", settings)
    file = config_of(write_llama(tmp_path / "model.gguf", tensors))
    folder = config_of(write_folder(tmp_path / "folder", settings, tensors))

    assert (file.rope, file.head_dim, file.norm_eps) == (folder.rope, folder.head_dim, folder.norm_eps)
    assert file.tied_embeddings == tied
    assert same(load_params(file), load_params(folder))


def test_llama_3s_frequency_divisors_are_recognised(tmp_path: Path) -> None:
    rope = RopeConfig(theta=500_000.0, scaling="llama3", factor=8.0, original_positions=8192)
    divisors = rotary_frequencies(RopeConfig(theta=500_000.0), C)[0] / rotary_frequencies(rope, C)[0]
    tensors = tensors_of("llama", SETTINGS["llama"])

    known = write_llama(tmp_path / "a.gguf", tensors, {"rope_freqs.weight": divisors.astype(np.float32)})
    strange = write_llama(tmp_path / "b.gguf", tensors, {"rope_freqs.weight": np.asarray([3, 1, 2], np.float32)})

    assert config_of(known).rope == rope
    load_params(config_of(known))
    with pytest.raises(ConfigError, match=r"rope_freqs\.weight"):
        config_of(strange)


def test_what_is_missing_or_extra_in_a_gguf_file_is_named(tmp_path: Path) -> None:
    tensors = tensors_of("llama", SETTINGS["llama"])
    del tensors["model.layers.1.mlp.up_proj.weight"]
    config = config_of(write_llama(tmp_path / "model.gguf", tensors, {"odd.weight": np.zeros(2, np.float32)}))
    with pytest.raises(CheckpointError, match=r"1 missing: model\.layers\.1\.mlp\.up_proj\.weight; 1 not.*odd\.weight"):
        load_params(config)


def test_a_file_that_is_no_gguf_or_cut_short_or_of_an_unknown_architecture_is_refused(tmp_path: Path) -> None:
    path = write_llama(tmp_path / "model.gguf", tensors_of("llama", SETTINGS["llama"]))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) - 4096])
    with pytest.raises(ConfigError, match="cannot be read as a GGUF file"):
        config_of(path)
    path.write_bytes(b"nonsense" * 100)
    with pytest.raises(ConfigError, match="cannot be read as a GGUF file"):
        config_of(path)
    path.write_bytes(whole.replace(b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0gptxx", 1))
    with pytest.raises(ConfigError, match="architecture 'gptxx'; supported: llama, qwen2"):
        config_of(path)
    with pytest.raises(ConfigError, match="cannot be read as a GGUF file"):
        config_of(tmp_path / "absent.gguf")
