"""Families: what a config.json says is read, written back the same, or refused by name."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from forgejax.errors import ConfigError
from forgejax.models import MoEConfig, PolicyConfig, RopeConfig, read_policy_config
from forgejax.models.families import FAMILIES, family_for, family_of
from tests.models.folders import SETTINGS

NAMES = sorted(SETTINGS)


@pytest.mark.parametrize("name", NAMES)
def test_what_a_family_writes_it_reads_back_the_same(name: str) -> None:
    family = family_of(SETTINGS[name])
    config = family.read(SETTINGS[name], PolicyConfig())

    assert family.model_type == name
    assert family.read(family.write(config), PolicyConfig()) == config
    assert family.holds(config)


def test_the_architecture_is_read_and_path_and_dtypes_stay(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SETTINGS["minimax_m2"]))
    base = PolicyConfig(path="here", param_dtype="bfloat16", compute_dtype="bfloat16", attention_bias=True)

    config = read_policy_config(tmp_path, base)

    assert config == PolicyConfig(
        path="here",
        vocab_size=48,
        num_layers=2,
        d_model=16,
        num_heads=4,
        num_kv_heads=2,
        head_dim=6,
        d_ff=20,
        rope=RopeConfig(theta=5e6, rotary_dim=4),
        norm_eps=1e-5,
        tied_embeddings=False,
        qk_norm="full",
        moe=MoEConfig(num_experts=3, experts_per_token=2, router="sigmoid", correction_bias=True),
        param_dtype="bfloat16",
        compute_dtype="bfloat16",
    )


def test_rope_of_new_and_of_old_spelling_is_the_same() -> None:
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    plain = {key: value for key, value in SETTINGS["llama"].items() if not key.startswith("rope")}
    old = family_of(plain).read({**plain, "rope_theta": 5e5, "rope_scaling": scaling}, PolicyConfig())
    new = family_of(plain).read({**plain, "rope_parameters": {**scaling, "rope_theta": 5e5}}, PolicyConfig())

    expected = RopeConfig(
        theta=5e5, scaling="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_positions=8192
    )
    assert old.rope == new.rope == expected


@pytest.mark.parametrize(
    "rope",
    [
        RopeConfig(theta=1e6, scaling="linear", factor=4.0),
        RopeConfig(scaling="llama3", factor=32.0, original_positions=8192),
        RopeConfig(scaling="yarn", factor=4.0, original_positions=32768, beta_fast=16.0, truncate=False),
        RopeConfig(scaling="yarn", factor=4.0, original_positions=32768, attention_factor=1.5),
    ],
)
def test_every_scaling_survives_a_config_json(rope: RopeConfig) -> None:
    config = dataclasses.replace(family_of(SETTINGS["qwen3"]).read(SETTINGS["qwen3"], PolicyConfig()), rope=rope)
    family = family_for(config)

    assert family.read(json.loads(json.dumps(family.write(config))), PolicyConfig()).rope == rope


def test_yarn_without_an_original_length_takes_the_models() -> None:
    given = {**SETTINGS["qwen2"], "rope_scaling": {"type": "yarn", "factor": 4.0}}
    assert family_of(given).read(given, PolicyConfig()).rope.original_positions == 64


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("llama", {"hidden_act": "gelu"}, "hidden_act is 'gelu'; supported: 'silu'"),
        ("llama", {"attention_bias": True}, "attention_bias is True; supported: False"),
        ("llama", {"attention_dropout": 0.1}, "attention_dropout is 0.1"),
        ("llama", {"mlp_bias": True}, "mlp_bias is True"),
        ("llama", {"quantization_config": {"quant_method": "fp8"}}, "quantization_config is of 'fp8'"),
        ("llama", {"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "rope_type is 'longrope'; supported"),
        ("llama", {"rope_scaling": {"type": "linear"}}, "'linear' without factor"),
        ("llama", {"rope_scaling": {"type": "yarn", "factor": 2.0, "mscale": 0.7}}, "rope key mscale is 0.7"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ("llama", {"num_hidden_layers": None}, "num_hidden_layers is None; expected a positive count"),
        ("llama", {"architectures": ["GemmaForCausalLM"]}, "GemmaForCausalLM"),
        ("qwen2", {"use_sliding_window": True}, "use_sliding_window is True; supported: False"),
        ("qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types are"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step is 2; supported: 1"),
        ("qwen3_moe", {"mlp_only_layers": [0]}, "mlp_only_layers is [0]"),
        ("minimax_m2", {"scoring_func": "softmax"}, "scoring_func is 'softmax'; supported: 'sigmoid'"),
        ("minimax_m2", {"shared_intermediate_size": 64}, "shared_intermediate_size is 64"),
    ],
)
def test_a_setting_that_would_compute_something_else_is_refused_by_name(
    tmp_path: Path, name: str, change: dict[str, Any], said: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**SETTINGS[name], **change}))
    with pytest.raises(ConfigError) as refused:
        read_policy_config(tmp_path, PolicyConfig())
    assert said in str(refused.value)
    assert str(tmp_path) in str(refused.value)


def test_all_refused_settings_are_named_at_once() -> None:
    given = {**SETTINGS["llama"], "mlp_bias": True, "attention_bias": True, "hidden_act": "relu"}
    with pytest.raises(ConfigError, match=r"hidden_act.*attention_bias.*mlp_bias"):
        family_of(given).read(given, PolicyConfig())


@pytest.mark.parametrize(
    ("config", "family"),
    [
        (PolicyConfig(), "llama"),
        (PolicyConfig(attention_bias=True), "qwen2"),
        (PolicyConfig(qk_norm="head"), "qwen3"),
        (PolicyConfig(qk_norm="head", moe=MoEConfig(num_experts=8)), "qwen3_moe"),
        (
            PolicyConfig(qk_norm="full", moe=MoEConfig(num_experts=8, router="sigmoid", correction_bias=True)),
            "minimax_m2",
        ),
    ],
)
def test_a_policy_from_scratch_becomes_the_plainest_family_that_can_hold_it(config: PolicyConfig, family: str) -> None:
    assert family_for(config).model_type == family


@pytest.mark.parametrize(
    "config",
    [
        PolicyConfig(attention_bias=True, qk_norm="head"),
        PolicyConfig(rope=RopeConfig(rotary_dim=16)),
        PolicyConfig(moe=MoEConfig(num_experts=8)),
        PolicyConfig(qk_norm="head", moe=MoEConfig(num_experts=8, scale=2.5)),
    ],
)
def test_a_policy_that_no_family_can_hold_is_refused(config: PolicyConfig) -> None:
    with pytest.raises(ConfigError, match="no family can hold this policy"):
        family_for(config)


def test_families_differ_in_every_name_they_are_found_by() -> None:
    for attribute in ("model_type", "architecture", "gguf"):
        assert len({getattr(family, attribute) for family in FAMILIES}) == len(FAMILIES)


def test_a_damaged_config_json_is_said_to_be_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json cannot be read"):
        read_policy_config(tmp_path, PolicyConfig())
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config\.json cannot be read"):
        read_policy_config(tmp_path, PolicyConfig())
    with pytest.raises(ConfigError, match="is no folder"):
        read_policy_config(tmp_path / "absent", PolicyConfig())
