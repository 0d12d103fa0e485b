"""An agent with a shell on pydantic-ai: one question, and its last words are the answer.

    pydantic_ai_agent.py "How many files are here?"

Environment: OPENAI_BASE_URL, OPENAI_API_KEY, OPENAI_MODEL ("policy").
"""

from __future__ import annotations

import os
import subprocess
import sys

from pydantic_ai import Agent
from pydantic_ai.models.openai import OpenAIChatModel

COMMAND_S = 30.0


def shell(command: str) -> str:
    """Runs a shell command in the current folder.

    Args:
        command: what the shell is given.
    """
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=COMMAND_S, check=False)
    return f"exit status {done.returncode}\n{done.stdout}{done.stderr}"


def main(question: str) -> None:
    model = OpenAIChatModel(os.environ.get("OPENAI_MODEL", "policy"))
    agent = Agent(model, instructions="Do what is asked, with the shell.", tools=[shell])
    print(agent.run_sync(question).output)


if __name__ == "__main__":
    main(sys.argv[1])
