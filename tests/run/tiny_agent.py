"""An agent program of the standard library alone, whose success does not wait for the policy to learn anything.

It asks the model twice and then works the answer out by itself, but gives it only where the model's words have an even
checksum: about half of the episodes of any policy succeed, and which half is the policy's doing. As a worker
(``python tiny_agent.py``) it speaks forgejax's JSON lines; ``play`` is the same agent as a coroutine.
"""

import asyncio
import http.client
import json
import operator
import random
import re
import sys
import zlib
from typing import Any
from urllib.parse import urlsplit

OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul}
MAX_TOKENS = 5
TIMEOUT_S = 60.0


def solve(question: str, base_url: str, api_key: str) -> str:
    messages: list[dict[str, Any]] = [{"role": "user", "content": question}]
    words = _ask(messages, base_url, api_key)
    messages += [{"role": "assistant", "content": words}, {"role": "user", "content": "Sure?"}]
    words += _ask(messages, base_url, api_key)
    return right_answer(question) if zlib.crc32(words.encode()) % 2 == 0 else "no idea"


def right_answer(question: str) -> str:
    found = re.search(r"(-?\d+) *([-+*]) *(-?\d+)", question)
    assert found is not None, question
    return str(OPERATORS[found[2]](int(found[1]), int(found[3])))


async def play(task: Any, llm: object, workspace: object) -> str:
    return await asyncio.to_thread(solve, task.question, task.base_url, task.api_key)


async def dawdle(task: Any, llm: object, workspace: object) -> str:
    """The same agent, which begins when chance will have it."""
    await asyncio.sleep(random.random() / 20)
    return await play(task, llm, workspace)


async def never(task: Any, llm: object, workspace: object) -> str:
    """An agent that asks once and then never answers."""
    messages = [{"role": "user", "content": task.question}]
    await asyncio.to_thread(_ask, messages, task.base_url, task.api_key)
    await asyncio.Event().wait()
    return ""


async def crash(task: Any, llm: object, workspace: object) -> str:
    """An agent that asks once and then fails."""
    messages = [{"role": "user", "content": task.question}]
    await asyncio.to_thread(_ask, messages, task.base_url, task.api_key)
    raise RuntimeError("the calculator is gone")


def _ask(messages: list[dict[str, Any]], base_url: str, api_key: str) -> str:
    place = urlsplit(base_url)
    connection = http.client.HTTPConnection(place.hostname or "", place.port, timeout=TIMEOUT_S)
    try:
        body = json.dumps({"model": "policy", "messages": messages, "max_tokens": MAX_TOKENS})
        headers = {"Authorization": f"Bearer {api_key}", "Content-Type": "application/json"}
        connection.request("POST", f"{place.path}/chat/completions", body, headers)
        response = connection.getresponse()
        content = response.read()
    finally:
        connection.close()
    if response.status != 200:
        raise RuntimeError(f"status {response.status}: {content[:200]!r}")
    return json.loads(content)["choices"][0]["message"]["content"] or ""


async def _work() -> None:
    async def episode(line: str) -> None:
        request = json.loads(line)
        try:
            words = await asyncio.to_thread(solve, request["question"], request["base_url"], request["api_key"])
            reply = {"answer": words}
        except (OSError, http.client.HTTPException, RuntimeError) as error:
            reply = {"error": str(error), "stop_reason": "environment_failed"}
        print(json.dumps({"id": request["id"], **reply}), flush=True)

    print(json.dumps({"ready": True}), flush=True)
    running = set()
    while line := await asyncio.to_thread(sys.stdin.readline):
        running.add(asyncio.create_task(episode(line)))


if __name__ == "__main__":
    asyncio.run(_work())
