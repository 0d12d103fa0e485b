"""A process of an episode in the sandbox of its workspace, and what of the agent's program is shown to it there."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path

from forgejax.agents.scaffolds.base import AgentConfig, EpisodeSpec
from forgejax.agents.scaffolds.lodging import Lodging
from forgejax.environments.sandbox import Egress, Entered, holds_others


def localise(episode: EpisodeSpec) -> EpisodeSpec:
    """``episode`` with the gateway's address as it reads in its sandbox, where it has one."""
    if episode.workspace.sandbox is None:
        return episode
    return replace(episode, base_url=Egress.of(episode.base_url).localise(episode.base_url))


@contextlib.asynccontextmanager
async def enter_sandbox(config: AgentConfig, outside: EpisodeSpec, lodging: Lodging) -> AsyncIterator[Entered | None]:
    """Around the process of an episode; None where it has no sandbox. Raises OSError where it cannot be entered."""
    sandbox = outside.workspace.sandbox
    if sandbox is None:
        yield None
        return
    own = () if lodging.root is None else (lodging.root,)
    async with sandbox.enter(egress=Egress.of(outside.base_url), read=list_program(config), own=own) as entered:
        yield entered


def place_command(config: AgentConfig) -> AgentConfig:
    """Names of files in the command in full, for a process that runs elsewhere."""
    program, *words = config.command
    return replace(config, command=(shutil.which(program) or program, *map(_name_in_full, words)))


def list_program(config: AgentConfig) -> Iterator[Path]:
    """What the agent's program is made of: its installation, and the files and folders that the configuration names.

    Folders that each sandbox has of its own, or that hold what is not the agent's (``/tmp``, this user's home), are
    not shown for being named.
    """
    program = shutil.which(config.command[0])
    if program is not None:
        yield from dict.fromkeys(map(_find_installation, (Path(program), Path(program).resolve())))
    for text in (*config.command[1:], *config.env.values()):
        for part in text.split(":"):
            path = Path(part)
            if part.startswith("/") and path.exists() and not path.is_relative_to("/usr") and not _is_too_much(path):
                yield path


def _name_in_full(word: str) -> str:
    is_file = word and not word.startswith("-") and "{" not in word and Path(word).is_file()
    return str(Path(word).absolute()) if is_file else word


def _find_installation(program: Path) -> Path:
    """The folder that npm or pip installed ``program`` into, else the program alone."""
    parents = program.parents
    if "node_modules" in program.parts:
        return next(parent for parent in reversed(parents) if parent.name == "node_modules")
    return parents[1] if program.parent.name == "bin" and (parents[1] / "lib").is_dir() else program


def _is_too_much(path: Path) -> bool:
    """Whether a path that is named may be more than what is meant by it."""
    return holds_others(path) or Path.home().is_relative_to(path)
