"""Codex CLI plays whole episodes by its recipe: what it does to its folder, and the tree of turns it leaves."""

import re
from pathlib import Path

from forgejax.types import StopReason
from tests.scaffolds.playing import count_steps, installed, list_user_messages, play, write_call

THOUGHT = "<think>\nI do it.\n</think>\n\n"


async def test_an_episode_with_thoughts_is_one_chain_of_turns_with_its_effects_on_disk(tmp_path: Path) -> None:
    script = [
        THOUGHT + "I write.\n" + write_call("exec_command", cmd="printf hello > a.txt"),
        THOUGHT + write_call("exec_command", cmd="cat a.txt") + "\n" + write_call("exec_command", cmd="cp a.txt b.txt"),
        THOUGHT + "a.txt says hello.",
    ]
    played = await play(
        installed("codex"), lambda prompt: script[count_steps(prompt)], "Write hello to a.txt", tmp_path
    )

    assert (played.trajectory.stop_reason, played.trajectory.answer) == (StopReason.COMPLETED, "a.txt says hello.")
    assert played.files == {"a.txt": "hello", "b.txt": "hello"}
    assert (played.said, played.parents, played.untrainable) == (script, [None, 0, 1], [None] * 3)
    assert [turn.tool_calls for turn in played.turns] == [1, 2, 0]
    assert not any(name.startswith("branches") for name in played.counts)


async def test_calls_that_cannot_be_made_are_answered_and_stay_in_the_chain(tmp_path: Path) -> None:
    script = [
        write_call("exec_command", command="ls"),
        write_call("no_such_tool", x=1),
        write_call("exec_command", cmd="printf hello > a.txt"),
        "Done.",
    ]
    played = await play(
        installed("codex"),
        lambda prompt: script[count_steps(prompt)],
        "Write hello to a.txt",
        tmp_path,
        family="qwen2.5",
    )

    assert (played.trajectory.answer, played.files) == ("Done.", {"a.txt": "hello"})
    assert (played.said, played.parents, played.untrainable) == (script, [None, 0, 1, 2], [None] * 4)
    assert [turn.malformed_tool_calls for turn in played.turns] == [1, 1, 0, 0]


async def test_near_its_context_window_it_compacts_and_goes_on_in_a_branch(tmp_path: Path) -> None:
    def act(prompt: str) -> str:
        if "CONTEXT CHECKPOINT" in prompt:
            return "SUMMARY: hello is in a.txt, b.txt is missing."
        if "SUMMARY: hello" not in prompt:
            return write_call("exec_command", cmd="printf hello > a.txt; seq 1 1500")
        return "Done." if "<tool_response>" in prompt else write_call("exec_command", cmd="cp a.txt b.txt")

    played = await play(installed("codex"), act, "Write hello to a.txt and b.txt", tmp_path, context=44_000)

    assert (played.trajectory.answer, played.files) == ("Done.", {"a.txt": "hello", "b.txt": "hello"})
    summary = played.said.index("SUMMARY: hello is in a.txt, b.txt is missing.")
    assert played.parents[summary:] == [None, None, summary + 1]  # without its tools, and behind its summary
    assert played.untrainable == [None] * len(played.turns)
    assert max(len(t.completion.prompt_ids) + len(t.completion.token_ids) for t in played.turns) <= 44_000


async def test_two_sub_agents_at_once_are_branches_of_the_session(tmp_path: Path) -> None:
    def act(prompt: str) -> str:
        said = [text for text in list_user_messages(prompt) if not text.startswith("<")]
        done = count_steps(prompt)
        if said[-1] in ("Write one", "Write two"):
            word = said[-1].split()[1]
            return f"{word} is written" if done else write_call("exec_command", cmd=f"printf {word} > {word}.txt")
        if not done:
            return (
                write_call("spawn_agent", message="Write one") + "\n" + write_call("spawn_agent", message="Write two")
            )
        agents = re.findall(r'"agent_id":"([0-9a-f-]+)"', prompt)
        if all(f"{word} is written" in prompt for word in ("one", "two")):
            return "Both are done."
        return write_call("wait_agent", targets=agents, timeout_ms=20_000)

    played = await play(installed("codex"), act, "Let two sub-agents write one and two", tmp_path)

    assert (played.trajectory.answer, played.files) == ("Both are done.", {"one.txt": "one", "two.txt": "two"})
    first = [write_call("exec_command", cmd=f"printf {word} > {word}.txt") for word in ("one", "two")]
    assert sorted(played.roots[1:]) == first and played.counts["branches_history"] == 2.0
    assert played.untrainable == [None] * len(played.turns)
