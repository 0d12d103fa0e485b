"""The supervised phase of the Codex run: what Codex and a model that can call its tools would say to each other.

Codex itself is run once, so that prompts, tools and results are those of the version that is installed.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from forgejax.chat import ChatFormat
from forgejax.errors import ConfigError
from forgejax.run.warm_start import Demonstration
from forgejax.types import Task

sys.path.insert(0, str(Path(__file__).resolve().parent))
from recording import record_requests

QUESTION = "Write 40 to apple.txt."
DONE = "Done."
NUMBERS = (40, 56)  # of wrong commands, as the tasks have them
_DATE = re.compile(r"\d{4}-\d{2}-\d{2}")
_CHUNK = re.compile(r"Chunk ID: [0-9a-f]+")
_LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789_"


class CodexDemonstrator:
    """Does a task of ``write_file`` with one command and says that it is done.

    In all but ``right_rate`` of the demonstrations the command writes any number: how a call is made is shown, and that
    the number matters is left for RL to find out. ``short_rate`` of them leave out instructions and tools: to look a
    word up among two hundred is learnt long before it is among ten thousand, and carries over.
    ``tokenizer`` is a folder with any tokenizer that knows how to write a call. Raises ConfigError for a rate that is
    no share, AgentError where Codex cannot be run.
    """

    def __init__(self, *, tokenizer: str, right_rate: float, short_rate: float) -> None:
        for option, rate in (("right_rate", right_rate), ("short_rate", short_rate)):
            if not 0.0 <= rate <= 1.0:
                raise ConfigError(f"warm_start.options.{option} is {rate}; expected a share from 0 to 1")
        self._right_rate, self._short_rate = right_rate, short_rate
        self._messages, self._tools = record(tokenizer)

    @property
    def identity(self) -> str:
        told = json.dumps([self._messages, self._tools], sort_keys=True)
        return hashlib.sha256(_DATE.sub("", told).encode()).hexdigest()

    def demonstrate(self, task: Task, rng: np.random.Generator) -> Demonstration:
        name, number = str(task.payload["file"]), int(task.payload["number"])
        if rng.random() >= self._right_rate:
            number = int(rng.integers(*NUMBERS))
        place = "/tmp/forgejax-{}/task-{}".format(*("".join(rng.choice(list(_LETTERS), 8)) for _ in range(2)))
        filled = json.dumps(self._messages)
        for old, new in (
            (QUESTION, task.question),
            ("PLACE", place),
            ("CHUNK", f"{rng.integers(16**6):06x}"),
            (write_command("40", "apple.txt"), write_command(str(number), name)),
        ):
            filled = filled.replace(json.dumps(old)[1:-1], json.dumps(new)[1:-1])
        messages = json.loads(filled)
        if rng.random() < self._short_rate:
            return Demonstration(messages=[each for each in messages if each["role"] != "system"])
        return Demonstration(messages=messages, tools=self._tools)


def write_command(number: str, name: str) -> str:
    return f"echo {number} > {name}"


def record(tokenizer: str) -> tuple[list[dict[str, Any]], list[Mapping[str, Any]]]:
    """The messages of one whole episode, what is another each time named PLACE and CHUNK, and Codex's tools."""
    arguments = json.dumps({"cmd": write_command("40", "apple.txt")})
    call = f'<tool_call>{{"name": "exec_command", "arguments": {arguments}}}</tool_call>'
    with tempfile.TemporaryDirectory() as folder:
        asked = record_requests(tokenizer, QUESTION, [call, DONE], Path(folder))[-1]
    spell = ChatFormat.load(tokenizer).thoughts.spell
    told = json.dumps([*map(spell, asked.messages), {"role": "assistant", "content": DONE}])
    told = _CHUNK.sub("Chunk ID: CHUNK", told.replace(folder, "PLACE"))
    return json.loads(told), list(asked.tools)
