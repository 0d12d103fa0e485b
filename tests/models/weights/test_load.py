"""Weights in and out: bit by bit the same, straight to their shards, and a clear word for what is damaged."""

from __future__ import annotations

import dataclasses
import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from numpy.typing import DTypeLike
from safetensors.numpy import load_file, save_file

from forgejax.errors import CheckpointError, ConfigError
from forgejax.models import PolicyConfig, check_weights, export_policy, init_params, load_params, read_policy_config
from forgejax.sharding import Layout, MeshConfig, build_mesh, resolve
from tests.models.folders import SETTINGS, C, D, F, H, K, L, Tensors, V, tensors_of, write_folder
from tests.models.reference import weights_of

NAMES = sorted(SETTINGS)


def config_of(folder: Path, **changes: Any) -> PolicyConfig:
    return read_policy_config(folder, PolicyConfig(path=str(folder), **changes))


def stored(folder: Path) -> Tensors:
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


def same(a: Any, b: Any) -> bool:
    """Whether two sets of weights are bit by bit the same (every dtype here is exact in float64)."""
    ours, theirs = weights_of(a), weights_of(b)
    return ours.keys() == theirs.keys() and all(np.array_equal(ours[name], theirs[name]) for name in ours)


def layout_of(**sizes: int) -> Layout:
    return Layout(mesh=build_mesh(resolve(MeshConfig(name="cpu-8", **sizes))))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_in_out_in_is_bit_exact(tmp_path: Path, name: str, dtype: DTypeLike) -> None:
    tensors = tensors_of(name, SETTINGS[name], dtype)
    given = write_folder(tmp_path / "in", SETTINGS[name], tensors, files=3)
    config = config_of(given, param_dtype=np.dtype(dtype).name)
    params = load_params(config)

    export_policy(config, params, tmp_path / "out", like=given)

    out = stored(tmp_path / "out")
    assert out.keys() == tensors.keys()
    for key, value in tensors.items():
        assert out[key].dtype == np.dtype(dtype)
        np.testing.assert_array_equal(out[key], value, err_msg=key)
    again = load_params(config_of(tmp_path / "out", param_dtype=np.dtype(dtype).name))
    assert same(again, params)
    assert dataclasses.replace(config_of(tmp_path / "out"), path="") == dataclasses.replace(config_of(given), path="")


def test_a_stored_matrix_lands_where_the_policy_multiplies_with_it(tmp_path: Path) -> None:
    tensors = tensors_of("qwen2", SETTINGS["qwen2"])
    ours = weights_of(load_params(config_of(write_folder(tmp_path / "in", SETTINGS["qwen2"], tensors))))
    x = np.arange(D) / D

    for layer in range(L):
        prefix = f"model.layers.{layer}.self_attn"
        q = tensors[f"{prefix}.q_proj.weight"] @ x
        np.testing.assert_allclose(np.einsum("D,DHC->HC", x, ours["blocks.q"][layer]), q.reshape(H, C), rtol=1e-6)
        bias = tensors[f"{prefix}.k_proj.bias"]
        np.testing.assert_array_equal(ours["blocks.k_bias"][layer], bias.reshape(K, C))
        heads = np.arange(H * C) / C
        o = tensors[f"{prefix}.o_proj.weight"] @ heads
        np.testing.assert_allclose(np.einsum("HC,HCD->D", heads.reshape(H, C), ours["blocks.o"][layer]), o, rtol=1e-6)
        down = tensors[f"model.layers.{layer}.mlp.down_proj.weight"]
        np.testing.assert_array_equal(ours["blocks.down"][layer], down.T)
    np.testing.assert_array_equal(ours["head"], tensors["lm_head.weight"].T)


@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_every_mesh_gets_the_same_weights(tmp_path: Path, name: str) -> None:
    given = write_folder(tmp_path / "in", SETTINGS[name], tensors_of(name, SETTINGS[name]), files=2)
    config = config_of(given)
    whole = load_params(config)

    spread = load_params(config, layout_of(fsdp=2, tensor=4))

    assert same(spread, whole)
    q = spread["blocks"]["q"].get_value()
    assert q.sharding.shard_shape(q.shape) == (L, D // 2, H // 4, C)
    k = spread["blocks"]["k"].get_value()  # 2 heads on 4 shards: each keeps both
    assert k.sharding.shard_shape(k.shape) == (L, D // 2, K, C)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_weights_take_the_param_dtype_whatever_is_stored(tmp_path: Path, dtype: str) -> None:
    tensors = tensors_of("llama", SETTINGS["llama"], np.float16)
    params = load_params(config_of(write_folder(tmp_path / "in", SETTINGS["llama"], tensors), param_dtype=dtype))

    embedding = np.asarray(params["embedding"].get_value())
    assert embedding.dtype == np.dtype(dtype)
    np.testing.assert_array_equal(embedding, tensors["model.embed_tokens.weight"].astype(dtype))


@pytest.mark.parametrize("present", [True, False])
def test_tied_embeddings_come_with_or_without_a_head(tmp_path: Path, present: bool) -> None:
    settings = {**SETTINGS["llama"], "tie_word_embeddings": True}
    tensors = tensors_of("llama", settings)
    if present:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    config = config_of(write_folder(tmp_path / "in", settings, tensors))

    export_policy(config, load_params(config), tmp_path / "out", like=Path(config.path))

    assert "lm_head.weight" not in stored(tmp_path / "out")


def test_the_host_holds_one_shard_at_a_time(tmp_path: Path) -> None:
    settings = {**SETTINGS["llama"], "vocab_size": 64, "num_hidden_layers": 4, "hidden_size": 256}
    settings |= {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 64, "intermediate_size": 1024}
    write_folder(tmp_path / "in", settings, {})
    config = config_of(tmp_path / "in")
    (tmp_path / "in" / "model.safetensors").unlink()
    export_policy(config, init_params(config), tmp_path / "out", like=tmp_path / "in")
    config = config_of(tmp_path / "out")
    layout = layout_of(fsdp=2, tensor=4)
    load_params(config, layout)  # what the first use imports and traces stays

    tracemalloc.start()
    params = load_params(config, layout)
    kept, peak = tracemalloc.get_traced_memory()  # kept: host memory that jax took over as a device's
    tracemalloc.stop()

    shards = [shard.data.nbytes for leaf in jax.tree.leaves(params) for shard in leaf.addressable_shards]
    assert max(shards) == 4 * 256 * 1024 * 4 // 8
    objects = 300_000  # Python's own
    assert peak - kept < 1.3 * max(shards) + objects
    assert kept < sum(shards) + objects


@pytest.mark.parametrize("read", [load_params, check_weights])
def test_missing_extra_and_misshapen_tensors_are_named_in_one_error(
    tmp_path: Path, read: Callable[[PolicyConfig], object]
) -> None:
    tensors = tensors_of("llama", SETTINGS["llama"])
    del tensors["model.norm.weight"], tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.layers.0.self_attn.q_proj.weight"] = np.zeros((H * C, D + 1), np.float32)
    tensors |= {f"vision.{number}": np.zeros(1, np.float32) for number in range(10)}
    config = config_of(write_folder(tmp_path / "in", SETTINGS["llama"], tensors))

    with pytest.raises(CheckpointError) as refused:
        read(config)

    said = str(refused.value)
    assert "2 missing: model.layers.1.mlp.up_proj.weight, model.norm.weight;" in said
    assert "10 not of this model: vision.0," in said
    assert "vision.7, ..." in said
    assert "vision.8" not in said
    assert "1 misshapen: model.layers.0.self_attn.q_proj.weight [24, 17] instead of [24, 16]" in said


@pytest.mark.parametrize("read", [load_params, check_weights])
def test_a_file_cut_short_is_said_to_be_one(tmp_path: Path, read: Callable[[PolicyConfig], object]) -> None:
    config = config_of(write_folder(tmp_path / "in", SETTINGS["llama"], tensors_of("llama", SETTINGS["llama"])))
    file = tmp_path / "in" / "model.safetensors"
    whole = file.read_bytes()
    for size in (0, 5, 100, len(whole) - 1):
        file.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"model\.safetensors") as refused:
            read(config)
        assert "copy the file again" in str(refused.value)
    file.write_bytes(whole[:8] + b"{" * (len(whole) - 8))
    with pytest.raises(CheckpointError, match="header cannot be read"):
        read(config)


def test_an_index_that_names_absent_files_and_a_folder_without_weights_are_refused(tmp_path: Path) -> None:
    given = write_folder(tmp_path / "in", SETTINGS["llama"], tensors_of("llama", SETTINGS["llama"]), files=3)
    config = config_of(given)
    (given / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"names 3 files; absent are 1: model-00002-of-00003\.safetensors"):
        load_params(config)
    (given / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"index\.json cannot be read"):
        load_params(config)
    (given / "model.safetensors.index.json").unlink()
    with pytest.raises(CheckpointError, match="holds no weights"):
        load_params(config)


def test_quantized_tensors_are_refused_by_dtype(tmp_path: Path) -> None:
    tensors = tensors_of("llama", SETTINGS["llama"])
    tensors["model.embed_tokens.weight"] = np.zeros((V, D), np.int8)
    config = config_of(write_folder(tmp_path / "in", SETTINGS["llama"], tensors))
    with pytest.raises(CheckpointError, match=r"model\.embed_tokens\.weight is of dtype I8; supported: BF16"):
        load_params(config)


def test_an_export_keeps_what_else_the_folder_says_and_its_tokenizer(tmp_path: Path) -> None:
    settings = {**SETTINGS["llama"], "eos_token_id": [7, 8], "torch_dtype": "bfloat16", "rope_scaling": None}
    given = write_folder(tmp_path / "in", settings, tensors_of("llama", settings))
    (given / "tokenizer.json").write_text("{}")
    (given / "chat_template.jinja").write_text("hello")
    config = config_of(given)

    export_policy(config, load_params(config), tmp_path / "out", given, extra={"eos_token_id": 1, "pad_token_id": 3})

    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["eos_token_id"] == [7, 8]
    assert written["pad_token_id"] == 3
    assert written["max_position_embeddings"] == 64
    assert written["dtype"] == "float32"
    assert "torch_dtype" not in written
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "hello"
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    assert sorted(each.name for each in tmp_path.iterdir()) == ["in", "out"]


def test_an_export_is_split_into_files_that_an_index_describes(tmp_path: Path) -> None:
    config = PolicyConfig(vocab_size=V, num_layers=L, d_model=D, num_heads=H, num_kv_heads=K, d_ff=F)
    params = init_params(config)

    export_policy(config, params, tmp_path / "out", like=None, shard_bytes=2048)

    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    for file in files:
        tensors = load_file(tmp_path / "out" / file)
        assert all(index["weight_map"][name] == file for name in tensors)
        assert len(tensors) == 1 or sum(value.nbytes for value in tensors.values()) <= 2048
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in stored(tmp_path / "out").values())
    again = load_params(config_of(tmp_path / "out"))
    assert same(again, params)


def test_an_export_replaces_nothing_and_a_failed_one_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = PolicyConfig(vocab_size=V, num_layers=L, d_model=D, num_heads=H, num_kv_heads=K, d_ff=F)
    params = init_params(config)
    (tmp_path / "taken").mkdir()
    with pytest.raises(ConfigError, match="exists already"):
        export_policy(config, params, tmp_path / "taken", like=None)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("forgejax.models.weights.export.write_safetensors", full)
    with pytest.raises(CheckpointError, match="No space left"):
        export_policy(config, params, tmp_path / "out", like=None)
    assert [each.name for each in tmp_path.iterdir()] == ["taken"]


def test_a_policy_of_another_family_than_the_folder_is_not_exported_as_it(tmp_path: Path) -> None:
    given = write_folder(tmp_path / "in", SETTINGS["llama"], {"a": np.zeros(1, np.float32)})
    config = PolicyConfig(vocab_size=V, num_layers=L, d_model=D, num_heads=H, num_kv_heads=K, d_ff=F, qk_norm="head")
    with pytest.raises(ConfigError, match="is no llama any more"):
        export_policy(config, init_params(config), tmp_path / "out", like=given)


def test_a_stray_file_beside_the_weights_is_not_read(tmp_path: Path) -> None:
    given = write_folder(tmp_path / "in", SETTINGS["llama"], tensors_of("llama", SETTINGS["llama"]), files=2)
    save_file({"stray": np.zeros(1, np.float32)}, given / "adapter.safetensors")
    load_params(config_of(given))
