"""A command-line agent: what the model says is run by bash, and it is told what came of that, until it says done.

    python examples/shell/shell_agent.py "Write apple into drum.txt."

The endpoint and its key stand in OPENAI_BASE_URL and OPENAI_API_KEY. It works in the folder it is started in and needs
nothing but Python.
"""

import json
import os
import subprocess
import sys
import urllib.request

DONE = "done"
TURNS = 4
COMMAND_S = 10.0
SHOWN = 400  # characters of what a command prints


def ask(messages: list[dict[str, str]]) -> str:
    body = json.dumps({"model": "policy", "messages": messages}).encode()
    headers = {"Authorization": f"Bearer {os.environ['OPENAI_API_KEY']}", "Content-Type": "application/json"}
    request = urllib.request.Request(f"{os.environ['OPENAI_BASE_URL']}/chat/completions", body, headers)
    with urllib.request.urlopen(request, timeout=300) as response:
        return json.load(response)["choices"][0]["message"]["content"] or ""


def run(command: str) -> str:
    try:
        ran = subprocess.run(
            ["bash", "-c", command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=COMMAND_S, check=False
        )
    except subprocess.TimeoutExpired:
        return f"[no end within {COMMAND_S:g} s]"
    except ValueError as error:  # a null character
        return f"[{error}]"
    return show(ran.returncode, ran.stdout.decode(errors="replace"))


def show(status: int, output: str) -> str:
    """What the model is told of a command."""
    return f"[{status}]{output[:SHOWN]}".rstrip()


def main(instruction: str) -> None:
    messages = [{"role": "user", "content": instruction}]
    for _ in range(TURNS):
        said = ask(messages)
        if said.strip() == DONE:
            break
        messages += [{"role": "assistant", "content": said}, {"role": "user", "content": run(said)}]
    print(DONE)


if __name__ == "__main__":
    main(sys.argv[1])
