"""Trains a policy with agents.

    python scripts/train.py                                  the quickstart (configs/quickstart.toml)
    python scripts/train.py --config configs/mine.toml       another configuration
    python scripts/train.py --mesh=v5e-64 --run.steps 500    dotted options override its keys
    python scripts/train.py --resume                         goes on with the newest run; --resume=NAME with another

Ctrl-C ends the run after the current step, with a checkpoint, and an evaluation at once; a second one ends it at once.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import shlex
import signal
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from forgejax.errors import ForgejaxError

if TYPE_CHECKING:
    from forgejax.report.live.progress import Progress
    from forgejax.run.config import TrainConfig
    from forgejax.run.loop import Outcome, Trainer
    from forgejax.run.rundir import RunDir

INTERRUPTED = 130
FAILED = 1


def main() -> int:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    # `python` in an agent's command is this environment's, whether or not it has been activated.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        config, place = _open(sys.argv[1:])
        return _train(config, place)
    except ForgejaxError as error:
        print(f"train.py: {error}", file=sys.stderr)
        return FAILED


def _open(arguments: list[str]) -> tuple[TrainConfig, RunDir]:
    """The configuration and the run directory that the command line asks for."""
    parser = argparse.ArgumentParser(prog="train.py", description=__doc__, add_help=False, allow_abbrev=False)
    parser.add_argument("--config", type=Path, default=Path("configs/quickstart.toml"))
    parser.add_argument("--resume", nargs="?", const="", default=None)
    own, overrides = parser.parse_known_args(arguments)
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", ".cache/jax")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
    # The rest takes seconds to import: a typo in the command line is answered first.
    from forgejax.run import rundir  # noqa: PLC0415
    from forgejax.run.config import load_config, load_saved, to_mapping  # noqa: PLC0415
    from forgejax.run.preflight import check_mesh  # noqa: PLC0415

    config = load_config(own.config, overrides)
    if own.resume is not None:
        with contextlib.ExitStack() as on_error:
            place = on_error.enter_context(contextlib.closing(rundir.reopen(Path(config.run.root), own.resume)))
            config = load_saved(rundir.saved_config(place.path), str(place.path), overrides)
            check_mesh(config)  # once only: it settles for good which devices this process has
            place.save_config(to_mapping(config))  # what was changed on the way holds for the next resume too
            on_error.pop_all()
        return config, place
    check_mesh(config)
    place = rundir.create(Path(config.run.root), config.run.name, own.config.stem)
    place.save_config(to_mapping(config))
    return config, place


def _train(config: TrainConfig, place: RunDir) -> int:
    from forgejax.report.live.progress import open_progress  # noqa: PLC0415
    from forgejax.run.build import play_run  # noqa: PLC0415
    from forgejax.run.conclude import conclude  # noqa: PLC0415

    progress = open_progress(steps=config.run.steps)
    try:
        stopper = Stopper(progress)
        outcome: Outcome = play_run(config, place, progress, stopper.watch)
        with progress.phase("reporting"):
            summary, report = conclude(outcome, config, place, shlex.join(["python", *sys.argv]))
        if not outcome.finished:
            progress.note(f"stopped after step {summary.steps}; go on with --resume={place.name}")
            return INTERRUPTED
        if summary.eval_reward_before is not None and summary.eval_reward_after is not None:
            progress.note(f"held-out outcome {summary.eval_reward_before:.3f} -> {summary.eval_reward_after:.3f}")
        progress.note(f"report: {report}")
        return 0
    finally:
        progress.close()
        place.close()


class Stopper:
    """Turns Ctrl-C and SIGTERM into an orderly end, and the second of them into an immediate one."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._trainer: Trainer | None = None
        self._asked = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._signalled)

    def watch(self, trainer: Trainer) -> None:
        """From now on the trainer can be stopped in an orderly way."""
        self._trainer = trainer
        if self._asked:
            trainer.stop()

    def _signalled(self, number: int, frame: FrameType | None) -> None:
        if self._asked or self._trainer is None:
            _show_cursor(1)
            os._exit(INTERRUPTED)  # the agents' guard ends them; nothing accepted is lost
        self._asked = True
        # A handler interrupts the very code whose locks it would need, so the work is done elsewhere.
        threading.Thread(target=self._stop, args=(self._trainer,), daemon=True).start()

    def _stop(self, trainer: Trainer) -> None:
        self._progress.note("stopping after this step; Ctrl-C again ends at once")
        trainer.stop()


def _show_cursor(descriptor: int) -> None:
    """Gives a terminal back the cursor that the panel has hidden. Never waits, nor on a terminal that is held."""
    with contextlib.suppress(OSError):
        if os.isatty(descriptor):
            os.set_blocking(descriptor, False)
            os.write(descriptor, b"\x1b[?25h\n")
            os.set_blocking(descriptor, True)


if __name__ == "__main__":
    sys.exit(main())
