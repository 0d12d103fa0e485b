"""A workload in rounds of batches, for samplers that draw one batch to its end: runs in the peer's environment."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Ids = list[int]
SampleBatch = Callable[[list[Ids], int], Sequence[Ids]]
"""Prompts, and how many tokens to draw behind each; gives what was drawn."""


def play(workload: dict[str, Any], sample: SampleBatch) -> float:
    """Seconds. A round draws as many tokens for each of its sessions as the one that wants most."""
    sessions = workload["sessions"]
    known: list[Ids] = [[] for _ in sessions]
    began = time.perf_counter()
    for turn, batch in enumerate(workload["rounds"]):
        prompts = [known[n] + sessions[n][turn]["observed"] for n in batch]
        most = max(sessions[n][turn]["drawn"] for n in batch)
        for n, prompt, drawn in zip(batch, prompts, sample(prompts, most), strict=True):
            wanted = sessions[n][turn]["drawn"]
            assert len(drawn) >= wanted, (len(drawn), wanted)
            known[n] = prompt + list(drawn[:wanted])
    return time.perf_counter() - began


def answer_lines(folder: Path, sample: SampleBatch, score: Callable[[Ids], list[float]], replies: int) -> None:
    """Answers each line of stdin, a command in JSON, by a line of JSON to the file descriptor."""
    workload = read_workload(folder)
    for line in sys.stdin:
        command = json.loads(line)
        if command["do"] == "score":
            answer: dict[str, Any] = {"logprobs": score(command["ids"])}
        else:
            answer = {"seconds": play(workload, sample)}
        os.write(replies, json.dumps(answer).encode() + b"\n")


def read_workload(folder: Path) -> dict[str, Any]:
    """What ``RolloutPeer`` wrote."""
    found: dict[str, Any] = json.loads((folder / "workload.json").read_text(encoding="utf-8"))
    return found


def take_stdout() -> int:
    """Stdout for answers alone: what libraries print goes to stderr."""
    replies = os.dup(1)
    os.dup2(2, 1)
    return replies
