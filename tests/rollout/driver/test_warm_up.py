"""What is compiled before anybody waits for it."""

from forgejax.rollout import EngineConfig, make_warm_ups


def test_every_prefill_length_and_every_number_of_busy_slots_is_asked_for_within_the_context() -> None:
    config = EngineConfig(slots=32, max_context=64, prefill_buckets=(8, 16, 60))
    batches = make_warm_ups(config, "a")
    requests = [request for batch in batches for request in batch]

    assert [len(batch) for batch in batches] == list(config.decode_rows) == [2, 8, 32]
    assert {len(request.prompt_ids) for request in requests} == {9, 17, 56}
    assert all(len(request.prompt_ids) + request.max_tokens <= 64 for request in requests)
    assert len({request.request_id for request in requests}) == len(requests)
    assert {request.purpose for request in requests} == {"probe"}
    assert all(request.grammar is None for request in requests)


def test_with_grammars_every_number_of_busy_slots_is_asked_for_under_masks_as_well() -> None:
    config = EngineConfig(slots=4, prefill_buckets=(8,))
    batches = make_warm_ups(config, "a", grammars=True)
    asked = [(len(batch), {request.grammar is not None for request in batch}) for batch in batches]
    assert asked == [(1, {False}), (4, {False}), (1, {True}), (4, {True})]
    ids = [request.request_id for batch in batches for request in batch]
    assert len(set(ids)) == len(ids)


def test_with_drafts_some_are_asked_for_beside_masks_and_there_are_tokens_for_steps_of_both_kinds() -> None:
    config = EngineConfig(slots=4, prefill_buckets=(8,), speculation="prompt_lookup", draft_tokens=4)
    batches = make_warm_ups(config, "a", grammars=True)
    assert [request.grammar is not None for request in batches[3]] == [True, False, True, False]
    assert {request.max_tokens for batch in batches for request in batch} == {18}
