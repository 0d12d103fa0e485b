"""An agent with one tool, a calculator, on the OpenAI SDK. It knows nothing of who trains the model it calls.

One question, endpoint and key from OPENAI_BASE_URL and OPENAI_API_KEY:

    agent.py "What is 12 * 34?"

Many questions at once, one JSON object a line (``worker_loop`` tells which):

    agent.py --worker

``--describe`` prints its system prompt and tools as JSON. Environment: CALCULATOR_LATENCY_S (seconds a tool call takes,
0.5), CALCULATOR_MAX_TURNS (4), OPENAI_MODEL ("policy").
"""

from __future__ import annotations

import ast
import asyncio
import json
import operator
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from worker_loop import TIMEOUT_S, work

if TYPE_CHECKING:
    from openai import AsyncOpenAI

SYSTEM = "Answer with a number. Use the calculator if it helps."
TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": "calculator",
            "description": "Evaluates an arithmetic expression.",
            "parameters": {
                "type": "object",
                "properties": {"expression": {"type": "string"}},
                "required": ["expression"],
            },
        },
    }
]
LATENCY_S = float(os.environ.get("CALCULATOR_LATENCY_S", "0.5"))
MAX_TURNS = int(os.environ.get("CALCULATOR_MAX_TURNS", "4"))
MODEL = os.environ.get("OPENAI_MODEL", "policy")
MAX_EXPRESSION = 200
MAX_BITS = 512
BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
UNARY: dict[type[ast.unaryop], Callable[[Any], Any]] = {ast.UAdd: operator.pos, ast.USub: operator.neg}


def evaluate(expression: str) -> str:
    """The value of an arithmetic expression over + - * / // % and brackets; integers stay exact.

    Raises ValueError for anything else, and where the expression or an integer in it grows too long.
    """
    if len(expression) > MAX_EXPRESSION:
        raise ValueError(f"the expression is longer than {MAX_EXPRESSION} characters")
    try:
        tree = ast.parse(expression.strip(), mode="eval")
        value = _value(tree.body)
    except (SyntaxError, ArithmeticError, MemoryError, RecursionError) as error:
        raise ValueError(f"cannot evaluate {expression!r}: {error}") from error
    return str(int(value)) if isinstance(value, float) and value.is_integer() and abs(value) < 2**53 else str(value)


def _value(node: ast.expr) -> int | float:
    value: int | float
    match node:
        case ast.Constant(value=int() | float() as constant) if not isinstance(constant, bool):
            value = constant
        case ast.UnaryOp(op=sign, operand=operand) if type(sign) in UNARY:
            value = UNARY[type(sign)](_value(operand))
        case ast.BinOp(left=left, op=sign, right=right) if type(sign) in BINARY:
            value = BINARY[type(sign)](_value(left), _value(right))
        case _:
            raise ValueError(f"only numbers, + - * / // % and brackets are allowed, not {ast.unparse(node)!r}")
    if isinstance(value, int) and value.bit_length() > MAX_BITS:
        raise ValueError("the result is too large")
    return value


async def call_tool(name: object, arguments: object) -> str:
    """What the model is told of its tool call: the value, or the error."""
    await asyncio.sleep(LATENCY_S)
    if name != "calculator":
        return f"error: there is no tool {name!r}"
    try:
        return evaluate(str(json.loads(str(arguments))["expression"]))
    except (ValueError, KeyError, TypeError) as error:
        return f"error: {error}"


async def solve(client: AsyncOpenAI, question: str) -> str | None:
    """Talks to the model until it answers without a tool call; None where it never does or is cut off."""
    messages: list[Any] = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}]
    for _ in range(MAX_TURNS):
        raw = await client.chat.completions.with_raw_response.create(model=MODEL, messages=messages, tools=TOOLS)
        choice = json.loads(raw.text)["choices"][0]
        message, calls = choice["message"], choice["message"].get("tool_calls") or []
        if not calls:
            content = (message.get("content") or "").strip()
            return content if content and choice.get("finish_reason") != "length" else None
        messages.append({"role": "assistant", "content": message.get("content"), "tool_calls": calls})
        functions = [call["function"] for call in calls]
        results = await asyncio.gather(*(call_tool(each["name"], each["arguments"]) for each in functions))
        messages += [
            {"role": "tool", "tool_call_id": call["id"], "content": result}
            for call, result in zip(calls, results, strict=True)
        ]
    return None


async def answer_one(question: str) -> None:
    """Prints the answer to one question on one line."""
    from openai import AsyncOpenAI  # noqa: PLC0415 (a second of start-up that --describe does not need)

    async with AsyncOpenAI(max_retries=0, timeout=TIMEOUT_S) as client:
        answer = await solve(client, question)
    print(" ".join((answer or "").split()))


def main(arguments: list[str]) -> None:
    match arguments:
        case ["--worker"]:
            asyncio.run(work(solve))
        case ["--describe"]:
            print(json.dumps({"system": SYSTEM, "tools": TOOLS}))
        case [question]:
            asyncio.run(answer_one(question))
        case _:
            sys.exit('usage: agent.py "QUESTION" | --worker | --describe')


if __name__ == "__main__":
    main(sys.argv[1:])
