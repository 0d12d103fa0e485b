"""Warm-start conversations."""

import json
import sys

import pytest

from examples.quickstart.demonstrations import AgentDescription, describe_agent, find_expression, write_messages
from forgejax.environments import ReasoningGym, TasksConfig
from forgejax.errors import AgentError

AGENT = AgentDescription(system="S", tools=({"type": "function", "function": {"name": "calculator"}},))


def test_the_expression_of_every_task_of_the_default_mixture_has_the_tasks_answer() -> None:
    tasks = ReasoningGym(TasksConfig(eval_tasks=32))
    for task in tasks.held_out:
        expression = find_expression(task.question)
        assert set(expression) <= set("0123456789 +-*")
        assert str(eval(expression)) == task.payload["answer"]


def test_a_direct_demonstration_is_question_and_answer() -> None:
    task = ReasoningGym(TasksConfig(eval_tasks=1)).held_out[0]
    assert write_messages(task, "5", use_tool=False, agent=AGENT) == [
        {"role": "system", "content": "S"},
        {"role": "user", "content": task.question},
        {"role": "assistant", "content": "5"},
    ]


def test_the_tool_tells_the_truth_whatever_the_final_answer() -> None:
    task = ReasoningGym(TasksConfig(eval_tasks=1)).held_out[0]
    messages = write_messages(task, "wrong", use_tool=True, agent=AGENT)
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "tool", "assistant"]
    call = messages[2]["tool_calls"][0]
    assert json.loads(call["function"]["arguments"]) == {"expression": find_expression(task.question)}
    assert (messages[3]["content"], messages[3]["tool_call_id"]) == (task.payload["answer"], call["id"])
    assert messages[4]["content"] == "wrong"


def test_a_question_without_arithmetic_is_refused() -> None:
    with pytest.raises(ValueError, match="no arithmetic expression"):
        find_expression("Who wrote 1984?")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("print('hello')", "expected"),
        ("raise SystemExit('no such option')", "no such option"),
        ("print('{}')", "expected"),
        ("import sys; sys.stdout.buffer.write(bytes([255]))", "expected"),
    ],
)
def test_an_agent_that_does_not_describe_itself_is_refused(source: str, message: str) -> None:
    with pytest.raises(AgentError, match=message):
        describe_agent((sys.executable, "-I", "-S", "-c", source))
