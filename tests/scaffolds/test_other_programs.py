"""The other recipes play whole episodes: what they do to their folder, and the tree of turns they leave."""

from pathlib import Path

import pytest

from forgejax.types import StopReason
from tests.scaffolds.playing import count_steps, installed, play, write_call

QUESTION = "Write hello to a.txt and copy it to b.txt"
THOUGHT = "<think>\nI do it.\n</think>\n\n"


def shell(command: str) -> str:
    return write_call("shell", command=command)


@pytest.mark.parametrize("family", ["qwen3", "qwen2.5"])
@pytest.mark.parametrize("name", ["openai-agents", "langgraph", "pydantic-ai", "ai-sdk"])
async def test_an_sdks_agent_is_one_chain_of_turns_with_its_effects_on_disk(
    name: str, family: str, tmp_path: Path
) -> None:
    thought = THOUGHT if family == "qwen3" else ""
    script = [
        thought + "I write.\n" + shell("printf hello > a.txt"),
        thought + shell("cat a.txt") + "\n" + shell("cp a.txt b.txt"),
        thought + "a.txt says hello.",
    ]
    played = await play(installed(name), lambda text: script[count_steps(text)], QUESTION, tmp_path, family=family)

    assert (played.trajectory.stop_reason, played.trajectory.answer) == (StopReason.COMPLETED, "a.txt says hello.")
    assert played.files == {"a.txt": "hello", "b.txt": "hello"}
    assert (played.said, played.parents, played.untrainable) == (script, [None, 0, 1], [None] * 3)


async def test_smolagents_words_its_history_anew_so_that_each_step_is_a_branch(tmp_path: Path) -> None:
    script = [
        shell("printf hello > a.txt"),
        shell("cp a.txt b.txt"),
        write_call("final_answer", answer="a.txt says hello."),
    ]

    forced = '<tool_call>\n{"name":'  # it requires a call in every turn

    def act(prompt: str) -> str:
        assert prompt.endswith(forced)
        return script[prompt.count("Observation:\nexit status")].removeprefix(forced)

    played = await play(installed("smolagents"), act, QUESTION, tmp_path)

    assert (played.trajectory.stop_reason, played.trajectory.answer) == (StopReason.COMPLETED, "a.txt says hello.")
    assert played.files == {"a.txt": "hello", "b.txt": "hello"}
    assert (played.parents, played.counts["branches_history"]) == ([None] * 3, 2.0)
    assert played.untrainable == [None] * 3


async def test_mini_swe_agent_is_one_chain_that_ends_when_it_submits(tmp_path: Path) -> None:
    script = [
        THOUGHT + write_call("bash", command="printf hello > a.txt"),
        THOUGHT + write_call("bash", command="cp a.txt b.txt"),
        THOUGHT + write_call("bash", command="echo COMPLETE_TASK_AND_SUBMIT_FINAL_OUTPUT"),
    ]
    played = await play(installed("mini-swe-agent"), lambda text: script[count_steps(text)], QUESTION, tmp_path)

    assert played.trajectory.stop_reason is StopReason.COMPLETED
    assert played.files == {"a.txt": "hello", "b.txt": "hello"}
    assert (played.said, played.parents, played.untrainable) == (script, [None, 0, 1], [None] * 3)


async def test_aider_writes_the_file_that_the_reply_holds(tmp_path: Path) -> None:
    reply = "I write it.\n\na.txt\n```\nhello\n```\n"
    played = await play(installed("aider"), lambda text: reply, "Write hello to a.txt", tmp_path)

    assert played.trajectory.stop_reason is StopReason.COMPLETED
    assert played.files["a.txt"] == "hello\n"
    assert (played.said, played.parents, played.untrainable) == ([reply], [None], [None])


async def test_any_command_asks_and_prints(tmp_path: Path) -> None:
    played = await play(installed("any-command"), lambda text: "Forty-two.", "How many are there?", tmp_path)

    assert (played.trajectory.answer, played.parents, played.untrainable) == ("Forty-two.", [None], [None])
