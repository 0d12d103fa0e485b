"""Claude Code plays whole episodes by its recipe: what it does to its folder, and the tree of turns it leaves."""

from pathlib import Path

from forgejax.types import StopReason
from tests.scaffolds.playing import count_steps, installed, list_user_messages, play, write_call

THOUGHT = "<think>\nI do it.\n</think>\n\n"
QUESTION = "Write hello to a.txt"


def bash(command: str) -> str:
    return write_call("Bash", command=command, description="a command")


async def test_an_episode_with_thoughts_is_one_chain_of_turns_with_its_effects_on_disk(tmp_path: Path) -> None:
    script = [
        THOUGHT + "I write.\n" + write_call("Write", file_path="a.txt", content="hello"),
        THOUGHT + bash("cat a.txt") + "\n" + bash("cp a.txt b.txt"),
        THOUGHT + "a.txt says hello.",
    ]
    played = await play(installed("claude-code"), lambda prompt: script[count_steps(prompt)], QUESTION, tmp_path)

    assert (played.trajectory.stop_reason, played.trajectory.answer) == (StopReason.COMPLETED, "a.txt says hello.")
    assert played.files == {"a.txt": "hello", "b.txt": "hello"}
    assert (played.said, played.parents, played.untrainable) == (script, [None, 0, 1], [None] * 3)
    assert [turn.tool_calls for turn in played.turns] == [1, 2, 0]
    assert not any(name.startswith("branches") for name in played.counts)


async def test_calls_that_cannot_be_made_are_answered_and_stay_in_the_chain(tmp_path: Path) -> None:
    script = [
        write_call("Bash", cmd="ls"),
        write_call("no_such_tool", x=1),
        bash("printf hello > a.txt"),
        "Done.",
    ]
    played = await play(
        installed("claude-code"), lambda prompt: script[count_steps(prompt)], QUESTION, tmp_path, family="qwen2.5"
    )

    assert (played.trajectory.answer, played.files) == ("Done.", {"a.txt": "hello"})
    assert (played.said, played.parents, played.untrainable) == (script, [None, 0, 1, 2], [None] * 4)
    assert [turn.malformed_tool_calls for turn in played.turns] == [1, 1, 0, 0]


async def test_near_its_context_window_it_compacts_and_goes_on_in_a_branch(tmp_path: Path) -> None:
    def act(prompt: str) -> str:
        if "Respond with TEXT ONLY" in list_user_messages(prompt)[-1]:
            return "<summary>SUMMARY: hello is in a.txt, b.txt is missing.</summary>"
        if "SUMMARY: hello" not in prompt:
            return bash("printf hello > a.txt; seq 1 5000")
        return "Done." if "cp a.txt" in prompt else bash("cp a.txt b.txt")

    played = await play(installed("claude-code"), act, "Write hello to a.txt and b.txt", tmp_path, context=100_000)

    assert (played.trajectory.answer, played.files) == ("Done.", {"a.txt": "hello", "b.txt": "hello"})
    assert any(said.startswith("<summary>") for said in played.said)
    assert played.roots[-1] == bash("cp a.txt b.txt") and len(played.roots) > 1
    assert played.untrainable == [None] * len(played.turns)
    assert max(len(t.completion.prompt_ids) + len(t.completion.token_ids) for t in played.turns) <= 100_000


async def test_two_sub_agents_at_once_are_branches_of_the_session(tmp_path: Path) -> None:
    def act(prompt: str) -> str:
        asked = list_user_messages(prompt)[0]
        for word in ("one", "two"):
            if asked.endswith(f"Write {word}, please"):
                return f"{word} is written" if count_steps(prompt) else bash(f"printf {word} > {word}.txt")
        if count_steps(prompt):
            return "Both are done."
        agents = [
            write_call("Agent", description=word, prompt=f"Write {word}, please", subagent_type="general-purpose")
            for word in ("one", "two")
        ]
        return "\n".join(agents)

    played = await play(installed("claude-code"), act, "Let two sub-agents write one and two", tmp_path)

    assert (played.trajectory.answer, played.files) == ("Both are done.", {"one.txt": "one", "two.txt": "two"})
    assert sorted(played.roots[1:]) == [bash(f"printf {word} > {word}.txt") for word in ("one", "two")]
    assert played.counts["branches_history"] == 2.0
    assert played.untrainable == [None] * len(played.turns)
