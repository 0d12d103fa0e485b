"""A task folder as it is read: ``task.toml``, ``instruction.md``, ``environment/`` and ``tests/test.sh``."""

from __future__ import annotations

import hashlib
import re
import shutil
import tomllib
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from forgejax.environments.harbor.recipe import Placed, read_environment
from forgejax.errors import ConfigError
from forgejax.imports import load_object

_CACHE = Path(".cache/tasks")
_TOLD = 5  # task folders that cannot be run
_ONLINE = re.compile(
    r"\b(?:apt-get|apt|apk|dnf|yum)\s+(?:-\S+\s+)*(?:install|update|add)\b"
    r"|\b(?:pip3?|npm|cargo|gem)\s+install\b|\bnpm\s+ci\b|\bnpx\b|\buvx\b|\buv\s+(?:add|sync|tool|pip)\b"
    r"|\b(?:curl|wget|git\s+clone)\b[^|;&#]*?https?://(?!localhost|127\.)\S*"
)


@dataclass(frozen=True, kw_only=True)
class HarborConfig:
    """``folder`` holds task folders, at any depth. Or ``make`` (``file.py:name``) writes them: a function that is
    called with a folder, ``count`` and the seed of the tasks; what it wrote is kept and found again.
    """

    folder: str = ""
    make: str = ""
    count: int = 240

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ConfigError(f"tasks harbor.count is {self.count}; expected 1 or more")


@dataclass(frozen=True, kw_only=True)
class HarborTask:
    """One folder. ``verifier_s`` is the longest that its tests may take; ``placed`` is what the agent finds."""

    name: str
    folder: Path
    instruction: str
    difficulty: str
    category: str
    verifier_s: float
    verifier_variables: Mapping[str, str]
    placed: Placed

    @property
    def tests(self) -> Path:
        return self.folder / "tests"


def read_tasks(config: HarborConfig, seed: int) -> list[HarborTask]:
    """The tasks of a configuration, by name. Raises ConfigError where there are none, or one cannot be run here."""
    if bool(config.folder) == bool(config.make):
        raise ConfigError('tasks harbor: set either folder (of task folders) or make ("file.py:function")')
    root = Path(config.folder) if config.folder else _make_tasks(config, seed)
    if not root.is_dir():
        raise ConfigError(f"tasks harbor.folder is {root}, which is no folder; expected one with task folders")
    folders = sorted(path.parent for path in root.rglob("task.toml"))
    if not folders:
        raise ConfigError(f"there is no task.toml below {root}; expected a folder for each task, with one in it")
    tasks, problems = [], []
    for folder in folders:
        try:
            tasks.append(read_task(folder, str(folder.relative_to(root)) if folder != root else folder.name))
        except ConfigError as error:
            problems.append(str(error))
    if problems:
        told = "\n".join(problems[:_TOLD])
        raise ConfigError(
            f"{len(problems)} of {len(folders)} task folders below {root} cannot be run here; mend them or move them "
            f"away. The first of them:\n{told}"
        )
    return tasks


def read_task(folder: Path, name: str) -> HarborTask:
    """Raises ConfigError, with what is missing or cannot be had in a sandbox."""
    try:
        told = tomllib.loads((folder / "task.toml").read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{folder / 'task.toml'} cannot be read as TOML: {error}") from error
    where = str(folder / "task.toml")
    metadata, verifier = _get_table(told, "metadata", where), _get_table(told, "verifier", where)
    environment = _get_table(told, "environment", where)
    if image := environment.get("docker_image"):
        raise ConfigError(f"{where}: the task needs the image {image}, and a sandbox has this machine's system")
    needs = {
        "steps": told.get("steps"),
        "environment.gpus": environment.get("gpus"),
        "environment.mcp_servers": environment.get("mcp_servers"),
        "environment.healthcheck": environment.get("healthcheck"),
        "verifier.environment_mode": verifier.get("environment_mode", "shared") != "shared",
    }
    if used := [name for name, value in needs.items() if value]:
        raise ConfigError(f"{where} sets {used[0]}; a task here is one instruction in one sandbox without a GPU")
    for needed in ("instruction.md", "tests/test.sh"):
        if not (folder / needed).is_file():
            raise ConfigError(f"{folder / needed} is missing; expected it in every task folder")
    instruction = (folder / "instruction.md").read_text(encoding="utf-8").strip()
    if not instruction:
        raise ConfigError(f"{folder / 'instruction.md'} is empty; expected what the agent is asked to do")
    seconds = verifier.get("timeout_sec", 600.0)
    if not isinstance(seconds, int | float) or isinstance(seconds, bool) or not 0 < seconds < float("inf"):
        raise ConfigError(f"{where}: verifier.timeout_sec is {seconds!r}; expected a number of seconds above 0")
    check_offline(folder / "tests" / "test.sh")
    placed = read_environment(folder.absolute() / "environment", "/app")
    given = {key: str(value) for key, value in _get_table(environment, "env", where).items()}
    variables = _get_table(verifier, "env", where)
    return HarborTask(
        name=name,
        folder=folder.absolute(),
        instruction=instruction,
        difficulty=str(metadata.get("difficulty", "default")),
        category=str(metadata.get("category", "harbor")),
        verifier_s=float(seconds),
        verifier_variables={key: str(value) for key, value in variables.items()},
        placed=replace(placed, variables={**placed.variables, **given}),
    )


def check_offline(script: Path) -> None:
    """Raises ConfigError where tests bring what they need over a network that they do not have. They would say that
    the agent failed."""
    for number, line in enumerate(script.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        if not line.lstrip().startswith("#") and (found := _ONLINE.search(line)) and "--no-index" not in line:
            raise ConfigError(
                f"{script}, line {number}: {found[0]} needs a network, and tests have none; install what they need "
                "beside this Python or in the system, which they see, and leave the line out"
            )


def _get_table(told: Mapping[str, Any], name: str, where: str) -> Mapping[str, Any]:
    table = told.get(name, {})
    if not isinstance(table, dict):
        raise ConfigError(f"{where}: {name} is {table!r}; expected a table")
    return table


def _make_tasks(config: HarborConfig, seed: int) -> Path:
    """The folder that ``config.make`` has filled. The same function, count and seed find what is there already."""
    make: Callable[[Path, int, int], None] = load_object(config.make, "tasks harbor.make")
    source = Path(config.make.rpartition(":")[0])
    digest = hashlib.sha256(repr((config.make, config.count, seed)).encode())
    if source.is_file():
        digest.update(source.read_bytes())
    folder = _CACHE / digest.hexdigest()[:16]
    if not folder.is_dir():
        aside = folder.with_name(f"{folder.name}.{uuid.uuid4().hex}")
        aside.mkdir(parents=True)
        try:
            make(aside, config.count, seed)
            aside.rename(folder)
        except OSError as error:
            if not folder.is_dir():  # else another process was first
                raise ConfigError(f"tasks harbor.make cannot write {folder}: {error}") from error
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    return folder
