"""An agent with a shell on OpenAI's Agents SDK: one question, and its last words are the answer.

    openai_agents_agent.py "How many files are here?"

Environment: OPENAI_BASE_URL, OPENAI_API_KEY, OPENAI_MODEL ("policy").
"""

from __future__ import annotations

import os
import subprocess
import sys

from agents import Agent, Runner, function_tool

COMMAND_S = 30.0


@function_tool
def shell(command: str) -> str:
    """Runs a shell command in the current folder.

    Args:
        command: what the shell is given.
    """
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=COMMAND_S, check=False)
    return f"exit status {done.returncode}\n{done.stdout}{done.stderr}"


def main(question: str) -> None:
    model = os.environ.get("OPENAI_MODEL", "policy")
    agent = Agent(name="worker", instructions="Do what is asked, with the shell.", tools=[shell], model=model)
    print(Runner.run_sync(agent, question, max_turns=20).final_output)


if __name__ == "__main__":
    main(sys.argv[1])
