"""Checkpoints: weights, optimizer state, run figures and the place in the data of one step, through Orbax.

Bare weights (``save_tree``) and the weights inside a run's checkpoint are kept in one form, leaves by their path, and
``load_tree`` reads either.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import itertools
import logging
import os
import shutil
import sys
import threading
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from forgejax.errors import CheckpointError
from forgejax.ops.rounding import narrow
from forgejax.report.storage import CHECKSUMS_FILE, find_damage, write_checksums
from forgejax.run.pod.orders import NOBODY_ELSE, Orders

_SAVE_TIMEOUT_S = 600
_SPARE_BYTES = 2**20  # what a checkpoint takes beside its arrays, and a run needs to end in order
_STATE = "state"  # the item of a run's checkpoint that holds the train state, its weights under "params"


class _NotFromOrbax(logging.Filter):
    """Drops what Orbax, and asyncio about its tasks, logs of a failed save: pages of tracebacks for one full disk.

    Each of these errors is raised by the manager as well, and told in a sentence.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        frame = record.exc_info[2] if record.exc_info else None
        files = [record.pathname]
        while frame is not None:
            files.append(frame.tb_frame.f_code.co_filename)
            frame = frame.tb_next
        return record.levelno < logging.ERROR or not any("/orbax/" in file for file in files)


_NOT_FROM_ORBAX = _NotFromOrbax()


def _is_late_write(ignored: sys.UnraisableHookArgs) -> bool:
    """Whether a write has ended that a failed save waits for no more: TensorStore finds the save's event loop closed.

    A full disk would else be a traceback for each array.
    """
    frame, codes = ignored.exc_traceback, []
    while frame is not None:
        codes.append(frame.tb_frame.f_code)
        frame = frame.tb_next
    closed = asyncio.BaseEventLoop.call_soon_threadsafe.__code__
    return ignored.exc_type is RuntimeError and ignored.object is None and codes[:1] == [closed]


class Place(Protocol):
    """Something that goes through data, as far as a checkpoint knows it; its state is plain data."""

    def get_state(self) -> dict[str, Any]: ...

    def set_state(self, state: dict[str, Any]) -> None: ...


class Checkpoints:
    """The checkpoints of one run. Saves are asynchronous: the arrays are copied before ``save`` returns.

    A checkpoint counts once its checksums are on the disk beside it. On opening, those newer than the newest sound one
    are set aside, and ``set_aside`` has a sentence about each. A save that fails is told by ``check``, which a run asks
    after each step: it ends there, for what it learns from then on could not be kept.
    """

    def __init__(self, directory: Path, keep: int, orders: Orders = NOBODY_ELSE):
        """``orders`` reach the other processes, which write and read their shards.

        Raises CheckpointError where there are checkpoints and all of them are damaged.
        """
        for logger in ("absl", "asyncio"):
            logging.getLogger(logger).addFilter(_NOT_FROM_ORBAX)
        self._directory, self._orders = directory, orders
        self.set_aside = _set_damaged_aside(directory)
        self._keep = keep
        directory.mkdir(parents=True, exist_ok=True)
        orders.give("open_checkpoints", str(directory.absolute()))
        self._shards = Shards(directory)
        self._safe = self.latest
        self._saving: threading.Thread | None = None
        self._failure: CheckpointError | None = None
        self._hook = sys.unraisablehook
        sys.unraisablehook = self._ignore

    @property
    def latest(self) -> int | None:
        """The newest step that was saved or is being saved."""
        return max(self._shards.steps(), default=None)

    @property
    def oldest(self) -> int | None:
        """The oldest step that is still kept."""
        return min(self._shards.steps(), default=None)

    def save(self, step: int, state: Any, figures: dict[str, Any], data: Place) -> None:
        """Saves ``state`` (a pytree of arrays), ``figures`` (plain data) and the place in the data.

        Waits for the save before. Raises CheckpointError if that failed, or if this one finds no room.
        """
        self.wait()
        try:
            self._require_room(sum(leaf.nbytes for leaf in jax.tree.leaves(state)))
            self._orders.give("save", step)
            self._shards.save(step, state, figures, data.get_state())
        except (OSError, ValueError, RuntimeError) as error:
            raise self._fail(step, error) from error
        self._saving = threading.Thread(target=self._complete, args=(step,), name="checkpoint", daemon=True)
        self._saving.start()

    def check(self) -> None:
        """Raises CheckpointError if a save has failed."""
        if self._failure is not None:
            raise self._failure

    def restore(self, like: Any, data: Place) -> tuple[int, Any, dict[str, Any]]:
        """Restores the newest checkpoint: its step, a state laid out as ``like``, its figures; moves ``data``.

        Its files were held against their checksums when this was opened. Raises CheckpointError if there is none, or if
        it belongs to another model.
        """
        step = self.latest
        if step is None:
            raise CheckpointError(f"{self._directory} holds no checkpoint; start the run anew, without --resume")
        self._orders.give("restore", step)
        state, figures, place = self._shards.restore(step, like)
        try:
            data.set_state(place)
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"the checkpoint of step {step} in {self._directory} belongs to other data: {error}"
            ) from error
        return step, state, figures

    def wait(self) -> None:
        """Until the last save is on the disk, with its checksums. Raises CheckpointError if it failed."""
        if self._saving is not None:
            self._saving.join(2 * _SAVE_TIMEOUT_S)
            if self._saving.is_alive():
                raise CheckpointError(
                    f"a checkpoint in {self._directory} is not written after {2 * _SAVE_TIMEOUT_S} s; "
                    f"look at its disk; {self.describe_safe()}"
                )
        self.check()

    def describe_safe(self) -> str:
        """What a run that ends now goes on from, as half a sentence."""
        return "no step is safe yet" if self._safe is None else f"the last safe step is {self._safe}"

    def close(self) -> None:
        """Lets a save that is under way end; says nothing of how."""
        if self._saving is not None:
            self._saving.join(2 * _SAVE_TIMEOUT_S)
        with contextlib.suppress(Exception):  # it may raise the failed save's error once more
            self._shards.close()
        if sys.unraisablehook == self._ignore:
            sys.unraisablehook = self._hook

    def _ignore(self, ignored: sys.UnraisableHookArgs) -> None:
        if not _is_late_write(ignored):
            self._hook(ignored)

    def _complete(self, step: int) -> None:
        """In a thread of its own: sees a save through, and seals it with its checksums."""
        try:
            self._shards.wait()
            write_checksums(self._directory / str(step))
            self._safe = step
            # Older ones are deleted here and not by Orbax, which would do it before the new one has its checksums.
            for old in sorted(self._shards.steps())[: -self._keep]:
                self._shards.delete(old)
        except Exception as error:  # noqa: BLE001  whatever Orbax and its threads raise is told by ``check``
            self._failure = self._fail(step, error)

    def _fail(self, step: int, error: Exception) -> CheckpointError:
        """What to say of a failed save. Gives back the room that its remains take."""
        for left in self._directory.glob(f"{step}.orbax-checkpoint-tmp*"):
            shutil.rmtree(left, ignore_errors=True)
        if not (self._directory / str(step) / CHECKSUMS_FILE).is_file():
            shutil.rmtree(self._directory / str(step), ignore_errors=True)
        full = any(text in str(error) for text in ("No space left", "disk is full", "RESOURCE_EXHAUSTED", "quota"))
        cause = "its disk is full" if full else str(error).partition("\n")[0]
        return CheckpointError(
            f"the checkpoint of step {step} could not be written to {self._directory}: {cause}. The run ends here, for "
            f"it could not keep what it learns: {self.describe_safe()}. Free space or mend the disk, then go on with "
            "--resume"
        )

    def _require_room(self, needed: int) -> None:
        """Raises OSError where the disk has less room than the arrays take: Orbax would find out late, and loudly."""
        free, needed = shutil.disk_usage(self._directory).free, needed + needed // 10 + _SPARE_BYTES
        if free < needed:
            raise OSError(errno.ENOSPC, f"No space left on device: {needed:,} bytes are needed and {free:,} free")


class Shards:
    """This process's part in the checkpoints of a run, through Orbax: its shards of every array, and of all processes
    together whole checkpoints, which any number of processes can restore on any mesh.

    Every process makes the same calls in the same order; ``figures`` and ``place`` are those of process 0.
    """

    def __init__(self, directory: Path):
        """The directory is there."""
        self._directory = directory.absolute()
        # With the processes named, they wait for each other through jax's service, not by a collective: that of a
        # thread of Orbax's would stand between the learner's programs.
        options = ocp.CheckpointManagerOptions(
            create=False,
            cleanup_tmp_directories=True,  # of saves that a crash has cut short
            async_options=ocp.AsyncOptions(timeout_secs=_SAVE_TIMEOUT_S),
            multiprocessing_options=_name_processes(),
        )
        self._manager = ocp.CheckpointManager(self._directory, options=options)

    def steps(self) -> list[int]:
        """Those that were saved or are being saved."""
        return list(self._manager.all_steps())

    def save(self, step: int, state: Any, figures: dict[str, Any], place: dict[str, Any]) -> None:
        """Returns once the arrays are copied; ``wait`` once they are written."""
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(_named(state)),
                figures=ocp.args.JsonSave(figures),
                data=ocp.args.JsonSave(place),
            ),
        )

    def wait(self) -> None:
        """Raises what Orbax has to say of the last save."""
        self._manager.wait_until_finished()

    def restore(self, step: int, like: Any) -> tuple[Any, dict[str, Any], dict[str, Any]]:
        """A state laid out as ``like``, the figures and the place of a step. Raises CheckpointError."""
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, _named(like))
        try:
            found = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardRestore(abstract),
                    figures=ocp.args.JsonRestore(),
                    data=ocp.args.JsonRestore(),
                ),
            )
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise CheckpointError(
                f"the checkpoint of step {step} in {self._directory} cannot be restored into this model: {error}"
            ) from error
        return _unnamed(found["state"], like), found["figures"], found["data"]

    def delete(self, step: int) -> None:
        """For process 0 alone."""
        shutil.rmtree(self._directory / str(step))
        self._manager.reload()

    def close(self) -> None:
        self._manager.close()


def _name_processes() -> Any:
    return ocp.options.MultiprocessingOptions(primary_host=0, active_processes=set(range(jax.process_count())))


def save_tree(path: Path, tree: Any, orders: Orders = NOBODY_ELSE) -> None:
    """Writes one pytree of arrays and its checksums; ``path`` must not exist, and appears only when it is complete.

    ``orders``: to the other processes, who call ``write_shards`` on the same tree.
    """
    aside = path.absolute().with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        orders.give("write_tree", str(aside))
        write_shards(aside, tree)
        write_checksums(aside)
        aside.rename(path)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def write_shards(path: Path, tree: Any) -> None:
    """This process's shards of a tree; complete with those of all others when it returns."""
    with ocp.StandardCheckpointer(multiprocessing_options=_name_processes()) as checkpointer:
        checkpointer.save(path, _named(tree))


def load_tree(path: Path, like: Any, orders: Orders = NOBODY_ELSE) -> Any:
    """Reads what ``save_tree`` wrote, or the weights of one step of a run (``checkpoints/STEP``).

    ``orders``: to the other processes, who call ``read_shards`` with the same tree.

    Laid out as ``like`` and cast to its dtypes; leaves of ``like`` without a sharding come back as arrays of the host.
    Raises CheckpointError, also where a file does not match its checksum.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path} is no folder of saved weights; give one that forgejax wrote")
    damage = find_damage(path)
    if damage is not None:
        raise CheckpointError(f"{path} cannot be read as weights of this policy: {damage}; use another copy or step")
    orders.give("read_tree", str(path.absolute()))
    return read_shards(path, like)


def read_shards(path: Path, like: Any) -> Any:
    """This process's shards of what ``load_tree`` reads, whose files are whole. Raises CheckpointError."""
    state = path / _STATE
    return _read(state, like, "params.") if state.is_dir() else _read(path, like, "")


def load_trained(directory: Path, step: int | None, like: Any) -> tuple[int, Any]:
    """The weights alone out of a run's checkpoints: the step they are of (None asks for the newest) and the weights.

    Laid out as ``load_tree`` says. The optimizer's moments are not read, and a trainer may be writing meanwhile: what
    has no checksums yet is not there yet. Raises CheckpointError for a step that is not there or damaged, and for
    weights of another policy.
    """
    steps = ocp.utils.checkpoint_steps(directory.absolute()) if directory.is_dir() else []
    steps = [each for each in steps if (directory / str(each) / CHECKSUMS_FILE).is_file()]
    if not steps:
        raise CheckpointError(f"{directory} holds no checkpoint; give a run's folder of checkpoints")
    if step is not None and step not in steps:
        raise CheckpointError(f"{directory} holds no checkpoint of step {step}; kept are {sorted(steps)}")
    chosen = max(steps) if step is None else step
    return chosen, load_tree(directory / str(chosen), like)


def _set_damaged_aside(directory: Path) -> list[str]:
    """Renames the checkpoints that are newer than the newest sound one; gives a sentence about each."""
    steps = sorted((int(path.name) for path in directory.glob("*") if path.name.isdigit()), reverse=True)
    told: list[str] = []
    damaged = False
    for step in steps:
        damage = find_damage(directory / str(step))
        if damage is None:
            return told
        damaged = damaged or (directory / str(step) / CHECKSUMS_FILE).exists()
        aside = _find_free_name(directory, f"damaged-{step}")
        (directory / str(step)).rename(aside)
        told.append(f"the checkpoint of step {step} is damaged: {damage}; it is set aside as {aside}")
    if damaged:
        raise CheckpointError(
            f"all checkpoints in {directory} are damaged: {'; '.join(told)}. Put back a copy under its step's number, "
            "or start a new run"
        )
    return told


def _find_free_name(directory: Path, stem: str) -> Path:
    names = itertools.chain([stem], (f"{stem}.{number}" for number in itertools.count(2)))
    return next(directory / name for name in names if not (directory / name).exists())


def _read(path: Path, like: Any, prefix: str) -> Any:
    """The leaves of ``like`` out of the saved tree at ``path``, whose names there begin with ``prefix``."""
    wanted = {prefix + name: leaf for name, leaf in _named(like).items()}
    abstract = jax.tree.map(lambda leaf: _widened(ocp.utils.to_shape_dtype_struct(leaf)), wanted)
    try:
        _check_shapes(ocp.PyTreeCheckpointHandler().metadata(path.absolute()).tree, abstract, path)
        handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=_name_processes())
        with ocp.Checkpointer(handler, multiprocessing_options=_name_processes()) as checkpointer:
            arguments = ocp.args.PyTreeRestore(
                item=abstract,
                restore_args=ocp.checkpoint_utils.construct_restore_args(abstract),
                partial_restore=True,
            )
            found = checkpointer.restore(path.absolute(), args=arguments)
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read as weights of this policy: {error}") from error
    return _unnamed({name.removeprefix(prefix): _cast(leaf, wanted[name]) for name, leaf in found.items()}, like)


def _widened(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """As the weights of a bf16 policy are saved: its masters."""
    if leaf.dtype != jnp.bfloat16:
        return leaf
    return jax.ShapeDtypeStruct(leaf.shape, jnp.float32, sharding=leaf.sharding)


def _cast(found: Any, like: Any) -> Any:
    """As the learner casts its masters: what is served or exported is what ran."""
    if found.dtype == like.dtype:
        return found
    narrowed = jax.jit(narrow, static_argnums=1, out_shardings=getattr(like, "sharding", None))(found, like.dtype)
    return narrowed if isinstance(found, jax.Array) else np.asarray(narrowed)


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
