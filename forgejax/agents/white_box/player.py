"""The white-box agent for episodes that bring their own moves: a game, tools, or both."""

from __future__ import annotations

from typing import Protocol

from forgejax.agents.white_box.dialogue import PolicyAccess
from forgejax.environments.base import Workspace


class Asked(Protocol):
    """What the player reads of its task."""

    @property
    def question(self) -> str: ...


async def play(task: Asked, llm: PolicyAccess, workspace: Workspace) -> str | None:
    """Plays ``workspace.game`` to its end: each reply is a move, each observation the next message. Without a game the
    last reply is the answer. ``workspace.tools`` can be called in either.

    None where a reply was cut off: the episode is truncated then.
    """
    dialogue, game = llm.begin(tools=workspace.tools), workspace.game
    if game is None:
        said = await dialogue.work(task.question)
        return None if said.cut else said.text
    text = f"{task.question}\n\n{game.observation}".strip()
    while True:
        said = await dialogue.work(text)
        if said.cut:
            return None
        await game.act(said.text)
        if game.done:
            return said.text
        text = game.observation
