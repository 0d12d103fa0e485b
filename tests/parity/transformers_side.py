"""The families as transformers runs them on torch: small models, their logits, and CISPO gradients by autograd.

Runs in the environment of ``make parity`` alone.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from forgejax.learner import Sample
from tests.models.ours import stored
from tests.models.recipe import VOCABULARY, Tensors, write_folder

torch.set_num_threads(1)  # sums in one order on every machine
logging.disable_progress_bar()

_EPS_HIGH = 4.0

_SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0},
    "tie_word_embeddings": False,
}
_EXPERTS: dict[str, Any] = {"head_dim": 8, "num_experts_per_tok": 2}

FAMILIES: dict[str, dict[str, Any]] = {
    # Wavelengths of 6 to 200 tokens: llama3 keeps the first, blends two and stretches the last.
    "llama3": _SHAPE
    | {"model_type": "llama", "head_dim": 8}
    | {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 100.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
    "llama_linear": _SHAPE
    | {
        "model_type": "llama",
        "rope_parameters": {"rope_type": "linear", "rope_theta": 100.0, "factor": 4.0},
        "tie_word_embeddings": True,
    },
    "llama_yarn": _SHAPE
    | {"model_type": "llama", "head_dim": 16}
    | {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
    "smollm2": _SHAPE
    | {
        "model_type": "llama",
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
    },
    "qwen2": _SHAPE | {"model_type": "qwen2"},
    "qwen3": _SHAPE | {"model_type": "qwen3", "head_dim": 16, "tie_word_embeddings": True},
    "qwen3_moe": _SHAPE
    | _EXPERTS
    | {"model_type": "qwen3_moe", "num_experts": 8, "moe_intermediate_size": 20, "norm_topk_prob": True},
    "minimax_m2": _SHAPE
    | _EXPERTS
    | {"model_type": "minimax_m2", "num_local_experts": 8, "rotary_dim": 4, "num_experts_per_tok": 3},
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Figures:
    """What transformers gives for a family.

    Attributes:
        config: its ``config.json``.
        shapes: every stored tensor's.
        logits_TV: of ``recipe.tokens()``.
        gradients: of the CISPO loss on ``recipe.groups()``, by stored name.
        loss: its value.
        clipped: how many of its terms have a clipped ratio.
        margin: the least distance between the last expert chosen and the first one not, over all layers and tokens of
            both inputs; infinite without experts.
    """

    config: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    logits_TV: NDArray[np.float32]
    gradients: Tensors
    loss: float
    clipped: int
    margin: float


def load_model(folder: Path) -> PreTrainedModel:
    """The model of a folder in FP32 with plain attention and experts; every tensor must find its place."""
    model, report = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",
        output_loading_info=True,
    )
    astray = {kind: names for kind, names in report.items() if names}
    if astray:
        raise ValueError(f"transformers finds faults in the weights of {folder}: {astray}")
    return model.eval()


def make_folder(family: str, out: Path) -> PreTrainedModel:
    """A family's model with drawn weights, saved to ``out`` by ``save_pretrained``."""
    with TemporaryDirectory() as scratch:
        first, drawn = Path(scratch, "first"), Path(scratch, "drawn")
        settings = FAMILIES[family]
        AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings)).save_pretrained(first)
        shapes = {name: value.shape for name, value in stored(first).items()}
        model = load_model(write_folder(drawn, json.loads((first / "config.json").read_text()), shapes))
    model.save_pretrained(out)
    return model


def logits(model: PreTrainedModel, tokens_T: NDArray[np.int32]) -> NDArray[np.float32]:
    """Logits [T, V] of one sequence."""
    with torch.no_grad():
        return model(torch.from_numpy(tokens_T).long()[None]).logits[0].numpy()


def figures(
    model: PreTrainedModel, folder: Path, tokens_T: NDArray[np.int32], groups: Sequence[Sequence[Sample]]
) -> Figures:
    """All that is compared. The model's weights are its gradient afterwards."""
    config = json.loads((folder / "config.json").read_text())
    del config["transformers_version"]
    shapes = {name: value.shape for name, value in stored(folder).items()}
    with _router_margins(model) as margins:
        logits_TV = logits(model, tokens_T)
        loss, clipped = _backward(model, groups)
    return Figures(
        config=config,
        shapes=shapes,
        logits_TV=logits_TV,
        gradients=_stored_gradients(model),
        loss=loss,
        clipped=clipped,
        margin=min(margins, default=np.inf),
    )


def _backward(model: PreTrainedModel, groups: Sequence[Sequence[Sample]]) -> tuple[float, int]:
    """Adds up the gradient of the loss, each sample in a forward pass of its own: nothing is merged or packed."""
    total, clipped = 0.0, 0
    for members in groups:
        normaliser = len(groups) * sum(len(sample.token_ids) for sample in members)
        for sample in members:
            logits_TV = model(torch.from_numpy(sample.fed_ids).long()[None]).logits[0] / sample.temperature
            logps = torch.log_softmax(logits_TV[-len(sample.token_ids) :], dim=-1)
            logp = logps.gather(1, torch.from_numpy(sample.token_ids).long()[:, None])[:, 0]
            ratio = torch.exp((logp.detach() - torch.from_numpy(sample.old_logp)).clamp(-20, 20))
            weight = ratio.clamp(max=1.0 + _EPS_HIGH) * sample.advantage
            loss = -(weight * logp).sum() / normaliser
            loss.backward()
            total += float(loss.detach())
            clipped += int((ratio > 1.0 + _EPS_HIGH).sum())
    return total, clipped


def _stored_gradients(model: PreTrainedModel) -> Tensors:
    """The gradients under the names transformers stores weights by: saved in their place. Buffers have none."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.grad if parameter.grad is not None else torch.zeros_like(parameter))
        for buffer in model.buffers():
            buffer.zero_()
    with TemporaryDirectory() as scratch:
        model.save_pretrained(scratch)
        return stored(Path(scratch))


@contextmanager
def _router_margins(model: PreTrainedModel) -> Iterator[list[float]]:
    """Collects, at every call of a router, the least margin of its tokens' choices, as their scores are compared."""
    margins: list[float] = []

    def record(router: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        sigmoid = len(inputs) > 1  # with the correction bias beside the hidden states
        scores = torch.sigmoid(output[0]) + inputs[1] if sigmoid else torch.softmax(output[0], dim=-1)
        best = scores.detach().topk(router.top_k + 1, dim=-1).values
        margins.append(float((best[:, -2] - best[:, -1]).min()))

    routers = [module for module in model.modules() if type(module).__name__.endswith("TopKRouter")]
    handles = [router.register_forward_hook(record) for router in routers]
    try:
        yield margins
    finally:
        for handle in handles:
            handle.remove()
