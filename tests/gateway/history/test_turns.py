"""Turns as they are kept."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from forgejax.gateway.history.conversation import Branch
from forgejax.gateway.history.turns import judge_untrainable, name_branch, renumber_turns
from forgejax.types import Completion, FinishReason, Grammar, SampleRequest, SamplingLaw, Turn

IDS = np.asarray([1, 2], np.int32)


def drawn(law: SamplingLaw) -> Completion:
    zeros = np.zeros(2, np.int32)
    return Completion(
        request_id="r",
        prompt_ids=IDS,
        token_ids=IDS,
        logprobs=np.zeros(2, np.float32),
        versions=zeros,
        oldest_versions=zeros,
        law=law,
        finish_reason=FinishReason.LENGTH,
    )


def kept(number: int, parent: int | None = None, untrainable: str | None = None) -> Turn:
    return Turn(
        index=number,
        completion=drawn(SamplingLaw()),
        parent=parent,
        requested_at=0.0,
        finished_at=1.0,
        requested_law=SamplingLaw(),
        untrainable=untrainable,
    )


def test_numbers_close_up_over_requests_without_a_token_and_parents_go_with_them() -> None:
    turns = renumber_turns({5: kept(5, parent=2), 2: kept(2), 7: kept(7, parent=4)}, set())
    assert [(turn.index, turn.parent) for turn in turns] == [(0, None), (1, 0), (2, None)]


def test_an_answer_nobody_read_is_undelivered_unless_a_later_turn_goes_on_from_it_or_it_had_a_reason() -> None:
    turns = {0: kept(0), 1: kept(1, parent=0), 2: kept(2, untrainable="cancelled")}
    reasons = [turn.untrainable for turn in renumber_turns(turns, {0, 1, 2})]
    assert reasons == [None, "undelivered", "cancelled"]


def test_what_was_cut_or_masked_or_drawn_from_a_truncated_law_is_not_trained_on() -> None:
    def ask(grammar: Grammar | None) -> SampleRequest:
        return SampleRequest(
            request_id="r", session_id="s", prompt_ids=IDS, max_tokens=4, stop_ids=frozenset({3}), grammar=grammar
        )

    plain, cut = drawn(SamplingLaw()), drawn(SamplingLaw(top_k=5))
    bound = ask(Grammar(schema="{}"))
    assert judge_untrainable(ask(None), plain, False) is None
    assert judge_untrainable(bound, cut, True) == "cancelled"
    assert judge_untrainable(bound, cut, False) == "grammar"
    assert judge_untrainable(ask(None), cut, False) == "sampling_law"


@pytest.mark.parametrize(
    ("found", "body", "named"),
    [
        ("history", {"metadata": {"branch": "sliding_window"}}, "sliding_window"),
        (None, {"metadata": {"branch": "drop_tool_output"}}, "drop_tool_output"),
        ("template", {"metadata": {"branch": "sliding_window"}}, "template"),
        ("history", {"metadata": {"branch": "Not a name"}}, "history"),
        ("history", {"metadata": {"branch": 3}}, "history"),
        ("history", {"metadata": "branch"}, "history"),
        ("history", {"metadata": {"branch": "a" * 33}}, "history"),
        (None, {}, None),
    ],
)
def test_a_branch_has_the_reason_that_the_agent_tells(found: Branch | None, body: dict[str, Any], named: str) -> None:
    assert name_branch(found, body) == named
