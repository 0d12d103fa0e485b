"""Trains a policy with agents.

    python scripts/train.py                                 the quickstart (configs/quickstart.toml)
    python scripts/train.py --config configs/mine.toml      another configuration
    python scripts/train.py --mesh=v5e-64 --run.steps 500   dotted options override its keys; on every host of a slice
    python scripts/train.py --agent.kind process -- python my_agent.py --fast
                                                            behind -- stands the agent's command
    python scripts/train.py --resume                        goes on with the newest run

  --config FILE          the configuration, a TOML file; its keys are the options below
  --resume [RUN]         goes on with a run under --run.root, or in the folder RUN, by the configuration saved in it;
                         dotted options change it for good, and relative paths begin where the run was started;
                         auto: the run of --run.name, or the newest, if there is one, else a new one
  --mesh NAME            chip and count, as cpu-4, v5e-64 or h100-8
  --dry-run [--json]     whether the run fits its mesh, on any machine: bytes a chip, what chips exchange, seconds of a
                         step at best; compiled for the chips where libtpu is installed; exits with 1 if it does not fit
  --run.steps N          training steps
  --run.name NAME        the run's folder under --run.root (runs); without one it is numbered
  --run.seed N           of weights, tasks' order and sampling
  --run.deterministic true    equal runs on one machine end in the same bits
  --policy.path DIR      open weights to begin with: a Hugging Face folder or a .gguf file
  --agent.kind KIND      process (a program an episode), worker (a program that stays) or coroutine
  --distributed.coordinator HOST:PORT --distributed.processes N --distributed.process-id K
                         where the environment does not tell one of several processes who it is
  --help [SECTION]       this page, or all options of a section with their values

Sections: run, mesh, tokenizer, policy, warm_start, step, packing, credit, pool, engine, rollout, sampling, gateway,
agent, tasks, reward, stop_policy.

Ctrl-C ends the run after the current step, with a checkpoint, and an evaluation at once; a second one ends it at once.
The exit code is 0 for a run that is done, 130 for one that was stopped so, 75 for one that has lost a host, else 1.
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

from forgejax.errors import ConfigError, ForgejaxError

if TYPE_CHECKING:
    from forgejax.report.live.progress import Progress
    from forgejax.run.config import TrainConfig
    from forgejax.run.loop import Outcome, Trainer
    from forgejax.run.pod.job import JobMember
    from forgejax.run.rundir import RunDir

QUICKSTART = Path("configs/quickstart.toml")
ROOT = Path("runs")
INTERRUPTED = 130
FAILED = 1
AUTO = "auto"
DISTRIBUTED: dict[str, type] = {
    "coordinator": str, "processes": int, "process_id": int, "start_s": float, "silence_s": float, "order_s": float,
}  # fmt: skip


def main() -> int:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    # `python` in an agent's command is this environment's, whether or not it has been activated.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        asked = _parse(sys.argv[1:])
        if asked.help is not None:
            _show_help(asked)
            return 0
        if asked.dry_run or asked.json:
            return _plan(asked)
        return _run(asked)
    except ForgejaxError as error:
        print(f"train.py: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print("train.py: interrupted before it began", file=sys.stderr)
        return INTERRUPTED


def _parse(arguments: list[str]) -> argparse.Namespace:
    """The program's own options, and as ``overrides`` what the configuration is overridden with."""
    at = arguments.index("--") if "--" in arguments else len(arguments)
    parser = argparse.ArgumentParser(prog="train.py", add_help=False, allow_abbrev=False)
    parser.add_argument("--config", type=Path)
    parser.add_argument("--resume", nargs="?", const="")
    parser.add_argument("--run.root", dest="root", type=Path)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("-h", "--help", nargs="?", const="")
    for name, kind in DISTRIBUTED.items():
        parser.add_argument(f"--distributed.{name.replace('_', '-')}", dest=name, type=kind, default=argparse.SUPPRESS)
    asked, others = parser.parse_known_args(arguments[:at])
    root = [] if asked.root is None or asked.resume not in (None, AUTO) else [f"--run.root={asked.root}"]
    asked.overrides = [*root, *others, *arguments[at:]]
    return asked


def _show_help(asked: argparse.Namespace) -> None:
    if not asked.help:
        print(__doc__)
        return
    from forgejax.run.config import load_config, print_options  # noqa: PLC0415

    print_options(load_config(asked.config or QUICKSTART, asked.overrides), asked.help.replace("-", "_"))


def _plan(asked: argparse.Namespace) -> int:
    """What a run would need; nothing is made, and no accelerator touched."""
    from forgejax.run.plan.chips import prepare_compiler  # noqa: PLC0415

    if asked.resume is not None or not asked.dry_run:
        raise ConfigError("--json belongs to --dry-run, which takes a configuration: give --dry-run without --resume")
    prepare_compiler()
    from forgejax.run.config import load_shape  # noqa: PLC0415
    from forgejax.run.plan.dry_run import plan_run  # noqa: PLC0415
    from forgejax.run.plan.show import to_json, to_text  # noqa: PLC0415

    config, note = load_shape(asked.config or QUICKSTART, asked.overrides)

    def told(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    if note:
        told(note)
    found = plan_run(config, told)
    print(to_json(found) if asked.json else to_text(found))
    return 0 if found.fits else FAILED


def _run(asked: argparse.Namespace) -> int:
    """Begins or goes on with the run that the command line asks for; gives the exit code."""
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", ".cache/jax")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
    if asked.resume == AUTO:
        asked.resume = _find_begun(asked)
    what = f"a run by {asked.config or QUICKSTART}" if asked.resume is None else f"run {asked.resume or 'the newest'}"
    _write_at_once(1, f"checking {what} and this machine, before anything is begun ...\n")
    return _begin(asked) if asked.resume is None else _go_on(asked)


def _find_begun(asked: argparse.Namespace) -> str | None:
    """The run that this command has begun before, or None: the one of ``--run.name``, or the newest."""
    from forgejax.run import rundir  # noqa: PLC0415
    from forgejax.run.config import load_config  # noqa: PLC0415

    run = load_config(asked.config or QUICKSTART, asked.overrides).run
    try:
        found = rundir.find_run(Path(run.root), run.name)
    except ConfigError:
        return None
    asked.config = None
    return str(found)


def _join(config: TrainConfig, asked: argparse.Namespace) -> JobMember:
    """This process's place in its job: as the options say, or the environment."""
    from forgejax.run.pod.job import JobMember  # noqa: PLC0415
    from forgejax.sharding import DistributedConfig  # noqa: PLC0415

    given = {name: getattr(asked, name) for name in DISTRIBUTED if hasattr(asked, name)}
    return JobMember(config, DistributedConfig(**given))


def _begin(asked: argparse.Namespace) -> int:
    """A new run, by a configuration file; it is made once all that can be known of it has been checked."""
    # Imports that take seconds: a typo in the command line is answered first.
    from forgejax.run import preflight, rundir  # noqa: PLC0415
    from forgejax.run.config import load_config, to_mapping  # noqa: PLC0415

    file = asked.config or QUICKSTART
    config = load_config(file, asked.overrides)
    with _join(config, asked) as job:
        if job.followed is not None:
            return _follow(config, job)
        preflight.check_run(config, Path(config.run.root), fresh=True, processes=job.processes)
        place = rundir.create(Path(config.run.root), config.run.name, file.stem)
        place.save_config(to_mapping(config), preflight.digest_tokenizer(config.tokenizer_folder))
        return _train(config, place, job)


def _go_on(asked: argparse.Namespace) -> int:
    """A run that there is, by the configuration saved in it; from the folder it was started in, where it is there."""
    from forgejax.run import preflight, rundir  # noqa: PLC0415
    from forgejax.run.config import load_saved, to_mapping  # noqa: PLC0415

    if asked.config is not None:
        raise ConfigError(
            f"--config {asked.config} was given with --resume; a resumed run goes by the configuration saved in it: "
            "leave --config out, and change single keys by dotted options"
        )
    path = rundir.find_run(asked.root or ROOT, asked.resume)
    attempts = rundir.read_history(path)
    if attempts and Path(attempts[0].folder).is_dir():
        os.chdir(attempts[0].folder)  # relative paths of its configuration begin there
    saved = rundir.saved_config(path)
    config = load_saved(saved, str(path), asked.overrides)
    with _join(config, asked) as job, contextlib.ExitStack() as on_error:
        if job.followed is not None:
            return _follow(config, job)
        place = on_error.enter_context(contextlib.closing(rundir.reopen(path.parent, str(path))))
        tokenizer = preflight.digest_tokenizer(config.tokenizer_folder)
        preflight.check_resumed(saved, config, attempts, tokenizer)
        # Once only: it settles for good which devices this process has.
        preflight.check_run(config, place.path, fresh=not place.has_checkpoint, processes=job.processes)
        place.save_config(to_mapping(config), tokenizer)  # what was changed holds for the next resume too
        return _train(config, place, job)


def _train(config: TrainConfig, place: RunDir, job: JobMember) -> int:
    from forgejax.report.live.progress import open_progress  # noqa: PLC0415
    from forgejax.run.build import play_run  # noqa: PLC0415
    from forgejax.run.conclude import conclude  # noqa: PLC0415

    progress = open_progress(steps=config.run.steps)
    try:
        stopper = Stopper(progress, _name(place))
        if job.leader is not None:
            progress.note(job.describe())
            job.leader.watch_stop(stopper.ask)
        outcome: Outcome = play_run(config, place, progress, stopper.watch, job.leader)
        job.end(0 if outcome.finished else INTERRUPTED)
        with progress.phase("reporting"):
            summary, report = conclude(outcome, config, place, shlex.join(["python", *sys.argv]))
        if not outcome.finished:
            progress.note(f"stopped after step {summary.steps}; go on with --resume={_name(place)}")
            return INTERRUPTED
        if summary.eval_reward_before is not None and summary.eval_reward_after is not None:
            progress.note(f"held-out outcome {summary.eval_reward_before:.3f} -> {summary.eval_reward_after:.3f}")
        progress.note(f"report: {report}")
        return 0
    finally:
        progress.close()
        place.close()


def _follow(config: TrainConfig, job: JobMember) -> int:
    """This process's part in a job that another one leads."""
    from forgejax.run import preflight  # noqa: PLC0415
    from forgejax.run.pod.follow import follow  # noqa: PLC0415

    followed = job.followed
    assert followed is not None
    asked: list[int] = []

    def signalled(number: int, frame: FrameType | None) -> None:
        if asked:
            os._exit(INTERRUPTED)
        asked.append(number)
        followed.ask_to_stop()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signalled)
    preflight.check_mesh(config, job.processes)
    code = follow(config, followed, job.own)
    job.end(code)
    return code


def _name(place: RunDir) -> str:
    """What ``--resume`` finds the run by, here and without other options."""
    return place.name if place.path.parent.resolve() == ROOT.resolve() else str(place.path)


class Stopper:
    """Turns Ctrl-C and SIGTERM into an orderly end, and the second of them into an immediate one.

    ``name``: what ``--resume`` finds the run by.
    """

    def __init__(self, progress: Progress, name: str) -> None:
        self._progress = progress
        self._name = name
        self._trainer: Trainer | None = None
        self._asked = False
        self._signals = 0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._signalled)

    def watch(self, trainer: Trainer) -> None:
        """From now on the trainer can be stopped in an orderly way."""
        self._trainer = trainer
        if self._asked:
            trainer.stop()

    def ask(self) -> None:
        """Somebody else was told to end the run; more than one may have been. Any thread may call it."""
        if not self._asked:
            self._asked = True
            if self._trainer is not None:
                self._stop(self._trainer)

    def _signalled(self, number: int, frame: FrameType | None) -> None:
        if self._signals or self._trainer is None:
            _show_cursor(1)
            cause = signal.Signals(number).name
            _write_at_once(2, f"train.py: {cause} has ended it at once; go on with --resume={self._name}\n")
            os._exit(INTERRUPTED)  # the agents' guard ends them; nothing accepted is lost
        self._signals += 1
        # A handler interrupts the very code whose locks it would need, so the work is done elsewhere.
        threading.Thread(target=self.ask, daemon=True).start()

    def _stop(self, trainer: Trainer) -> None:
        self._progress.note("stopping after this step; Ctrl-C again ends at once")
        trainer.stop()


def _show_cursor(descriptor: int) -> None:
    """Gives a terminal back the cursor that the panel has hidden."""
    if os.isatty(descriptor):
        _write_at_once(descriptor, "\x1b[?25h\n")


def _write_at_once(descriptor: int, text: str) -> None:
    """Writes past all buffers, and never waits: not on a terminal that is held, nor on a pipe that nobody reads."""
    with contextlib.suppress(OSError):
        blocking = os.get_blocking(descriptor)
        os.set_blocking(descriptor, False)
        try:
            os.write(descriptor, text.encode())
        finally:
            os.set_blocking(descriptor, blocking)


if __name__ == "__main__":
    sys.exit(main())
