"""Side calls: what a rule matches, and what is no rule."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from forgejax.chat.messages import ChatRequest
from forgejax.errors import ConfigError
from forgejax.gateway import GatewayConfig
from forgejax.gateway.dialects import DIALECTS, Dialect
from forgejax.gateway.memory import ReplyMemory
from forgejax.gateway.side_calls.rules import SideCall, SideCallMatch, SideCallRules, read_side_calls

RULES = r"""
command = "what else a recipe says"

[[side_calls]]
name = "quota"
match = { model = "haiku", prompt = "/^quota$/", max_tokens = 1, tools = false, path = "/v1/messages" }
answer = "ok"

[[side_calls]]
name = "title"
match.system = "You are a title generator"

[[side_calls]]
name = "summary"
match.system = '/(?i)^\*?briefly\*? summarize this partial conversation/'
"""
# As these programs send them.
QUOTA: Any = {
    "model": "claude-haiku-4-5-20251001",
    "max_tokens": 1,
    "messages": [{"role": "user", "content": "quota"}],
    "metadata": {"user_id": "user_1_account__session_2"},
}
TITLE: Any = {
    "model": "gpt-5-nano",
    "input": [
        {"role": "developer", "content": "You are a title generator. You output ONLY a thread title."},
        {"role": "user", "content": [{"type": "input_text", "text": "Generate a title for this conversation:"}]},
        {"role": "user", "content": [{"type": "input_text", "text": "how do I get rich?"}]},
    ],
}
SUMMARY: Any = {
    "model": "gpt-4o-mini",
    "messages": [
        {"role": "system", "content": "*Briefly* summarize this partial conversation about programming."},
        {"role": "user", "content": "# USER\nadd a test\n# ASSISTANT\ndone\n"},
    ],
}


def speak(name: str) -> Dialect:
    return next(dialect for dialect in DIALECTS if dialect.name == name)


def find(rules: SideCallRules, dialect: str, body: dict[str, Any]) -> str | None:
    spoken = speak(dialect)
    chat = spoken.parse(body, ReplyMemory()).chat
    found = rules.find(spoken.routes[0].path, body.get("model"), chat)
    return None if found is None else found.name


def test_the_side_calls_of_real_programs_are_known_and_their_work_is_not(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text(RULES, encoding="utf-8")
    rules = SideCallRules(read_side_calls(tmp_path / "recipe.toml"))
    assert find(rules, "messages", QUOTA) == "quota"
    assert find(rules, "responses", TITLE) == "title"
    assert find(rules, "chat_completions", SUMMARY) == "summary"
    tool = {"name": "Bash", "input_schema": {"type": "object"}}
    for change in (
        {"model": "claude-sonnet-5"},
        {"max_tokens": 2},
        {"tools": [tool]},
        {"messages": [{"role": "user", "content": "quota?"}]},
        {"messages": [*QUOTA["messages"], {"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}]},
    ):
        assert find(rules, "messages", {**QUOTA, **change}) is None
    assert find(rules, "chat_completions", {k: v for k, v in QUOTA.items() if k != "metadata"}) is None
    assert find(rules, "responses", {**TITLE, "input": TITLE["input"][1:]}) is None


def test_recipes_know_the_side_calls_of_their_own_programs() -> None:
    folder = Path(__file__).parents[3] / "configs" / "scaffolds"
    claude_code, aider = (SideCallRules(read_side_calls(folder / f"{name}.toml")) for name in ("claude-code", "aider"))
    work = {**SUMMARY, "messages": [{"role": "system", "content": "Act as an expert."}, *SUMMARY["messages"][1:]]}
    assert find(claude_code, "messages", QUOTA) == "quota" and find(aider, "chat_completions", SUMMARY) == "summary"
    assert find(claude_code, "messages", {**QUOTA, "max_tokens": 32_000}) is None
    assert find(aider, "chat_completions", work) is None


def test_the_first_rule_that_matches_is_followed_and_no_limit_is_more_than_any() -> None:
    small = SideCall(name="small", match=SideCallMatch(max_tokens=20))
    plain = SideCall(name="plain", match=SideCallMatch(tools=False), answer="x")
    rules = SideCallRules((small, plain))
    assert rules.find("/v1/messages", "m", ChatRequest(messages=(), max_tokens=20)) is small
    assert rules.find("/v1/messages", None, ChatRequest(messages=(), max_tokens=21)) is plain
    assert rules.find("/v1/messages", ["no", "text"], ChatRequest(messages=())) is plain
    assert (small.canned, small.reason, plain.canned) == (False, "side_call_small", True)


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ('name = "a"\nmatch.sytem = "x"', r"side call 1: match has the unknown key 'sytem'; expected some of: model"),
        ('name = "a"\nmatch.system = "x"\nreply = "y"', "side call 1 has the unknown key 'reply'"),
        ('name = "a"', "side call 1: match is None; expected a table"),
        ('name = "a"\nmatch = {}', "the side call a matches every request; give at least one of: model"),
        ('name = "Big one"\nmatch.system = "x"', "'Big one' has no usable name"),
        ('name = "a"\nmatch.max_tokens = "1"', r"side call 1: Expected `int"),
        ('name = "a"\nmatch.max_tokens = 0', "has max_tokens 0; give at least 1"),
        ('name = "a"\nmatch.system = ""', r"match\.system of the side call a is empty"),
        ('name = "a"\nmatch.system = "x"\nanswer = ""', "the answer of the side call a is empty"),
        ('name = "a"\nmatch.system = "/(x/"', r"match\.system of the side call a is no regular expression: /\(x/"),
        ('name = "a"\nmatch.system = "/(a+)+$/"', r"takes too long on a text of 4000 characters: /\(a\+\)\+\$/; write"),
        ("name = ", "cannot be read as TOML"),
    ],
)
def test_a_bad_rule_is_refused_in_a_sentence(tmp_path: Path, table: str, words: str) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(f"[[side_calls]]\n{table}\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=words):
        read_side_calls(path)


def test_rules_of_one_name_are_refused_where_the_gateway_is_configured(tmp_path: Path) -> None:
    rule = SideCall(name="a", match=SideCallMatch(tools=False))
    with pytest.raises(ConfigError, match="several side calls of the name a; give each its own"):
        GatewayConfig(side_calls=(rule, rule))
    (tmp_path / "one.toml").write_text("side_calls = 3", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"side_calls is no list of tables; write each of them under \[\[side_calls"):
        read_side_calls(tmp_path / "one.toml")
    with pytest.raises(ConfigError, match="cannot be read as TOML"):
        read_side_calls(tmp_path / "none.toml")
