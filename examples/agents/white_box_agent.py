"""White-box agents: ``async def run(task, llm, workspace)``, in the trainer's own process.

``python scripts/train.py --config configs/white_box.toml`` trains with ``run``, which goes on for longer than the
policy's context; ``[agent.context]`` says what is cut. ``run_team`` has sub-agents: dialogues of the same episode,
asked at the same time, whose replies earn what the episode does.
"""

import asyncio
from collections import Counter

from forgejax.agents import EpisodeSpec
from forgejax.agents.white_box import PolicyAccess
from forgejax.environments import Workspace

ROUNDS = 8
REPLY_TOKENS = 8


async def run(task: EpisodeSpec, llm: PolicyAccess, workspace: Workspace) -> str:
    """Has the policy think again ROUNDS times, and takes its last word."""
    dialogue = llm.begin()
    said = await dialogue.ask(task.question, max_tokens=REPLY_TOKENS)
    for round_ in range(ROUNDS):
        said = await dialogue.ask(f"Sure? Round {round_ + 1}: {task.question}", max_tokens=REPLY_TOKENS)
    return said.text


async def run_team(task: EpisodeSpec, llm: PolicyAccess, workspace: Workspace) -> str:
    """Asks four dialogues at once, and takes what most of them say."""
    members = [llm.begin() for _ in range(4)]
    said = await asyncio.gather(*(member.ask(task.question, max_tokens=REPLY_TOKENS) for member in members))
    return Counter(reply.text for reply in said).most_common(1)[0][0]
