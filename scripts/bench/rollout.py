"""Sampled tokens per second of groups and agents, beside the samplers of others; what was and had to be prefilled.

Each pass begins with nothing cached. Peers draw the same lengths behind the same prompts from the same FP32 weights, in
turns with ours, in batches: a round of the case at once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import numpy as np
import tyro
from _harness import medians, show
from _rollout_cases import WORKLOADS, Workload
from _rollout_play import Played, Player, fit_engine, serving
from _step_cases import MODELS
from sides.rollout import PeerName, RolloutPeer

from forgejax.models import init_params
from forgejax.types import Completion

_AGREES = 1e-3  # the largest difference of a peer's log-probs from ours


@dataclass(frozen=True, kw_only=True)
class Options:
    """Which case (left out: all of them, one after another), of which policy, beside whom.

    ``peer_python``: the interpreter that has the peers; by default each is installed on its first call. ``engines``:
    server processes on this machine, where there are to be several.
    """

    case: Literal["", "group", "agent", "ragged", "unique", "republish"] = ""
    model: Literal["tiny", "20m", "135m"] = "tiny"
    peer: tuple[PeerName, ...] = ()
    peer_python: str = ""
    engines: int = 1
    repeats: int = 3
    json: bool = False


def run_case(name: str, options: Options) -> dict[str, Any]:
    """Medians of passes that took turns."""
    policy = MODELS[options.model]
    workload, params = WORKLOADS[name](policy.vocab_size), init_params(policy)
    config = fit_engine(workload, options.engines)
    with contextlib.ExitStack() as stack:
        peers = {
            peer: stack.enter_context(RolloutPeer(peer, options.peer_python, policy, params, workload))
            for peer in options.peer
        }
        player = Player(stack.enter_context(serving(policy, config, params, options.engines)), params, workload)
        passes = [player.play()]  # compiles

        def play() -> float:
            passes.append(player.play())
            return passes[-1].seconds

        for peer in peers.values():
            check_peer(peer, passes[0].served[0].completion)
            peer.play()  # compiles
        runs: list[Callable[[], float]] = [play, *(peer.play for peer in peers.values())]
        ours_s, *peers_s = medians(runs, options.repeats)
    result = {"case": name, "model": options.model, "engines": options.engines, **figures(passes[1:], workload)}
    for peer_name, seconds in zip(peers, peers_s, strict=True):
        result |= {f"{peer_name}_tok_per_s": workload.drawn / seconds}
    if peers_s:
        result |= {"peer_tok_per_s": workload.drawn / min(peers_s), "ratio": min(peers_s) / ours_s}
    return result


def figures(passes: Sequence[Played], workload: Workload) -> dict[str, Any]:
    """Medians of what each pass says; times of tokens are those of all passes together."""

    def middle(figure: Callable[[Played], float]) -> float:
        return float(np.median([figure(each) for each in passes]))

    first = np.concatenate([each.first_tokens for each in passes])
    between = np.concatenate([each.between_tokens for each in passes])
    computed, ideal = middle(lambda each: each.computed), middle(lambda each: each.ideal)
    return {
        "tok_per_s": workload.drawn / middle(lambda each: each.seconds),
        "prefill_tokens_computed": int(computed),
        "prefill_tokens_ideal": int(ideal),
        "prefill_over_ideal": computed / ideal,
        "hit_rate": middle(lambda each: each.cached / each.prompt),
        "ttft_p50": float(np.percentile(first, 50)),
        "ttft_p99": float(np.percentile(first, 99)),
        "itl_p50": float(np.percentile(between, 50)),
        "itl_p99": float(np.percentile(between, 99)),
    }


def check_peer(peer: RolloutPeer, ours: Completion) -> None:
    """Raises SystemExit unless the peer gives our tokens the log-probs that they were drawn with."""
    ids = np.concatenate([ours.prompt_ids, ours.token_ids])
    theirs = np.asarray(peer.score(ids)[len(ours.prompt_ids) - 1 :])
    if (gap := float(np.abs(theirs - ours.logprobs).max())) > _AGREES:
        raise SystemExit(f"the peer's log-probs are not ours: they differ by up to {gap:.2g}")


def main(options: Options) -> None:
    jax.config.update("jax_platforms", "cpu")
    for name in [options.case] if options.case else WORKLOADS:
        show(run_case(name, options), options.json)


if __name__ == "__main__":
    main(tyro.cli(Options))
