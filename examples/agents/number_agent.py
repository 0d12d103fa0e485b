"""An agent that asks for a number, on the OpenAI SDK: one question, one reply, and the last number in it is the answer.

One question, endpoint and key from OPENAI_BASE_URL and OPENAI_API_KEY:

    number_agent.py "What is 12 + 34?"

Many questions at once, one JSON object a line (``worker_loop`` tells which):

    number_agent.py --worker

Environment: NUMBER_MAX_TOKENS (of a reply, 32), NUMBER_SYSTEM (a system prompt; none by default), OPENAI_MODEL
("policy").
"""

from __future__ import annotations

import asyncio
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from worker_loop import TIMEOUT_S, work

if TYPE_CHECKING:
    from openai import AsyncOpenAI

MAX_TOKENS = int(os.environ.get("NUMBER_MAX_TOKENS", "32"))
SYSTEM = os.environ.get("NUMBER_SYSTEM", "")
MODEL = os.environ.get("OPENAI_MODEL", "policy")
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def last_number(reply: str) -> str | None:
    """The last number in a text, without thousands separators; None where there is none."""
    found = NUMBER.findall(reply)
    return found[-1].replace(",", "") if found else None


async def solve(client: AsyncOpenAI, question: str) -> str | None:
    """The number that the model's reply ends on; a reply that was cut off has not come to its end."""
    messages: list[Any] = [{"role": "system", "content": SYSTEM}] if SYSTEM else []
    messages.append({"role": "user", "content": question})
    completion = await client.chat.completions.create(model=MODEL, messages=messages, max_tokens=MAX_TOKENS)
    choice = completion.choices[0]
    return last_number(choice.message.content or "") if choice.finish_reason != "length" else None


async def answer_one(question: str) -> None:
    """Prints the answer to one question on one line."""
    from openai import AsyncOpenAI  # noqa: PLC0415 (a second of start-up)

    async with AsyncOpenAI(max_retries=0, timeout=TIMEOUT_S) as client:
        answer = await solve(client, question)
    print(answer or "")


def main(arguments: list[str]) -> None:
    match arguments:
        case ["--worker"]:
            asyncio.run(work(solve))
        case [question] if not question.startswith("--"):
            asyncio.run(answer_one(question))
        case _:
            sys.exit('usage: number_agent.py "QUESTION" | --worker')


if __name__ == "__main__":
    main(sys.argv[1:])
