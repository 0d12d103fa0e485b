"""The configuration of a run: frozen dataclasses kept near their users, one TOML file, dotted overrides on top."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import tomllib
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from forgejax.agents import AgentConfig, StopPolicy
from forgejax.agents.recipes import lay_recipe, load_recipe
from forgejax.environments import RewardConfig, TasksConfig
from forgejax.errors import ConfigError
from forgejax.gateway import GatewayConfig
from forgejax.learner import CreditConfig, PackConfig, StepConfig
from forgejax.models import PolicyConfig, read_policy_config
from forgejax.plain import from_mapping, suggest_name
from forgejax.pool.pool import PoolConfig
from forgejax.rollout import EngineConfig, RolloutConfig
from forgejax.run.warm_start import WarmStartConfig
from forgejax.sharding import MeshConfig, resolve
from forgejax.types import SamplingLaw

_T = TypeVar("_T")
_NAME = re.compile(r"\w[\w.+=@-]{0,99}")
_MOST_STEPS = 2**31 - 1  # policy versions are int32 on the devices
_TYRO = (tyro.conf.AvoidSubcommands, tyro.conf.FlagConversionOff)
_RULES = ConstructorRegistry()
_SEEDS = 2**32  # what jax, numpy and Grain all take


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What one run does and when.

    A run lives in ``root/name``; an empty name takes the configuration file's, numbered. ``eval_every`` and
    ``checkpoint_every`` count steps (0: only before and after). ``probe_every``: steps between two measurements of the
    sampler/trainer gap on freshly sampled tokens. The run stops after ``max_skipped`` non-finite steps in a row.
    ``seed`` is below 2**32. ``deterministic``: equal runs on one machine end in the same bits, stopped or not; what it
    sets in other sections is in ``TrainConfig.make_repeatable``.
    """

    name: str = ""
    root: str = "runs"
    steps: int = 100
    seed: int = 0
    deterministic: bool = False
    group_size: int = 8
    eval_every: int = 0
    eval_samples: int = 1
    eval_concurrency: int = 32
    checkpoint_every: int = 20
    keep_checkpoints: int = 3
    probe_every: int = 5
    max_skipped: int = 5

    def __post_init__(self) -> None:
        for name in ("steps", "eval_every", "checkpoint_every", "probe_every"):
            if getattr(self, name) < 0:
                raise ConfigError(f"run.{name} is {getattr(self, name)}; expected 0 or more")
        for name in ("group_size", "eval_samples", "eval_concurrency", "keep_checkpoints", "max_skipped"):
            if getattr(self, name) < 1:
                raise ConfigError(f"run.{name} is {getattr(self, name)}; expected at least 1")
        if self.group_size < 2:
            raise ConfigError("run.group_size is 1; a group needs at least 2 episodes to compare")
        if self.steps > _MOST_STEPS:
            raise ConfigError(f"run.steps is {self.steps}; expected {_MOST_STEPS} at most")
        if not 0 <= self.seed < _SEEDS:
            raise ConfigError(f"run.seed is {self.seed}; expected 0 to {_SEEDS - 1}")
        if self.name and not _NAME.fullmatch(self.name):
            raise ConfigError(
                f"run.name is {self.name!r}; expected the name of one folder, of letters, digits and . _ - + = @, "
                "beginning with a letter or digit, of 100 characters at most; where runs lie is run.root"
            )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything ``scripts/train.py`` needs. Field names are the sections of the TOML file.

    ``tokenizer`` is a folder with the tokenizer and its chat template; empty: the one in ``policy.path``. ``sampling``
    is the law training and evaluation tokens are drawn from, whatever the agent asks for.
    """

    run: RunConfig = field(default_factory=RunConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    tokenizer: str = ""
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    warm_start: WarmStartConfig = field(default_factory=WarmStartConfig)
    step: StepConfig = field(default_factory=StepConfig)
    packing: PackConfig = field(default_factory=PackConfig)
    credit: CreditConfig = field(default_factory=CreditConfig)
    pool: PoolConfig = field(default_factory=PoolConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    sampling: SamplingLaw = field(default_factory=SamplingLaw)
    gateway: GatewayConfig = field(default_factory=GatewayConfig)
    agent: AgentConfig = field(default_factory=AgentConfig)
    tasks: TasksConfig = field(default_factory=TasksConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    stop_policy: StopPolicy = field(default_factory=StopPolicy)

    def __post_init__(self) -> None:
        if not self.sampling.trainable:
            raise ConfigError(
                f"sampling {self.sampling}: tokens of a truncated, greedy or biased law cannot be trained; set "
                "temperature above 0, top_p = 1, top_k = 0, min_p = 0 and no logit_bias"
            )
        self._require_rows_for_the_longest()
        self._require_requests_for_the_episodes()
        if not self.tokenizer_folder or self.tokenizer_folder.endswith(".gguf"):
            raise ConfigError(
                f'tokenizer is "{self.tokenizer}" and policy.path is "{self.policy.path}"; set tokenizer to a '
                "folder that holds tokenizer.json and a chat template, or policy.path to a Hugging Face folder that "
                "has them"
            )

    def _require_rows_for_the_longest(self) -> None:
        packing, fed = self.packing, self.engine.max_context - 1
        if packing.fits(fed, min(fed, self.gateway.max_tokens_limit or fed)):
            return
        with_limit = ""
        if packing.fits(fed, 1):
            with_limit = f", or set gateway.max_tokens_limit to {packing.row_length} at most"
        raise ConfigError(
            f"packing.row_length {packing.row_length} is too short for engine.max_context {self.engine.max_context}: "
            f"the longest samples could not be trained; raise it, lower the other{with_limit}"
        )

    def _require_requests_for_the_episodes(self) -> None:
        """An episode has a request of its own under way most of the time; what the engine refuses, fails."""
        takes = self.engine.slots + self.engine.max_waiting
        for what, episodes in (
            (
                f"pool.window.in_flight {self.pool.window.in_flight} groups of run.group_size {self.run.group_size}",
                self.pool.window.in_flight * self.run.group_size,
            ),
            (f"run.eval_concurrency {self.run.eval_concurrency}", self.run.eval_concurrency),
        ):
            if episodes > takes:
                raise ConfigError(
                    f"{what} make {episodes} episodes at once, and the engine takes {takes} requests (engine.slots "
                    "and engine.max_waiting); lower the former, or raise engine.max_waiting"
                )

    def make_repeatable(self) -> TrainConfig:
        """The same run as ``run.deterministic`` plays it, whatever its other keys say.

        Only the groups of one step are in flight, and they are taken in the order of their indices: what is drawn by
        which weights depends on no clock. The engine's bits depend on no other request, no reward on wall clock, and
        the order of a Python agent's sets on no chance, unless the agent's own environment sets it.
        """
        window = dataclasses.replace(self.pool.window, in_flight=self.pool.window.groups_per_step, window=1)
        return dataclasses.replace(
            self,
            pool=dataclasses.replace(self.pool, window=window),
            engine=dataclasses.replace(self.engine, batch_invariant=True),
            reward=dataclasses.replace(self.reward, speed_weight=0.0),
            agent=dataclasses.replace(self.agent, env={"PYTHONHASHSEED": "0"} | self.agent.env),
        )

    @property
    def episodes_at_once(self) -> int:
        """The most episodes that are played at the same time, in training or in an evaluation."""
        return max(self.pool.window.in_flight * self.run.group_size, self.run.eval_concurrency)

    @property
    def tokenizer_folder(self) -> str:
        """Where the tokenizer is read from."""
        return self.tokenizer or self.policy.path


def load_config(path: Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """The configuration of a TOML file with command-line overrides (``--run.steps 200``, ``--mesh=cpu-8``) on top.

    What stands behind a ``--`` of its own is ``agent.command``, whatever its words look like. Where ``policy.path`` is
    set, the shape of the policy is the one found there, and where ``agent.recipe`` is, what the section does not say is
    the recipe's; a recipe that is chosen by an override stands above the section.

    Raises:
        ConfigError: the file is missing or malformed, a key is unknown, a value has the wrong type or cannot be run.
        MeshError: there is no such mesh.
    """
    config = load_saved(_lay_recipe(_read_toml(path)), str(path), overrides)
    if config.policy.path:
        return dataclasses.replace(config, policy=read_policy_config(config.policy.path, base=config.policy))
    return config


def load_shape(path: Path, overrides: Sequence[str] = ()) -> tuple[TrainConfig, str]:
    """Like ``load_config``, for what needs no weights: where ``policy.path`` is not here, the shape is that of the
    section ``[policy]``, and the second value says so in a sentence; it is empty else."""
    config = load_saved(_lay_recipe(_read_toml(path)), str(path), overrides)
    folder = config.policy.path
    if not folder:
        return config, ""
    if not Path(folder).exists():
        return config, f"policy.path {folder} is not here: the policy is of the shape in [policy]"
    return dataclasses.replace(config, policy=read_policy_config(folder, base=config.policy)), ""


def load_saved(saved: Mapping[str, Any], source: str, overrides: Sequence[str] = ()) -> TrainConfig:
    """Like ``load_config``, from plain data that is complete; ``source`` names it in errors."""
    options, command = _split_command(overrides)
    if command:
        agent = saved.get("agent", {})
        saved = {**saved, "agent": {**agent, "command": command} if isinstance(agent, Mapping) else agent}
    if chosen := _find_recipe_option(options):
        saved = _lay_recipe({**saved, "agent": {"recipe": chosen}})
    config = tyro.cli(
        TrainConfig,
        default=from_mapping(TrainConfig, saved, source),
        args=[_mesh_shorthand(argument) for argument in options],
        prog="train.py",
        config=_TYRO,
        registry=_RULES,
    )
    plan = resolve(config.mesh)
    config = dataclasses.replace(config, packing=config.packing.on(plan.platform, plan.context))
    return config.make_repeatable() if config.run.deterministic else config


def print_options(config: TrainConfig, section: str) -> None:
    """Prints the options of one section, with the values they have in ``config``.

    Raises ConfigError for a section that is not there.
    """
    hints = typing.get_type_hints(TrainConfig)
    if section not in hints:
        raise ConfigError(f"there are no options of {section!r}; {suggest_name(section, hints)}")
    shown = dataclasses.make_dataclass(
        "Options", [(section, hints[section], field(default=getattr(config, section)))], frozen=True
    )
    with contextlib.suppress(SystemExit):  # tyro's way of having printed
        tyro.cli(
            shown, args=["--help"], prog="train.py", description=f"Options of {section}.", config=_TYRO, registry=_RULES
        )


@_RULES.primitive_rule
def _read_bool(kind: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[bool] | None:
    """``true`` and ``false``, as in a TOML file, and as Python writes them."""
    if kind.type is not bool:
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="{true,false}",
        instance_from_str=lambda given: given[0].lower() == "true",
        is_instance=lambda value: isinstance(value, bool),
        str_from_instance=lambda value: [str(value).lower()],
        choices=("true", "false", "True", "False"),
    )


def to_mapping(config: Any) -> dict[str, Any]:
    """The resolved configuration as plain data, to be saved with a run."""
    built: dict[str, Any] = msgspec.to_builtins(config)
    return built


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        found = {*path.parent.glob("*.toml"), *Path("configs").glob("*.toml")} - {Path("pyproject.toml")}
        there = ", ".join(sorted(map(str, found))) or f"none in {path.parent}, and none in configs"
        raise ConfigError(f"there is no configuration file {path}; there are: {there}") from error
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as TOML: {error}") from error


def _mesh_shorthand(argument: str) -> str:
    """``--mesh NAME`` is what one types; the section also has sizes, so the name is its field ``name``."""
    if argument == "--mesh" or argument.startswith("--mesh="):
        return "--mesh.name" + argument.removeprefix("--mesh")
    return argument


def _lay_recipe(given: Mapping[str, Any]) -> Mapping[str, Any]:
    """The sections with what the recipe of the agent says under them; its side calls are rules of the gateway."""
    agent, gateway = given.get("agent"), given.get("gateway", {})
    if not isinstance(agent, Mapping) or not isinstance(gateway, Mapping) or not agent.get("recipe"):
        return given
    laid = {**given, "agent": lay_recipe(agent)}
    named = {rule.get("name") for rule in gateway.get("side_calls", ())}
    rules = [rule for rule in load_recipe(agent["recipe"]).side_calls if rule.get("name") not in named]
    return {**laid, "gateway": {**gateway, "side_calls": [*gateway.get("side_calls", ()), *rules]}} if rules else laid


def _find_recipe_option(options: Sequence[str]) -> str:
    """What ``--agent.recipe`` says, however it is written; "" where it is not there."""
    for index, option in enumerate(options):
        name, equals, value = option.partition("=")
        if name == "--agent.recipe":
            return value if equals else "".join(options[index + 1 : index + 2])
    return ""


def _split_command(arguments: Sequence[str]) -> tuple[Sequence[str], Sequence[str]]:
    """The options before a ``--`` of its own, and the agent's command behind it. Raises ConfigError."""
    if "--" not in arguments:
        return arguments, ()
    at = arguments.index("--")
    options, command = arguments[:at], arguments[at + 1 :]
    if not command or any(option.partition("=")[0] == "--agent.command" for option in options):
        raise ConfigError(
            "behind -- stands the command of the agent, as in: --agent.kind process -- python my_agent.py --fast; "
            f"found {' '.join(command) or 'nothing'!r}{' and --agent.command as well' if command else ''}"
        )
    return options, command
