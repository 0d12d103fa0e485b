"""Small folders of random weights in the layouts of the hub, written without any code of ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray
from safetensors.numpy import save_file

Tensors = dict[str, NDArray[Any]]

V, L, D, H, K, C, F, X = 48, 2, 16, 4, 2, 6, 20, 3
_COMMON = {
    "vocab_size": V,
    "num_hidden_layers": L,
    "hidden_size": D,
    "num_attention_heads": H,
    "num_key_value_heads": K,
    "head_dim": C,
    "intermediate_size": F,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
_OLD_ROPE = {"rope_theta": 500_000.0, "rope_scaling": None}
_QWEN = {"use_sliding_window": False, "attention_dropout": 0.0}
SETTINGS: dict[str, dict[str, Any]] = {
    "llama": {**_COMMON, **_OLD_ROPE, "architectures": ["LlamaForCausalLM"], "attention_bias": False},
    "qwen2": {**_COMMON, **_OLD_ROPE, **_QWEN, "architectures": ["Qwen2ForCausalLM"], "sliding_window": 4096},
    "qwen3": {**_COMMON, **_OLD_ROPE, **_QWEN, "architectures": ["Qwen3ForCausalLM"]},
    "qwen3_moe": {
        **_COMMON,
        **_OLD_ROPE,
        **_QWEN,
        "architectures": ["Qwen3MoeForCausalLM"],
        "num_experts": X,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 12,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
    "minimax_m2": {
        **_COMMON,
        "architectures": ["MiniMaxM2ForCausalLM"],
        "rope_theta": 5_000_000,
        "rotary_dim": 4,
        "num_local_experts": X,
        "num_experts_per_tok": 2,
        "scoring_func": "sigmoid",
        "use_routing_bias": True,
    },
}


def tensors_of(family: str, settings: dict[str, Any], dtype: DTypeLike = np.float32) -> Tensors:
    """Random tensors under the names and in the shapes of the hub."""
    rng = np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,)}
    if not settings["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (V, D)
    for layer in range(settings["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        shapes |= {f"{prefix}.{name}.weight": (D,) for name in ("input_layernorm", "post_attention_layernorm")}
        shapes |= {f"{prefix}.self_attn.{n}_proj.weight": (heads * C, D) for n, heads in (("q", H), ("k", K), ("v", K))}
        shapes[f"{prefix}.self_attn.o_proj.weight"] = (D, H * C)
        if family == "qwen2":
            shapes |= {f"{prefix}.self_attn.{n}_proj.bias": (heads * C,) for n, heads in (("q", H), ("k", K), ("v", K))}
        if family in ("qwen3", "qwen3_moe"):
            shapes |= {f"{prefix}.self_attn.{n}_norm.weight": (C,) for n in "qk"}
        if family == "minimax_m2":
            shapes |= {f"{prefix}.self_attn.{n}_norm.weight": (heads * C,) for n, heads in (("q", H), ("k", K))}
        shapes |= _mlp(family, prefix, settings)
    return {name: rng.normal(size=shape).astype(np.float32).astype(dtype) for name, shape in shapes.items()}


def _mlp(family: str, prefix: str, settings: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    if family == "qwen3_moe":
        block, names, width = f"{prefix}.mlp", ("gate_proj", "up_proj", "down_proj"), settings["moe_intermediate_size"]
    elif family == "minimax_m2":
        block, names, width = f"{prefix}.block_sparse_moe", ("w1", "w3", "w2"), F
    else:
        into = {f"{prefix}.mlp.{name}_proj.weight": (F, D) for name in ("gate", "up")}
        return {**into, f"{prefix}.mlp.down_proj.weight": (D, F)}
    shapes: dict[str, tuple[int, ...]] = {f"{block}.gate.weight": (X, D)}
    if family == "minimax_m2":
        shapes[f"{block}.e_score_correction_bias"] = (X,)
    for expert in range(X):
        shapes |= {f"{block}.experts.{expert}.{name}.weight": (width, D) for name in names[:2]}
        shapes[f"{block}.experts.{expert}.{names[2]}.weight"] = (D, width)
    return shapes


def write_folder(folder: Path, settings: dict[str, Any], tensors: Tensors, files: int = 1) -> Path:
    """A folder with these tensors in one file, or dealt over several with an index."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(settings))
    if files == 1:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return folder
    names = [f"model-{number:05d}-of-{files:05d}.safetensors" for number in range(1, files + 1)]
    weight_map = {name: names[number % files] for number, name in enumerate(tensors)}
    for file in names:
        save_file({name: value for name, value in tensors.items() if weight_map[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder
