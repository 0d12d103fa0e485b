"""What a task's Dockerfile asks for, as far as a sandbox over this machine's own system can give it."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from forgejax.errors import ConfigError

_BASES = re.compile(r"(?:docker\.io/)?(?:library/)?(?:scratch|debian|ubuntu|python)(?:[:@].*)?")
_SYSTEM = (
    "/usr",
    "/bin",
    "/sbin",
    "/lib",
    "/lib64",
    "/etc",
    "/opt",
    "/proc",
    "/dev",
    "/run",
    "/tmp",
    "/logs",
    "/tests",
)
_HARMLESS = ("LABEL", "EXPOSE", "CMD", "ENTRYPOINT", "SHELL", "STOPSIGNAL", "MAINTAINER", "ARG", "USER")


@dataclass(frozen=True, kw_only=True)
class Placed:
    """Files of ``environment/`` by where they go, below the working directory ``work``; and variables."""

    work: str
    copies: tuple[tuple[Path, str], ...] = ()
    variables: dict[str, str] = field(default_factory=dict)

    def lay(self, folder: Path) -> None:
        """Copies the files below ``folder``; blocks. Raises OSError."""
        for source, inside in self.copies:
            target = folder / inside
            target.parent.mkdir(parents=True, exist_ok=True)
            if source.is_dir():
                shutil.copytree(source, target, dirs_exist_ok=True)
            else:
                shutil.copy2(source, target)


def read_environment(folder: Path, work: str) -> Placed:
    """What ``folder`` (a task's ``environment/``) puts into the working directory.

    Without a Dockerfile that is all that lies in it. Raises ConfigError where an image is needed: another base than
    Debian's, Ubuntu's or Python's, or a command that is run while it is built.
    """
    if not folder.is_dir():
        return Placed(work=work)
    for name in ("docker-compose.yaml", "docker-compose.yml"):
        if (folder / name).exists():
            raise ConfigError(f"{folder / name}: the task needs several containers, and a sandbox is one; leave it out")
    dockerfile = folder / "Dockerfile"
    if not dockerfile.is_file():
        copies = tuple((path, path.name) for path in sorted(folder.iterdir()))
        return Placed(work=work, copies=copies)
    variables: dict[str, str] = {}
    copied: list[tuple[Path, PurePosixPath]] = []
    for number, instruction, rest in _read_instructions(dockerfile):
        where = f"{dockerfile}, line {number}"
        if instruction == "WORKDIR":
            work = _check_work(str(PurePosixPath(work) / rest), where)
        elif instruction == "ENV":
            variables |= _read_variables(rest, where)
        elif instruction in ("COPY", "ADD"):
            copied += _read_copy(rest, folder, PurePosixPath(work), where)
        else:
            _refuse_image(instruction, rest, where)
    for _, target in copied:
        if not target.is_relative_to(work) or ".." in target.parts:
            raise ConfigError(f"{dockerfile}: {target} lies outside the working directory {work}; expected it below")
    copies = tuple((source, str(target.relative_to(work))) for source, target in copied)
    return Placed(work=work, copies=copies, variables=variables)


def _refuse_image(instruction: str, rest: str, where: str) -> None:
    if instruction == "FROM":
        base = (rest.split() or [""])[0]
        if not _BASES.fullmatch(base):
            raise ConfigError(f"{where}: the task needs the image {base}, and a sandbox has this machine's system")
    elif instruction not in _HARMLESS:
        raise ConfigError(f"{where}: {instruction} needs an image to be built, and a sandbox has none; leave it out")


def _read_instructions(dockerfile: Path) -> Iterator[tuple[int, str, str]]:
    """Line number, instruction and what follows it; continued lines are one."""
    text = dockerfile.read_text(encoding="utf-8")
    pending, begun = "", 0
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip().startswith("#") or not (line.strip() or pending):
            continue
        begun = begun or number
        if line.rstrip().endswith("\\"):
            pending += line.rstrip()[:-1] + " "
            continue
        instruction, _, rest = (pending + line).strip().partition(" ")
        yield begun, instruction.upper(), rest.strip()
        pending, begun = "", 0


def _check_work(work: str, where: str) -> str:
    taken = [place for place in _SYSTEM if PurePosixPath(work).is_relative_to(place)]
    if not work.startswith("/") or work == "/" or taken:
        raise ConfigError(f"{where}: the working directory {work} is the system's; expected one as /app")
    return work


def _read_variables(rest: str, where: str) -> dict[str, str]:
    try:
        words = shlex.split(rest)
    except ValueError as error:
        raise ConfigError(f"{where}: ENV {rest} cannot be read: {error}") from error
    if words and "=" not in words[0]:
        return {words[0]: " ".join(words[1:])}
    return dict(word.split("=", 1) for word in words if "=" in word)


def _read_copy(rest: str, folder: Path, work: PurePosixPath, where: str) -> Iterator[tuple[Path, PurePosixPath]]:
    before, bracket, listed = rest.partition("[")
    try:
        words = shlex.split(before) + (json.loads(bracket + listed) if bracket else [])
    except ValueError as error:
        raise ConfigError(f"{where}: COPY {rest} cannot be read: {error}") from error
    if flags := [word for word in words if word.startswith("--") and not word.startswith(("--chmod", "--chown"))]:
        raise ConfigError(f"{where}: {flags[0]} needs an image to be built, and a sandbox has none; leave it out")
    *sources, target = [word for word in words if not word.startswith("--")] or [""]
    if not sources:
        raise ConfigError(f"{where}: COPY {rest} names no place; expected files and where they go")
    for name in sources:
        found = sorted(folder.glob(name.strip("/") or ".")) if name not in (".", "./") else [folder]
        if not found:
            raise ConfigError(f"{where}: {name} is not in {folder}; expected files that are there")
        for source in found:
            if not source.resolve().is_relative_to(folder.resolve()):
                raise ConfigError(f"{where}: {name} lies outside {folder}; expected files of the task")
            place = work / target
            if source.is_dir():
                yield from ((each, place / each.name) for each in sorted(source.iterdir()) if each.name != "Dockerfile")
            else:
                yield source, place / source.name if target.endswith(("/", ".")) or len(sources) > 1 else place
