"""Weights from a folder, each tensor straight to the shards that need it."""

from __future__ import annotations

import functools
import gc
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Sharding

from forgejax.errors import CheckpointError
from forgejax.models.families import Family, Tensor, family_of
from forgejax.models.init import Params, abstract_policy
from forgejax.models.policy import PolicyConfig
from forgejax.models.weights.folder import Source, open_source, read_settings
from forgejax.models.weights.stored_form import parse_stored_form
from forgejax.sharding import ONE_DEVICE, Layout

_NAMED = 8  # tensors that an error names


def load_params(config: PolicyConfig, layout: Layout = ONE_DEVICE) -> Params:
    """The weights in ``config.path``, in ``param_dtype``, where the layout wants them.

    Each shard is read from the mapped files as it is needed and moved to its devices before the next is read: the host
    holds one shard at a time. Tied embeddings may come with or without an ``lm_head``.

    Raises:
        ConfigError: the folder cannot be loaded at all.
        CheckpointError: its files are damaged, or its tensors are not those of ``config``.
    """
    abstract = abstract_policy(config)[1]
    family, source, weights = _open_checked(config, abstract)
    tensors = {tensor.ours: tensor for tensor in family.tensors}
    placements = dict(nnx.to_flat_state(layout.placements(abstract)))
    loaded = []
    for where, leaf in weights.items():
        tensor, sharding = tensors[".".join(where)], placements[where].get_value()
        loaded.append((where, leaf.replace(_load(source, tensor, leaf.get_value(), sharding))))
    return nnx.from_flat_state(loaded)


def check_weights(config: PolicyConfig) -> None:
    """Raises what ``load_params`` would raise of the weights in ``config.path``, having read their headers alone."""
    _open_checked(config, abstract_policy(config)[1])


def _open_checked(config: PolicyConfig, abstract: Params) -> tuple[Family, Source, dict[Any, Any]]:
    """The family, the stored tensors, and our weights by path, which fit each other."""
    path = Path(config.path)
    family = family_of(read_settings(path))
    source = open_source(path, family, config.num_layers)
    weights = dict(nnx.to_flat_state(abstract))
    _check(path, family, source, weights)
    return family, source, weights


def stored_tensors(
    family: Family, weights: dict[Any, Any]
) -> Iterator[tuple[str, Tensor, tuple[Any, ...], tuple[int, ...]]]:
    """Every stored tensor of a policy: its name, its description, the path of our weight, and the index into it."""
    for tensor in family.tensors:
        where = tuple(tensor.ours.split("."))
        if where not in weights:
            continue
        leading = weights[where].shape[: len(weights[where].shape) - len(parse_stored_form(tensor.form).ours)]
        for index in itertools.product(*map(range, leading)):
            named = dict(zip(("layer", "expert"), index, strict=False))
            yield tensor.name.format(**named), tensor, where, index


def stored_shape(tensor: Tensor, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape under which one layer of a weight of ours is stored."""
    return parse_stored_form(tensor.form).stored_shape(_sizes(tensor, shape))


def _sizes(tensor: Tensor, shape: tuple[int, ...]) -> dict[str, int]:
    ours = parse_stored_form(tensor.form).ours
    return dict(zip(ours, shape[len(shape) - len(ours) :], strict=True))


def _check(path: Path, family: Family, source: Source, weights: dict[Any, Any]) -> None:
    """One error for all that is missing, extra or misshapen."""
    described = {tuple(tensor.ours.split(".")) for tensor in family.tensors}
    if unheld := [".".join(where) for where in weights if where not in described]:
        raise CheckpointError(f"{path} is of {family.model_type}, which has no {', '.join(unheld)}; see config.json")
    expected = {
        name: stored_shape(tensor, weights[where].shape) for name, tensor, where, _ in stored_tensors(family, weights)
    }
    ignored = {tensor.name for tensor in family.tensors if "{" not in tensor.name}
    missing = sorted(expected.keys() - source.shapes.keys())
    extra = sorted(
        name for name in source.shapes.keys() - expected.keys() - ignored if not name.endswith("rotary_emb.inv_freq")
    )
    misshapen = [
        f"{name} {list(source.shapes[name])} instead of {list(shape)}"
        for name, shape in sorted(expected.items())
        if name in source.shapes and source.shapes[name] != shape
    ]
    said = [
        f"{len(names)} {kind}: {', '.join(names[:_NAMED])}{', ...' if len(names) > _NAMED else ''}"
        for kind, names in (("missing", missing), ("not of this model", extra), ("misshapen", misshapen))
        if names
    ]
    if said:
        raise CheckpointError(
            f"{path} does not hold the tensors that its configuration promises of {family.architecture}: "
            f"{'; '.join(said)}; "
            "give a folder whose config.json and weights belong together"
        )


def _load(source: Source, tensor: Tensor, like: jax.ShapeDtypeStruct, sharding: Sharding) -> jax.Array:
    """One weight: each distinct shard is put together on the host, and sent to all devices that hold it."""
    holders: dict[tuple[tuple[int, int], ...], list[jax.Device]] = {}
    for device, index in sharding.addressable_devices_indices_map(like.shape).items():
        bounds = tuple(each.indices(size)[:2] for each, size in zip(index or (), like.shape, strict=True))
        holders.setdefault(bounds, []).append(device)
    arrays = []
    for bounds, devices in holders.items():
        part = tuple(slice(start, stop) for start, stop in bounds)
        shard = _read_part(source, tensor, like, part)
        arrays += [jax.device_put(shard, device) for device in devices]
        jax.block_until_ready(arrays[-len(devices) :])
        del shard
        gc.collect(0)  # jax drops its hold on a buffer that it has copied only when asked, as this does
    return jax.make_array_from_single_device_arrays(like.shape, sharding, arrays)


def _read_part(source: Source, tensor: Tensor, like: jax.ShapeDtypeStruct, part: tuple[slice, ...]) -> np.ndarray:
    form = parse_stored_form(tensor.form)
    sizes = _sizes(tensor, like.shape)
    lead = len(like.shape) - len(form.ours)
    out = np.empty([each.stop - each.start for each in part], like.dtype)
    for index in itertools.product(*(range(each.start, each.stop) for each in part[:lead])):
        name = tensor.name.format(**dict(zip(("layer", "expert"), index, strict=False)))
        place = tuple(at - each.start for at, each in zip(index, part, strict=False))
        form.copy(
            functools.partial(source.rows, name),
            sizes,
            part[lead:],
            out[place],
            source.release,
        )
    return out
