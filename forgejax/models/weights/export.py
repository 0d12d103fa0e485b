"""A policy as a Hugging Face folder that other trainers and servers load."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from numpy.typing import NDArray

from forgejax.errors import CheckpointError, ConfigError
from forgejax.models.families import Family, Tensor, family_for, family_of
from forgejax.models.init import Params
from forgejax.models.policy import PolicyConfig
from forgejax.models.weights.folder import read_settings
from forgejax.models.weights.load import stored_shape, stored_tensors
from forgejax.models.weights.safetensors_file import Planned, index_of, plan_shards, write_safetensors
from forgejax.models.weights.stored_form import parse_stored_form

_SHARD_BYTES = 5 * 10**9
_COPIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
    "LICENSE",
)


def export_policy(
    config: PolicyConfig,
    params: Params,
    out: Path,
    like: Path | None,
    *,
    tokenizer: Path | None = None,
    extra: Mapping[str, Any] | None = None,
    shard_bytes: int = _SHARD_BYTES,
) -> None:
    """Writes ``config.json`` and safetensors of at most ``shard_bytes``; ``out`` appears when it is complete.

    ``like`` is the folder (or GGUF file) the policy came from: its family is kept, with what its config.json says
    beyond the architecture, and the tokenizer files are copied from ``tokenizer`` or, without it, from there. Without
    ``like``, or where it holds a tokenizer alone, the plainest family that can hold the policy is chosen. ``extra`` are
    further keys for config.json, where ``like`` does not say them. Tensors keep the dtype of ``params`` (jax
    or numpy arrays); of weights on devices, the host holds one layer of one weight at a time.

    Raises:
        ConfigError: ``out`` exists, or no family can hold the policy.
        CheckpointError: the weights lie partly on another host, or ``out`` cannot be written.
    """
    if out.exists():
        raise ConfigError(f"{out} exists already; choose another folder, or remove it first")
    settings = read_settings(like) if like is not None and _has_settings(like) else {}
    family = family_of(settings) if settings else family_for(config)
    if not family.holds(config):
        raise ConfigError(f"this policy is no {family.model_type} any more, unlike {like}: {config}")
    weights = dict(nnx.to_flat_state(params))
    arrays = [leaf.get_value() for leaf in weights.values()]
    if not all(array.is_fully_addressable for array in arrays if isinstance(array, jax.Array)):
        raise CheckpointError("the weights lie partly on other hosts; export from a run on one host")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
        try:
            _write_weights(partial, family, weights, shard_bytes)
            written = {**(extra or {}), **settings, **family.write(config), "dtype": config.param_dtype}
            _write_json(partial / "config.json", {key: value for key, value in written.items() if key != "torch_dtype"})
            _copy_tokenizer(tokenizer or like, partial)
            partial.chmod(0o755)
            partial.rename(out)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise CheckpointError(f"{out} cannot be written: {error}") from error


def _copy_tokenizer(source: Path | None, folder: Path) -> None:
    for name in _COPIED:
        if source is not None and (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def _has_settings(like: Path) -> bool:
    return like.suffix == ".gguf" or (like / "config.json").is_file()


def _write_weights(folder: Path, family: Family, weights: dict[Any, Any], shard_bytes: int) -> None:
    jobs = {name: (tensor, where, index) for name, tensor, where, index in stored_tensors(family, weights)}
    plan = [
        Planned(
            name=name,
            shape=stored_shape(tensor, weights[where].shape),
            dtype=np.dtype(weights[where].get_value().dtype),
        )
        for name, (tensor, where, _) in jobs.items()
    ]
    shards = plan_shards(plan, shard_bytes)
    files = {
        "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors": shard
        for number, shard in enumerate(shards, start=1)
    }

    def values(tensors: list[Planned]) -> Iterator[NDArray[Any]]:
        for planned in tensors:
            yield _stored(*jobs[planned.name], weights)

    for name, tensors in files.items():
        write_safetensors(folder / name, tensors, values(tensors))
    if len(files) > 1:
        _write_json(folder / "model.safetensors.index.json", index_of(files))


def _stored(tensor: Tensor, where: tuple[Any, ...], index: tuple[int, ...], weights: dict[Any, Any]) -> NDArray[Any]:
    value = weights[where].get_value()
    return parse_stored_form(tensor.form).to_stored(np.asarray(value[index] if index else value))


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
