"""An agent with a shell on smolagents: one question, and its final answer is the answer.

    smolagents_agent.py "How many files are here?"

Environment: OPENAI_BASE_URL, OPENAI_API_KEY, OPENAI_MODEL ("policy").
"""

from __future__ import annotations

import os
import subprocess
import sys

from smolagents import LogLevel, OpenAIServerModel, ToolCallingAgent, tool

COMMAND_S = 30.0


@tool
def shell(command: str) -> str:
    """Runs a shell command in the current folder.

    Args:
        command: what the shell is given.
    """
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=COMMAND_S, check=False)
    return f"exit status {done.returncode}\n{done.stdout}{done.stderr}"


def main(question: str) -> None:
    model = OpenAIServerModel(
        model_id=os.environ.get("OPENAI_MODEL", "policy"),
        api_base=os.environ["OPENAI_BASE_URL"],
        api_key=os.environ["OPENAI_API_KEY"],
    )
    agent = ToolCallingAgent(tools=[shell], model=model, max_steps=20, verbosity_level=LogLevel.OFF)
    print(agent.run(question))


if __name__ == "__main__":
    main(sys.argv[1])
