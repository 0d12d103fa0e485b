"""SmolLM2-135M-Instruct through our chat format and engine, against transformers from the same folder, in FP32."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from forgejax.chat import ChatFormat
from forgejax.rollout import Driver, EngineConfig, PolicyEngine
from forgejax.types import SampleRequest, SamplingLaw, TokenIds
from tests.models.ours import load

FOLDER = Path(__file__).parents[2] / ".cache/smollm2-135m-instruct"
DRAWN = 64
_DEADLINE_S = 150.0

CHATS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "What is the capital of France?"}],
    [{"role": "user", "content": "Add 17 and 25. Show each step."}],
    [{"role": "user", "content": "Write a haiku about the sea.\n\nNo title, please."}],
    [{"role": "user", "content": "def add(a, b):\n    return a - b\n\nWhat is wrong here?"}],
    [{"role": "system", "content": "You answer in one sentence."}, {"role": "user", "content": "Why is the sky blue?"}],
    [{"role": "user", "content": "Wie heißt die größte Stadt in Österreich? 🏔️"}],
    [{"role": "user", "content": "List 3 primes above 1000, separated by commas."}],
    [
        {"role": "user", "content": "My name is Ada."},
        {"role": "assistant", "content": "Nice to meet you, Ada."},
        {"role": "user", "content": "What is my name?"},
    ],
    [{"role": "user", "content": '{"task": "translate", "to": "es", "text": "good morning"}'}],
    [{"role": "user", "content": "Tell me a short story about a fox who learns to count to ten."}],
]


@pytest.fixture(scope="module")
def folder() -> Path:
    if not (FOLDER / "config.json").is_file():
        pytest.fail(f"{FOLDER} is missing: `make parity` fetches it, or scripts/fetch_model.py smollm2 --out {FOLDER}")
    return FOLDER


def _prompts(folder: Path) -> list[TokenIds]:
    chat = ChatFormat.load(folder)
    return [np.array(chat.render(messages), np.int32) for messages in CHATS]


def test_chats_become_the_ids_that_transformers_renders(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    theirs = [
        tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
        for messages in CHATS
    ]

    assert [prompt.tolist() for prompt in _prompts(folder)] == theirs


def test_greedy_tokens_are_those_of_transformers(folder: Path) -> None:
    """All chats at once through the engine's cache. transformers reads each chat with what we drew: the tokens are its
    own greedy ones iff every one of them has its highest logit. Two chats it also generates by itself, token by token.
    """
    prompts = _prompts(folder)
    drawn = _ours(folder, prompts)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()

    for messages, prompt, mine in zip(CHATS, prompts, drawn, strict=True):
        assert mine.tolist() == _highest(model, prompt, mine), messages
    assert drawn[0].tolist() == _generated(model, prompts[0])
    assert drawn[-1].tolist() == _generated(model, prompts[-1])
    assert [len(tokens) for tokens in drawn] == [DRAWN] * len(CHATS)
    assert len({tuple(tokens.tolist()) for tokens in drawn}) == len(CHATS)


def _ours(folder: Path, prompts: Sequence[TokenIds]) -> list[TokenIds]:
    config, params = load(folder)
    settings = EngineConfig(slots=len(CHATS), max_context=256, prefill_buckets=(64,))
    with Driver(PolicyEngine(config, settings), params) as driver:
        waiting = [
            driver.submit(
                SampleRequest(
                    request_id=f"chat-{index}",
                    prompt_ids=prompt,
                    max_tokens=DRAWN,
                    law=SamplingLaw(temperature=0.0),
                )
            )
            for index, prompt in enumerate(prompts)
        ]
        return [future.result(_DEADLINE_S).token_ids for future in waiting]


def _highest(model: PreTrainedModel, prompt: TokenIds, drawn: TokenIds) -> list[int]:
    """At each place of ``drawn``, the token of the highest logit after all that comes before."""
    ids = torch.from_numpy(np.concatenate([prompt, drawn])).long()
    with torch.no_grad():
        logits_TV = model(ids[None], logits_to_keep=DRAWN + 1).logits[0]
    best: list[int] = logits_TV[:-1].argmax(dim=-1).tolist()
    return best


def _generated(model: PreTrainedModel, prompt: TokenIds) -> list[int]:
    model.generation_config.eos_token_id = None  # all of the tokens are compared, also those behind a stop
    ids = torch.from_numpy(prompt).long()[None]
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=DRAWN, do_sample=False)
    tokens: list[int] = out[0, len(prompt) :].tolist()
    return tokens
