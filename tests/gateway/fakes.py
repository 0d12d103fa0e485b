"""What the gateway's tests stand on: a small tokenizer folder and an engine that reads its answers from a script."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from forgejax.gateway import ChatFormat, Gateway, GatewayConfig
from forgejax.types import Completion, FinishReason, OnTokens, SampleRequest, SamplingLaw, SessionSpec

HERMES_TEMPLATE = """
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
    {{- 'Tools:' }}
    {%- for tool in tools %}{{- '\\n' + (tool | tojson) }}{%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {{- '<|im_start|>user\\n' + message.content + '<|im_end|>\\n' }}
    {%- elif message.role == 'assistant' %}
        {{- '<|im_start|>assistant\\n' + message.content }}
        {%- for call in message.tool_calls %}
            {%- if message.content or not loop.first %}{{- '\\n' }}{%- endif %}
            {{- '<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
            {{- call.function.arguments | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == 'tool' %}
        {{- '<|im_start|>tool\\n<tool_response>\\n' + message.content + '\\n</tool_response><|im_end|>\\n' }}
    {%- elif message.role != 'system' or not loop.first %}
        {{- raise_exception('no place for a message of role ' + message.role) }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""

CALCULATOR: Any = {
    "type": "function",
    "function": {
        "name": "calculator",
        "description": "Works out an expression.",
        "parameters": {
            "type": "object",
            "properties": {"expression": {"type": "string"}},
            "required": ["expression"],
        },
    },
}


def save_tokenizer(folder: Path, template: str | None = HERMES_TEMPLATE) -> Path:
    """A byte-level BPE of about 400 tokens with Qwen's special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(["user assistant system tool calculator expression the answer is"] * 4, trainer)
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    tokenizer.add_tokens([AddedToken("<tool_call>", normalized=False), AddedToken("</tool_call>", normalized=False)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>")
    fast.chat_template = template
    fast.save_pretrained(folder)
    return folder


class ScriptedSampler:
    """Draws the scripted ids, one by one; the request's stop ids end a reply. Keeps every request it was given."""

    def __init__(self, chat_format: ChatFormat, *replies: str | Sequence[int], delay_s: float = 0.0) -> None:
        self.chat_format = chat_format
        self.script = [chat_format.codec.encode(reply) if isinstance(reply, str) else reply for reply in replies]
        self.delay_s = delay_s
        self.requests: list[SampleRequest] = []
        self.returned: list[Completion] = []

    async def sample(self, request: SampleRequest, on_tokens: OnTokens | None = None) -> Completion:
        self.requests.append(request)
        drawn: list[int] = []
        reason = FinishReason.LENGTH
        for id_ in self.script[len(self.requests) - 1][: request.max_tokens]:
            await asyncio.sleep(self.delay_s)
            drawn.append(id_)
            if (on_tokens is not None and on_tokens([id_])) or id_ in request.stop_ids:
                reason = FinishReason.STOP
                break
        self.returned.append(completion(request, drawn, reason))
        return self.returned[-1]


def completion(request: SampleRequest, ids: Sequence[int], reason: FinishReason) -> Completion:
    return Completion(
        request_id=request.request_id,
        prompt_ids=request.prompt_ids,
        token_ids=np.asarray(ids, np.int32),
        logprobs=(-np.arange(1, len(ids) + 1) / 8).astype(np.float32),
        versions=np.full(len(ids), 3, np.int32),
        oldest_versions=np.full(len(ids), 3, np.int32),
        finish_reason=reason,
        law=request.law,
        cached_tokens=min(4, len(request.prompt_ids)),
    )


async def started(sampler: ScriptedSampler, context_length: int = 4096, **settings: Any) -> Gateway:
    config = GatewayConfig(port=0, **settings)
    gateway = Gateway(sampler, sampler.chat_format, context_length, config)
    await gateway.start()
    return gateway


TRAINING = SessionSpec(law=SamplingLaw(), seed=7)
