"""One TOML file, dotted overrides on top, and errors that name the place."""

import dataclasses
import tomllib
from pathlib import Path

import pytest

from forgejax.agents.recipes import lay_recipe
from forgejax.errors import ConfigError
from forgejax.plain import from_mapping
from forgejax.pool.window import WindowConfig
from forgejax.run.config import (
    TrainConfig,
    load_config,
    load_saved,
    print_options,
    to_mapping,
)
from tests.run.tiny_run import QUICKSTART, REPOSITORY, tiny_config

SHIPPED = sorted((REPOSITORY / "configs").glob("*.toml"))


def refusal(path: Path, text: str) -> str:
    """What ``load_config`` says of a file with this text."""
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    return str(caught.value)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_configuration_loads_and_survives_a_round_trip(path: Path) -> None:
    given = tomllib.loads(path.read_text(encoding="utf-8"))
    given["agent"] = lay_recipe(given.get("agent", {}))
    config = load_saved(given, str(path))  # the weights may be elsewhere

    assert from_mapping(TrainConfig, to_mapping(config), "again") == config
    assert load_saved(to_mapping(config), "again") == config


def test_an_overridden_configuration_survives_a_round_trip(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, "--agent.command", "a", "b", "--warm-start.options.guessed-levels", "x", "y")

    assert load_saved(to_mapping(config), "again") == config


@pytest.mark.parametrize(
    ("text", "key", "near"),
    [
        ("[run]\nstepz = 1\n", "run.stepz", "'steps'"),
        ("[step.optimizer]\nlearningrate = 0.1\n", "step.optimizer.learningrate", "'learning_rate'"),
        ('[[tasks.datasets]]\nname = "a"\n[[tasks.datasets]]\nnam = "b"\n', "tasks.datasets[1].nam", "'name'"),
        ("[polcy]\nd_model = 1\n", "polcy", "'policy'"),
    ],
)
def test_an_unknown_key_is_named_with_its_place_and_the_nearest_known_one(
    tmp_path: Path, text: str, key: str, near: str
) -> None:
    message = refusal(tmp_path / "a.toml", text)

    assert f"unknown key '{key}'" in message and f"did you mean {near}?" in message
    assert str(tmp_path / "a.toml") in message


def test_a_key_near_nothing_is_answered_with_all_there_are(tmp_path: Path) -> None:
    assert "expected one of: name, data" in refusal(tmp_path / "a.toml", "[mesh]\nqqqq = 1\n")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ('[run]\nsteps = "three"\n', "run.steps is 'three'; expected a whole number, without quotes"),
        ("[engine]\nprefill_buckets = [16, 1.5]\n", "engine.prefill_buckets[1] is 1.5; expected a whole number"),
        (
            '[[tasks.datasets]]\nname = "a"\nweight = "much"\n',
            "tasks.datasets[0].weight is 'much'; expected a number, without quotes",
        ),
        ("run = 3\n", "run is 3; expected a section, with keys of its own"),
        ('[credit]\nbaseline = "median"\n', "credit.baseline is 'median'; expected one of: loo, loo_step, group"),
        ('[agent]\nkind = "proces"\n', "agent.kind is 'proces'; expected one of: process, worker, coroutine"),
        ('[agent]\ncommand = "python a.py"\n', "agent.command is 'python a.py'; expected a list in brackets, each"),
        ("[agent.env]\nA = 3\n", "a value in agent.env: Expected `str`, got `int`"),
        ("[warm_start.options]\ntool_rate = [1]\n", "a value in warm_start.options: Expected"),
    ],
)
def test_a_value_of_the_wrong_type_is_named_with_its_place_and_what_to_write(
    tmp_path: Path, text: str, sentence: str
) -> None:
    assert sentence in refusal(tmp_path / "a.toml", text)


def test_a_missing_file_is_answered_with_those_that_are_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here.toml").touch()
    with pytest.raises(ConfigError, match=r"there is no configuration file .*gone\.toml.*here\.toml"):
        load_config(tmp_path / "gone.toml")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"there are: none in no-such-folder, and none in configs"):
        load_config(Path("no-such-folder") / "gone.toml")
    (tmp_path / "configs").mkdir()
    for name in ("configs/shipped.toml", "pyproject.toml"):
        (tmp_path / name).touch()
    with pytest.raises(ConfigError, match=r"there are: configs/shipped\.toml, here\.toml$"):
        load_config(Path("gone.toml"))


def test_a_file_that_is_no_toml_is_an_error_with_the_line(tmp_path: Path) -> None:
    assert "line 2" in refusal(tmp_path / "a.toml", "[run]\nsteps = = 3\n")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot be read as TOML"):
        load_config(tmp_path / "binary.toml")
    with pytest.raises(ConfigError, match="cannot be read as TOML"):
        load_config(tmp_path)


def test_the_mesh_may_be_named_with_and_without_an_equals_sign() -> None:
    assert load_config(QUICKSTART, ["--mesh=cpu-2"]).mesh.name == "cpu-2"
    assert load_config(QUICKSTART, ["--mesh", "cpu-2", "--mesh.fsdp", "2"]).mesh.name == "cpu-2"
    assert load_config(QUICKSTART, ["--mesh", "cpu-2", "--mesh.fsdp", "2"]).mesh.fsdp == 2


def test_an_override_changes_its_key_and_nothing_else() -> None:
    shipped = load_config(QUICKSTART)
    changed = load_config(QUICKSTART, ["--run.steps", "3", "--policy.tied-embeddings=False"])

    assert changed == dataclasses.replace(
        shipped,
        run=dataclasses.replace(shipped.run, steps=3),
        policy=dataclasses.replace(shipped.policy, tied_embeddings=False),
    )


@pytest.mark.parametrize(("yes", "no"), [("true", "false"), ("True", "False")])
def test_truth_is_written_as_in_a_toml_file_or_as_in_python(yes: str, no: str) -> None:
    config = load_config(QUICKSTART, ["--run.deterministic", yes, f"--packing.trunks={no}"])
    assert (config.run.deterministic, config.packing.trunks) == (True, False)


def test_tuples_lists_of_tables_and_tables_can_be_overridden() -> None:
    agent = ["--agent.command", "my-agent", "fast", "--agent.env.CALCULATOR-LATENCY-S", "2"]
    config = load_config(
        QUICKSTART, [*agent, "--engine.prefill-buckets", "8", "32", "--tasks.datasets.1.weight", "7.5"]
    )

    assert config.agent.command == ("my-agent", "fast")
    assert config.engine.prefill_buckets == (8, 32)
    assert [dataset.weight for dataset in config.tasks.datasets][1] == 7.5
    assert config.agent.env["CALCULATOR_LATENCY_S"] == "2"


def test_what_stands_behind_two_dashes_is_the_agents_command_whatever_it_looks_like() -> None:
    options = ["--agent.kind=process", "--run.steps=3", "--", "python", "my_agent.py", "--fast", "--run.steps", "--"]
    config = load_config(QUICKSTART, options)

    assert config.agent.command == ("python", "my_agent.py", "--fast", "--run.steps", "--")
    assert (config.agent.kind, config.run.steps) == ("process", 3)
    assert load_saved(to_mapping(config), "again") == config


@pytest.mark.parametrize("options", [["--"], ["--agent.command", "a", "--", "b"], ["--agent.command=a", "--", "b"]])
def test_two_dashes_without_a_command_or_beside_another_are_refused(options: list[str]) -> None:
    with pytest.raises(ConfigError, match="behind -- stands the command of the agent"):
        load_config(QUICKSTART, options)


@pytest.mark.parametrize("section", [each.name for each in dataclasses.fields(TrainConfig)])
def test_the_options_of_a_section_are_told_with_their_values(section: str, capsys: pytest.CaptureFixture[str]) -> None:
    config = load_config(QUICKSTART, ["--agent.kind=process", "--", "python", "--fast"])
    print_options(config, section)
    printed = capsys.readouterr().out

    assert f"--{section.replace('_', '-')}" in printed
    assert "--mesh.name" not in printed or section == "mesh"
    if section == "agent":
        assert "python --fast" in printed


def test_a_section_that_is_not_there_is_told_with_the_near_one() -> None:
    with pytest.raises(ConfigError, match=r"there are no options of 'polcy'; did you mean 'policy'\?"):
        print_options(load_config(QUICKSTART), "polcy")


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["--sampling.top-p=0.9"], "cannot be trained; set temperature above 0, top_p = 1, top_k = 0, min_p = 0"),
        (["--sampling.temperature=0"], "cannot be trained"),
        (["--packing.row-length=32", "--engine.max-context=128"], "packing.row_length 32 is too short for"),
        (
            ["--packing.row-length=64", "--packing.block-size=32", "--engine.max-context=128"],
            "raise it, lower the other, or set gateway.max_tokens_limit to 64 at most",
        ),
        (["--run.group-size=1"], "a group needs at least 2 episodes"),
        (["--run.steps=-1"], "run.steps is -1; expected 0 or more"),
        (["--run.steps=99999999999999999999"], "run.steps is 99999999999999999999; expected 2147483647 at most"),
        (["--run.seed=-1"], "run.seed is -1; expected 0 to 4294967295"),
        (["--run.seed=4294967296"], "run.seed is 4294967296; expected 0 to 4294967295"),
        (["--run.name=../../escape"], "run.name is '../../escape'; expected the name of one folder"),
        (["--run.name=a/b c"], "run.name is 'a/b c'; expected the name of one folder"),
        (["--run.name=.."], "run.name is '..'; expected the name of one folder"),
        (["--run.name=a?b"], "run.name is 'a?b'; expected the name of one folder"),
        (["--run.group-size=1000000"], "24000000 episodes at once, and the engine takes 4128 requests"),
        (["--run.eval-concurrency=5000"], "run.eval_concurrency 5000 make 5000 episodes at once"),
        (["--reward.speed-weight=1.5"], "a slow success could earn less than a failure"),
        (["--pool.window.in-flight=2", "--pool.window.groups-per-step=4"], "below groups_per_step 4"),
        (["--agent.kind=coroutine", "--agent.function="], 'expects "module:function"'),
        (["--engine.prefill-buckets", "8", "4"], "expected increasing chunk lengths"),
    ],
)
def test_values_that_cannot_be_run_are_refused_with_what_to_do(overrides: list[str], sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(QUICKSTART, overrides)
    assert sentence in str(caught.value)


def test_a_context_of_two_rows_goes_with_replies_of_one() -> None:
    """Row 64: a trunk of up to 64 tokens, and behind it what is trained."""
    options = ["--packing.row-length=64", "--packing.block-size=32", "--engine.max-context=128"]

    assert load_config(QUICKSTART, [*options, "--gateway.max-tokens-limit=64"]).packing.row_length == 64
    with pytest.raises(ConfigError, match=r"set gateway\.max_tokens_limit to 64 at most"):
        load_config(QUICKSTART, [*options, "--gateway.max-tokens-limit=65"])


@pytest.mark.parametrize(
    ("overrides", "answer"),
    [(["--run.stepz", "3"], "--run.steps"), (["--run.steps", "many"], "--run.steps"), (["stray"], "stray")],
)
def test_a_mistyped_option_ends_with_status_2_and_names_the_near_one(
    overrides: list[str], answer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        load_config(QUICKSTART, overrides)
    printed = capsys.readouterr()

    assert caught.value.code == 2
    assert answer in printed.err + printed.out


def test_a_deterministic_run_sets_what_depends_on_a_clock_or_on_company_and_nothing_else() -> None:
    asked = load_config(QUICKSTART)
    settled = load_config(QUICKSTART, ["--run.deterministic=true"])

    assert (asked.pool.window.in_flight, asked.reward.speed_weight, asked.engine.batch_invariant) == (24, 0.8, False)
    assert settled == dataclasses.replace(
        asked,
        run=dataclasses.replace(asked.run, deterministic=True),
        pool=dataclasses.replace(asked.pool, window=WindowConfig(in_flight=8, groups_per_step=8, window=1)),
        engine=dataclasses.replace(asked.engine, batch_invariant=True),
        reward=dataclasses.replace(asked.reward, speed_weight=0.0),
        agent=dataclasses.replace(asked.agent, env={"CALCULATOR_LATENCY_S": "0.5", "PYTHONHASHSEED": "0"}),
    )
    assert load_saved(to_mapping(settled), "again", ["--pool.window.in-flight", "16"]) == settled
    own = dataclasses.replace(asked, agent=dataclasses.replace(asked.agent, env={"PYTHONHASHSEED": "7"}))
    assert own.make_repeatable().agent.env == {"PYTHONHASHSEED": "7"}
