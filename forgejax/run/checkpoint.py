"""Checkpoints: weights, optimizer state, run figures and the place in the data of one step, through Orbax.

Bare weights (``save_tree``) and the weights inside a run's checkpoint are kept in one form, leaves by their path, and
``load_tree`` reads either.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import grain
import jax
import orbax.checkpoint as ocp

from forgejax.errors import CheckpointError

_SAVE_TIMEOUT_S = 600
_STATE = "state"  # the item of a run's checkpoint that holds the train state, its weights under "params"


class Place(Protocol):
    """Something that goes through data, as far as a checkpoint knows it; its state is plain data."""

    def get_state(self) -> dict[str, Any]: ...

    def set_state(self, state: dict[str, Any]) -> None: ...


class Checkpoints:
    """The checkpoints of one run. Saves are asynchronous: the arrays are copied before ``save`` returns."""

    def __init__(self, directory: Path, keep: int):
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, async_options=ocp.AsyncOptions(timeout_secs=_SAVE_TIMEOUT_S)
        )
        self._manager = ocp.CheckpointManager(directory.absolute(), options=options)
        self._directory = directory

    @property
    def latest(self) -> int | None:
        """The newest complete checkpoint's step."""
        step: int | None = self._manager.latest_step()
        return step

    @property
    def oldest(self) -> int | None:
        """The oldest step that is still kept."""
        steps = self._manager.all_steps()
        return min(steps) if steps else None

    def save(self, step: int, state: Any, figures: dict[str, Any], data: Place) -> None:
        """Saves ``state`` (a pytree of arrays), ``figures`` (plain data) and the place in the data."""
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(_named(state)),
                figures=ocp.args.JsonSave(figures),
                data=grain.checkpoint.CheckpointSave(_AsBytes(place=data)),
            ),
        )

    def restore(self, like: Any, data: Place) -> tuple[int, Any, dict[str, Any]]:
        """Restores the newest checkpoint: its step, a state laid out as ``like``, its figures; moves ``data``.

        Raises CheckpointError if there is none, or if it belongs to another model.
        """
        step = self.latest
        if step is None:
            raise CheckpointError(f"{self._directory} holds no checkpoint; start the run anew, without --resume")
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, _named(like))
        try:
            found = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardRestore(abstract),
                    figures=ocp.args.JsonRestore(),
                    data=grain.checkpoint.CheckpointRestore(_AsBytes(place=data)),
                ),
            )
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise CheckpointError(
                f"the checkpoint of step {step} in {self._directory} cannot be restored into this model: {error}"
            ) from error
        return step, _unnamed(found["state"], like), found["figures"]

    def wait(self) -> None:
        """Until the last save is on the disk. Raises what the save raised."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        self._manager.close()


@dataclass(frozen=True, kw_only=True)
class _AsBytes:
    """A place as Grain's checkpoint handler takes whatever is no iterator of its own: in the same form, as bytes."""

    place: Place

    def get_state(self) -> bytes:
        return json.dumps(self.place.get_state(), indent=4).encode()

    def set_state(self, state: bytes) -> None:
        self.place.set_state(json.loads(state))

    def start_prefetch(self) -> None:
        """The handler asks for it; a place begins by itself."""


def save_tree(path: Path, tree: Any) -> None:
    """Writes one pytree of arrays; ``path`` must not exist, and appears only when it is complete."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path.absolute(), _named(tree))


def load_tree(path: Path, like: Any) -> Any:
    """Reads what ``save_tree`` wrote, or the weights of one step of a run (``checkpoints/STEP``).

    Laid out as ``like`` and cast to its dtypes; leaves of ``like`` without a sharding come back as arrays of the host.
    Raises CheckpointError.
    """
    state = path / _STATE
    return _read(state, like, "params.") if state.is_dir() else _read(path, like, "")


def load_trained(directory: Path, step: int | None, like: Any) -> tuple[int, Any]:
    """The weights alone out of a run's checkpoints: the step they are of (None asks for the newest) and the weights.

    Laid out as ``load_tree`` says. The optimizer's moments are not read, and a trainer may be writing meanwhile. Raises
    CheckpointError for a step that is not there and for weights of another policy.
    """
    steps = ocp.utils.checkpoint_steps(directory.absolute()) if directory.is_dir() else []
    if not steps:
        raise CheckpointError(f"{directory} holds no checkpoint; give a run's folder of checkpoints")
    if step is not None and step not in steps:
        raise CheckpointError(f"{directory} holds no checkpoint of step {step}; kept are {sorted(steps)}")
    chosen = max(steps) if step is None else step
    return chosen, load_tree(directory / str(chosen), like)


def _read(path: Path, like: Any, prefix: str) -> Any:
    """The leaves of ``like`` out of the saved tree at ``path``, whose names there begin with ``prefix``."""
    if not path.is_dir():
        raise CheckpointError(f"{path} is no folder of saved weights; give one that forgejax wrote")
    wanted = {prefix + name: leaf for name, leaf in _named(like).items()}
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, wanted)
    try:
        _check_shapes(ocp.PyTreeCheckpointHandler().metadata(path.absolute()).tree, abstract, path)
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            arguments = ocp.args.PyTreeRestore(
                item=abstract,
                restore_args=ocp.checkpoint_utils.construct_restore_args(abstract),
                partial_restore=True,
            )
            found = checkpointer.restore(path.absolute(), args=arguments)
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read as weights of this policy: {error}") from error
    return _unnamed({name.removeprefix(prefix): leaf for name, leaf in found.items()}, like)


def _check_shapes(saved: Any, wanted: dict[str, jax.ShapeDtypeStruct], path: Path) -> None:
    for name, leaf in wanted.items():
        if name not in saved:
            raise CheckpointError(f"{path} holds no weight {name}; it belongs to another policy, or is no such file")
        if tuple(saved[name].shape) != leaf.shape:
            raise CheckpointError(
                f"{path}: weight {name} has shape {tuple(saved[name].shape)} and this policy's has {leaf.shape}; "
                "give the policy that was saved"
            )


def _named(tree: Any) -> dict[str, Any]:
    """Leaves by their path: the file does not depend on the Python classes of the tree."""
    return {_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _unnamed(named: dict[str, Any], like: Any) -> Any:
    return jax.tree_util.tree_map_with_path(lambda path, _: named[_name(path)], like)


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")
