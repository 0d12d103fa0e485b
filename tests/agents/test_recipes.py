"""Recipes: what is read, what is laid over what, and what is refused."""

from pathlib import Path

import pytest

from forgejax.agents import AgentConfig, recipes
from forgejax.agents.recipes import find_installed, lay_recipe, list_recipes, load_recipe
from forgejax.errors import ConfigError
from forgejax.plain import from_mapping
from forgejax.run.config import load_config, load_saved, to_mapping

GOOD = """
about = "a program"
dialect = "responses"
[install]
pip = ["a==1"]
[agent]
kind = "process"
command = ["program", "{here}/x", "{installed}/y", "{question}"]
deadline_s = 9.0
[agent.env]
URL = "{base_url}"
KEY = "{api_key}"
"""


def refusal(tmp_path: Path, text: str) -> str:
    (tmp_path / "r.toml").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_recipe(str(tmp_path / "r.toml"))
    return str(caught.value)


@pytest.mark.parametrize("name", list_recipes())
def test_every_shipped_recipe_loads_and_makes_an_agent(name: str) -> None:
    recipe = load_recipe(name)
    config = from_mapping(AgentConfig, recipe.agent, name)
    assert (config.kind, config.recipe) == ("process", name)
    assert recipe.about and recipe.dialect in ("responses", "messages", "chat_completions")


def test_here_and_installed_are_places_and_the_program_is_the_installed_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recipes, "INSTALLED", tmp_path / "inst")
    (tmp_path / "r.toml").write_text(GOOD)
    assert load_recipe(f"{tmp_path}/r.toml").agent["command"] == [
        "program",
        f"{tmp_path}/x",
        f"{tmp_path}/inst/r/y",
        "{question}",
    ]
    program = tmp_path / "inst" / "r" / "node_modules" / ".bin" / "program"
    program.parent.mkdir(parents=True)
    program.touch()
    assert load_recipe(f"{tmp_path}/r.toml").agent["command"][0] == str(program)
    assert find_installed("other", tmp_path / "inst" / "r") == "other"


def test_what_a_section_says_stands_over_its_recipe(tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text(GOOD)
    laid = lay_recipe({"recipe": f"{tmp_path}/r.toml", "deadline_s": 3.0, "env": {"KEY": "mine"}})
    assert (laid["kind"], laid["deadline_s"]) == ("process", 3.0)
    assert laid["env"] == {"URL": "{base_url}", "KEY": "mine"}
    assert lay_recipe({"kind": "worker"}) == {"kind": "worker"}


def test_a_run_takes_its_agent_from_the_recipe_that_its_file_or_an_override_names(tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text(GOOD)
    recipe = f"{tmp_path}/r.toml"
    (tmp_path / "run.toml").write_text(f'tokenizer = "t"\n[agent]\nrecipe = "{recipe}"\ngrace_s = 2.0\n')
    agent = load_config(tmp_path / "run.toml").agent
    assert (agent.kind, agent.deadline_s, agent.grace_s, agent.command[0]) == ("process", 9.0, 2.0, "program")

    (tmp_path / "other.toml").write_text('tokenizer = "t"\n[agent]\ncommand = ["old"]\n')
    for option in (["--agent.recipe", recipe], [f"--agent.recipe={recipe}"]):
        config = load_config(tmp_path / "other.toml", [*option, "--agent.deadline-s", "4"])
        assert (config.agent.kind, config.agent.deadline_s, config.agent.command[0]) == ("process", 4.0, "program")
    assert load_saved(to_mapping(config), "saved") == config


def test_the_side_calls_of_a_recipe_are_the_gateways(tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text(f'{GOOD}\n[[side_calls]]\nname = "title"\nmatch.system = "titles"\n')
    assert load_recipe(f"{tmp_path}/r.toml").side_calls == ({"name": "title", "match": {"system": "titles"}},)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("deadline_s = 9.0", "deadline = 9.0"), "unknown key 'deadline'; did you mean 'deadline_s'?"),
        (('about = "a program"', ""), "about is missing"),
        (('about = "a program"', 'abuot = "x"\nabout = "y"'), "unknown key 'abuot'; did you mean 'about'?"),
        (("a==1", "a"), 'install.pip has "a"; expected its version as well: NAME==1.2.3'),
        (('"{base_url}"', '"x"'), "neither {base_url} nor {origin} stands anywhere"),
        (('"{api_key}"', '"x"'), "{api_key} stands nowhere"),
        (("{question}", "{qestion}"), "{qestion} stands for nothing; did you mean 'question'?"),
        (('kind = "process"', 'kind = "proces"'), "kind is 'proces'; expected one of: process, worker, coroutine"),
        (('about = "a program"', "about ="), "cannot be read as TOML"),
    ],
)
def test_a_recipe_that_is_wrong_is_refused_in_a_sentence(tmp_path: Path, change: tuple[str, str], said: str) -> None:
    assert said in refusal(tmp_path, GOOD.replace(*change))


def test_an_unknown_recipe_is_told_what_there_is() -> None:
    with pytest.raises(ConfigError, match=r'there is no recipe "codx" .*; did you mean \'codex\'\?'):
        load_recipe("codx")
