"""``generate`` of transformers on torch, with its cache, for ``rollout.py``: runs in an environment of its own.

Each round is one batch, prompts padded on the left; keys and values are cached within a call, as callers of
``generate`` have it. No log-probabilities are computed.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from sides.batches import Ids, answer_lines, take_stdout
from transformers import AutoModelForCausalLM


def main(folder: Path, replies: int) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32).eval()

    @torch.inference_mode()
    def sample(prompts: list[Ids], drawn: int) -> Sequence[Ids]:
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        out = model.generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=drawn,
            min_new_tokens=drawn,
            eos_token_id=None,
            pad_token_id=0,
            use_cache=True,
        )
        found: list[Ids] = out[:, width:].tolist()
        return found

    @torch.inference_mode()
    def score(ids: Ids) -> list[float]:
        row = torch.tensor([ids])
        logp = torch.log_softmax(model(input_ids=row).logits[0, :-1], dim=-1)
        found: list[float] = logp.gather(1, row[0, 1:, None])[:, 0].tolist()
        return found

    answer_lines(folder, sample, score, replies)


if __name__ == "__main__":
    main(Path(sys.argv[1]), take_stdout())
