"""Recipes: how agent programs that people know are installed, configured and started, each a file of data."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from forgejax.agents.scaffolds.base import AgentConfig
from forgejax.agents.scaffolds.lodging import PLACEHOLDERS, list_texts
from forgejax.errors import ConfigError
from forgejax.plain import from_mapping, suggest_name

RECIPES = Path("configs/scaffolds")
INSTALLED = Path(".scaffolds")
"""Where ``make scaffolds`` installs: a folder for each recipe, by its name."""

_BRACED = re.compile(r"(?<![${])\{([a-z_]+)\}")
_TABLES = ("env", "files")


@dataclass(frozen=True, kw_only=True)
class InstallConfig:
    """Packages with their versions, as npm and pip name them."""

    npm: tuple[str, ...] = ()
    pip: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for kind, mark, packages in (("npm", "@", self.npm), ("pip", "==", self.pip)):
            for package in packages:
                if mark not in package[1:]:
                    raise ConfigError(f'install.{kind} has "{package}"; expected its version as well: NAME{mark}1.2.3')


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One agent program. ``about`` says in a line what it is and where its result is, ``dialect`` what it speaks.

    ``agent`` holds keys of ``AgentConfig``, ``side_calls`` the rules for requests that are no steps of the task.
    """

    about: str
    dialect: str
    install: InstallConfig = field(default_factory=InstallConfig)
    agent: dict[str, Any]
    side_calls: tuple[dict[str, Any], ...] = ()


def load_recipe(name: str) -> Recipe:
    """The recipe of a name in ``configs/scaffolds``, or of a path that ends in .toml.

    In its texts ``{here}`` is the folder of the recipe, and ``{installed}`` where ``make scaffolds`` puts its packages;
    its program is the one there, if it is there.

    Raises ConfigError where there is no such recipe, a key is unknown or has the wrong type, a placeholder is unknown,
    or the program would never hear of the endpoint or its key.
    """
    path = find_recipe(name)
    try:
        given = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"recipe {path} cannot be read as TOML: {error}") from error
    for key in ("about", "dialect", "agent"):
        if key not in given:
            raise ConfigError(f"{path}: {key} is missing; the recipes in {RECIPES} show what there is to say")
    installed = (INSTALLED / path.stem).absolute()
    recipe = from_mapping(
        Recipe, _replace(given, {"{here}": str(path.parent.absolute()), "{installed}": str(installed)}), str(path)
    )
    agent = {"recipe": name, **recipe.agent}
    config = from_mapping(AgentConfig, agent, f"{path}, agent")
    _check_placeholders(config, str(path))
    agent["command"] = [find_installed(config.command[0], installed), *config.command[1:]] if config.command else []
    return Recipe(
        about=recipe.about,
        dialect=recipe.dialect,
        install=recipe.install,
        agent=agent,
        side_calls=recipe.side_calls,
    )


def find_recipe(name: str) -> Path:
    """The file of a recipe. Raises ConfigError where there is none."""
    path = Path(name) if name.endswith(".toml") else RECIPES / f"{name}.toml"
    if not path.is_file():
        raise ConfigError(f'there is no recipe "{name}" ({path}); {suggest_name(name, list_recipes())}')
    return path


def list_recipes() -> tuple[str, ...]:
    """The names of the recipes in ``configs/scaffolds``."""
    return tuple(sorted(path.stem for path in RECIPES.glob("*.toml")))


def find_installed(program: str, folder: Path) -> str:
    """The full path of a program that pip or npm put below ``folder``; its name where they did not."""
    for place in (folder / "bin", folder / "node_modules" / ".bin"):
        if (place / program).is_file():
            return str(place / program)
    return program


def lay_recipe(agent: Mapping[str, Any]) -> dict[str, Any]:
    """The values of an ``[agent]`` section over those of its ``recipe``; ``env`` and ``files`` are laid over key by
    key. Raises ConfigError."""
    name = agent.get("recipe")
    if not isinstance(name, str) or not name:
        return dict(agent)
    below = load_recipe(name).agent
    tables = {key: {**below.get(key, {}), **agent.get(key, {})} for key in _TABLES if key in below or key in agent}
    return {**below, **agent, **tables}


def _replace(data: Any, places: Mapping[str, str]) -> Any:
    """Plain data with the keys of ``places`` replaced in every text."""
    if isinstance(data, str):
        for name, place in places.items():
            data = data.replace(name, place)
        return data
    if isinstance(data, dict):
        return {key: _replace(value, places) for key, value in data.items()}
    return [_replace(value, places) for value in data] if isinstance(data, list) else data


def _check_placeholders(config: AgentConfig, source: str) -> None:
    """What a program must be told, it is told; a word in braces that stands for nothing is a slip."""
    texts = list_texts(config)
    named = {name for text in texts for name in _BRACED.findall(text)}
    if unknown := sorted(named - set(PLACEHOLDERS)):
        raise ConfigError(
            f"{source}: {{{unknown[0]}}} stands for nothing; {suggest_name(unknown[0], PLACEHOLDERS)} (braces of the "
            "program's own language want a space, an upper-case letter or a digit inside)"
        )
    if config.kind != "process":
        return
    if not named & {"base_url", "origin"}:
        raise ConfigError(
            f"{source}: neither {{base_url}} nor {{origin}} stands anywhere; put it where the program looks"
        )
    if "api_key" not in named:
        raise ConfigError(f"{source}: {{api_key}} stands nowhere; put it where the program looks for its key")
