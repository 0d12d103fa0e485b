"""Checkpoints: weights, optimizer state, run figures and the Grain iterator of one step, through Orbax."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import grain
import jax
import orbax.checkpoint as ocp

from forgejax.errors import CheckpointError

_SAVE_TIMEOUT_S = 600


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

    def save(self, step: int, state: Any, figures: dict[str, Any], iterator: grain.DatasetIterator[Any]) -> None:
        """Saves ``state`` (a pytree of arrays), ``figures`` (plain data) and the position of the data pipeline."""
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(_named(state)),
                figures=ocp.args.JsonSave(figures),
                data=grain.checkpoint.CheckpointSave(iterator),
            ),
        )

    def restore(self, like: Any, iterator: grain.DatasetIterator[Any]) -> tuple[int, Any, dict[str, Any]]:
        """Restores the newest checkpoint: its step, a state laid out as ``like``, its figures; moves the iterator.

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
                    data=grain.checkpoint.CheckpointRestore(iterator),
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


def save_tree(path: Path, tree: Any) -> None:
    """Writes one pytree of arrays; ``path`` appears only when it is complete."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path.absolute(), _named(tree))


def load_tree(path: Path, like: Any) -> Any:
    """Reads what ``save_tree`` wrote, laid out as ``like``. Raises CheckpointError."""
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, _named(like))
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            return _unnamed(checkpointer.restore(path.absolute(), abstract), like)
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read as weights of this policy: {error}; delete it") from error


def _named(tree: Any) -> dict[str, Any]:
    """Leaves by their path: the file does not depend on the Python classes of the tree."""
    return {_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _unnamed(named: dict[str, Any], like: Any) -> Any:
    return jax.tree_util.tree_map_with_path(lambda path, _: named[_name(path)], like)


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")
