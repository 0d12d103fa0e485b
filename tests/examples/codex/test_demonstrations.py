"""The Codex run's supervised phase: transcripts of the real program, some of them wrong on purpose."""

import json
from pathlib import Path

import numpy as np

from forgejax.chat import ChatFormat
from forgejax.environments import make_environment
from forgejax.imports import load_object
from forgejax.run.config import load_config
from tests.scaffolds.playing import installed

ROOT = Path(__file__).parents[3]


def test_demonstrations_are_codexs_own_words_with_the_tasks_command() -> None:
    installed("codex")
    config = load_config(ROOT / "configs" / "codex.toml")
    environment, chat = make_environment(config.tasks), ChatFormat.load(config.tokenizer)
    make = load_object(config.warm_start.demonstrator, "a demonstrator")
    options = dict(config.warm_start.options)
    right, mixed = make(**options | {"right_rate": 1.0, "short_rate": 0.0}), make(**options)
    assert right.identity == mixed.identity  # what varies from one recording to the next is left out

    commands = []
    for index in range(200):
        task = environment.task(index)
        shown = mixed.demonstrate(task, np.random.default_rng(index))
        call = next(message for message in shown.messages if message.get("tool_calls"))["tool_calls"][0]["function"]
        commands.append(call["arguments"]["cmd"] == f"echo {task.payload['number']} > {task.payload['file']}")
    assert 0.4 < np.mean(commands) < 0.65  # the right ones, and what is right by chance

    task = environment.task(3)
    shown = right.demonstrate(task, np.random.default_rng(3))
    told = json.dumps(shown.messages)
    assert task.question in told and f"echo {task.payload['number']} > {task.payload['file']}" in told
    assert not any(word in told for word in ("PLACE", "CHUNK"))
    ids = chat.render(shown.messages[:-1], shown.tools)
    assert 9_000 < len(ids) < config.engine.max_context * 9 // 10  # below that Codex compacts
    other = chat.render(right.demonstrate(environment.task(4), np.random.default_rng(4)).messages[:-1], shown.tools)
    assert next(at for at, pair in enumerate(zip(ids, other, strict=False)) if pair[0] != pair[1]) > 9_000
