"""GGUF files, through the ``gguf`` library: metadata as a config.json, tensors dequantised by row."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from forgejax.errors import CheckpointError, ConfigError
from forgejax.models.families import FAMILIES, Family
from forgejax.models.families.base import Tensor
from forgejax.models.rope import RopeConfig, rotary_frequencies

_ROPE_FACTORS = "rope_freqs.weight"
_LLAMA3_POSITIONS = 8192  # the original context of every Llama 3


def gguf_metadata(path: Path) -> dict[str, Any]:
    """Every field of a GGUF file, under its GGUF name. Raises ConfigError."""
    return {name: field.contents() for name, field in _open(path).fields.items()}


def gguf_settings(path: Path) -> dict[str, Any]:
    """What the config.json of a GGUF file would say. Raises ConfigError."""
    reader = _open(path)
    scalars = (field for field in reader.fields.values() if field.types[0] is not gguf.GGUFValueType.ARRAY)
    metadata = {field.name: field.contents() for field in scalars}
    architecture = metadata.get("general.architecture")
    family = next((each for each in FAMILIES if each.gguf == architecture), None)
    if family is None:
        known = ", ".join(each.gguf for each in FAMILIES)
        raise ConfigError(f"{path} is of architecture {architecture!r}; supported: {known}")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    try:
        return _settings(family, metadata, tensors)
    except (TypeError, ConfigError) as error:  # TypeError: a count that is not there
        raise ConfigError(f"{path} cannot be loaded: {error}") from error


def _settings(family: Family, metadata: dict[str, Any], tensors: dict[str, Any]) -> dict[str, Any]:
    def key(name: str, default: Any = None) -> Any:
        return metadata.get(f"{family.gguf}.{name}", default)

    if "token_embd.weight" not in tensors:
        raise ConfigError("it holds no token_embd.weight")
    num_heads = key("attention.head_count")
    head_dim = key("attention.key_length") or key("rope.dimension_count") or key("embedding_length") // num_heads
    settings: dict[str, Any] = {
        "model_type": family.model_type,
        "architectures": [family.architecture],
        "vocab_size": int(tensors["token_embd.weight"].shape[1]),
        "num_hidden_layers": key("block_count"),
        "hidden_size": key("embedding_length"),
        "num_attention_heads": num_heads,
        "num_key_value_heads": key("attention.head_count_kv"),
        "head_dim": head_dim,
        "intermediate_size": key("feed_forward_length") or key("expert_feed_forward_length"),
        "rms_norm_eps": _short(key("attention.layer_norm_rms_epsilon", 1e-6)),
        "tie_word_embeddings": "output.weight" not in tensors,
        "max_position_embeddings": key("context_length"),
        "rope_parameters": _rope(key, tensors, head_dim),
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": metadata.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": metadata.get("tokenizer.ggml.padding_token_id"),
    }
    if family.partial_rope:
        settings["partial_rotary_factor"] = key("rope.dimension_count", head_dim) / head_dim
    if family.experts is not None:
        settings[family.experts.count] = key("expert_count")
        settings["num_experts_per_tok"] = key("expert_used_count")
        settings[family.experts.d_ff or "intermediate_size"] = key("expert_feed_forward_length")
        if family.experts.normalize:
            settings[family.experts.normalize] = True  # what GGUF's readers compute for these architectures
    return settings


def _rope(key: Callable[..., Any], tensors: dict[str, Any], head_dim: int) -> dict[str, Any]:
    kind = key("rope.scaling.type", "none")
    plain: dict[str, Any] = {"rope_type": "default", "rope_theta": _short(key("rope.freq_base", 10_000.0))}
    if _ROPE_FACTORS in tensors:
        return {**plain, **_llama3(np.asarray(tensors[_ROPE_FACTORS].data), plain["rope_theta"], head_dim)}
    if kind == "none":
        return plain
    return {
        **plain,
        "rope_type": kind,
        "factor": key("rope.scaling.factor"),
        "original_max_position_embeddings": key("rope.scaling.original_context_length"),
    }


def _llama3(divisors: NDArray[np.float32], theta: float, head_dim: int) -> dict[str, Any]:
    """The settings of Llama 3's scaling, of which a GGUF file keeps the divisor of each frequency alone."""
    rope = RopeConfig(theta=theta, scaling="llama3", factor=float(divisors.max()), original_positions=_LLAMA3_POSITIONS)
    scaled, _ = rotary_frequencies(rope, head_dim)
    plain, _ = rotary_frequencies(RopeConfig(theta=theta), head_dim)
    if divisors.shape != plain.shape or not np.allclose(plain / scaled, divisors, rtol=1e-4):
        raise ConfigError(
            f"its rotary frequencies are scaled by {_ROPE_FACTORS} in another way than Llama 3's; "
            "give a Hugging Face folder"
        )
    return {
        "rope_type": "llama3",
        "factor": rope.factor,
        "low_freq_factor": rope.low_freq_factor,
        "high_freq_factor": rope.high_freq_factor,
        "original_max_position_embeddings": rope.original_positions,
    }


class GgufSource:
    """The tensors of a GGUF file under their Hugging Face names, dequantised to FP32 as they are read."""

    def __init__(self, path: Path, family: Family, num_layers: int):
        reader = _open(path)
        self._path = path
        stored = {tensor.name: tensor for tensor in reader.tensors if tensor.name != _ROPE_FACTORS}
        self._found = _by_our_names(stored, family, num_layers)
        self._heads = _interleaved_heads(reader, family)
        covered = {each.stored.name for each in self._found.values()}
        self.shapes: Mapping[str, tuple[int, ...]] = {name: each.shape for name, each in self._found.items()} | {
            name: _shape(stored[name]) for name in stored.keys() - covered
        }

    def rows(self, name: str, start: int, stop: int) -> NDArray[Any]:
        found = self._found[name]
        stored = found.stored
        data = stored.data if found.expert is None else stored.data[found.expert]
        heads = self._heads.get(found.tensor.ours, 0)
        chosen = data[_half_split(heads, data.shape[0])[start:stop]] if heads else data[start:stop]
        try:
            return np.asarray(gguf.quants.dequantize(chosen, stored.tensor_type))
        except NotImplementedError as error:
            raise CheckpointError(
                f"{self._path}: tensor {stored.name} is quantized as {stored.tensor_type.name}, which the gguf library "
                "cannot dequantise; give another quantization of the model"
            ) from error

    def release(self) -> None:
        pass  # the library keeps its own map; its pages are the system's to take back


@dataclass(frozen=True, kw_only=True)
class _Found:
    """A tensor of the Hugging Face layout inside a file: all of a stored one, or one expert's part of it."""

    stored: gguf.ReaderTensor
    expert: int | None
    tensor: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return _shape(self.stored)[0 if self.expert is None else 1 :]


def _by_our_names(stored: dict[str, gguf.ReaderTensor], family: Family, num_layers: int) -> dict[str, _Found]:
    architecture = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == family.gguf)
    names = gguf.get_tensor_name_map(architecture, num_layers)
    found = {}
    for tensor in family.tensors:
        for layer in range(num_layers) if "{layer}" in tensor.name else (0,):
            here = stored.get(_gguf_name(names, tensor.name.replace("{layer}", str(layer))))
            if here is None:
                continue
            for expert in range(len(here.data)) if "{expert}" in tensor.name else (None,):
                found[tensor.name.format(layer=layer, expert=expert)] = _Found(
                    stored=here, expert=expert, tensor=tensor
                )
    return found


def _gguf_name(names: gguf.TensorNameMap, name: str) -> str:
    """The library knows experts as one stacked tensor, and the bias of a router as that of a submodule."""
    plain = name.replace(".experts.{expert}.", ".experts.").replace(
        "e_score_correction_bias", "e_score_correction.bias"
    )
    return names.get_name(plain, try_suffixes=(".weight", ".bias")) or ""


def _interleaved_heads(reader: gguf.GGUFReader, family: Family) -> dict[str, int]:
    """How many heads the rows of q and of k hold, where the family's files permute them."""
    if not family.interleaved_gguf:
        return {}
    queries = reader.get_field(f"{family.gguf}.attention.head_count")
    keys = reader.get_field(f"{family.gguf}.attention.head_count_kv") or queries
    return {ours: int(field.contents()) for ours, field in (("blocks.q", queries), ("blocks.k", keys)) if field}


def _shape(stored: gguf.ReaderTensor) -> tuple[int, ...]:
    return tuple(int(size) for size in reversed(stored.shape))


def _half_split(heads: int, rows: int) -> NDArray[np.int64]:
    """For each row of q or k in half-split order, its place in a file that holds rotary pairs side by side."""
    half = rows // heads // 2
    order = np.arange(rows).reshape(heads, half, 2)
    return order.swapaxes(1, 2).reshape(-1)


def _open(path: Path) -> gguf.GGUFReader:
    try:
        return gguf.GGUFReader(path)
    except (OSError, ValueError, IndexError, KeyError) as error:
        raise ConfigError(f"{path} cannot be read as a GGUF file: {error}; copy the file again") from error


def _short(value: float) -> float:
    """GGUF keeps figures in FP32: 9.999999747378752e-06 was written as 1e-05."""
    return float(str(np.float32(value)))
