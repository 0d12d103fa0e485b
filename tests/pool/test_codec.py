import dataclasses
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forgejax.errors import PoolError
from forgejax.pool.codec import decode_group, encode_group
from forgejax.types import Dispatch, Group, Reward, StopReason
from forgejax.types.episode import RewardKind
from tests.pool.samples import group_of, tree_group

DISPATCH = Dispatch(index=7, attempt=2, version=5)


def assert_same(left: object, right: object) -> None:
    """Equal in every field, arrays in dtype, shape and bits (NaN included)."""
    assert type(left) is type(right)
    if isinstance(left, np.ndarray) and isinstance(right, np.ndarray):
        assert left.dtype == right.dtype and left.shape == right.shape and left.tobytes() == right.tobytes()
    elif dataclasses.is_dataclass(left):
        for field in dataclasses.fields(left):
            assert_same(getattr(left, field.name), getattr(right, field.name))
    elif isinstance(left, tuple) and isinstance(right, tuple):
        assert len(left) == len(right)
        for a, b in zip(left, right, strict=True):
            assert_same(a, b)
    elif isinstance(left, dict) and isinstance(right, dict):
        assert list(left) == list(right)
        for key in left:
            assert_same(left[key], right[key])
    else:
        assert left == right


def test_a_group_comes_back_bit_for_bit() -> None:
    group = group_of(DISPATCH, tokens=4)
    logprobs = np.array([-0.1, np.nan, -np.inf, np.float32(-1e-38)], np.float32)
    turn = group.trajectories[0].turns[0]
    completion = dataclasses.replace(turn.completion, logprobs=logprobs, queued_s=0.1 + 0.2)
    trajectory = dataclasses.replace(
        group.trajectories[0],
        turns=(dataclasses.replace(turn, completion=completion, untrainable="truncated law"),),
        stop_reason=StopReason.DEADLINE,
        answer="größer\x00",
        masked="environment",
    )
    payload = {
        "board": np.arange(6, dtype=np.uint8).reshape(2, 3),
        "empty": np.zeros((0, 4), np.float64),
        "half": np.array(1.5, np.float16),
        "seed": 2**63 + 1,
        "list": [1, 2.5, None, "x", b"y", {"z": True}],
    }
    task = dataclasses.replace(group.task, payload=payload)
    group = dataclasses.replace(group, task=task, trajectories=(trajectory,), baseline_s=1 / 3)
    assert_same(decode_group(encode_group(group), index=7), group)


def test_an_array_that_is_not_contiguous_keeps_its_values() -> None:
    group = group_of(DISPATCH)
    task = dataclasses.replace(group.task, payload={"a": np.arange(12, dtype=">i8").reshape(3, 4).T[::2]})
    array = decode_group(encode_group(dataclasses.replace(group, task=task)), index=7).task.payload["a"]
    assert array.dtype == np.dtype(">i8")
    assert array.tolist() == [[0, 4, 8], [2, 6, 10]]


def test_a_numpy_scalar_becomes_the_number_it_is() -> None:
    float_like: Any = np.float32(0.1)
    group = dataclasses.replace(group_of(DISPATCH), baseline_s=float_like)
    assert decode_group(encode_group(group), index=7).baseline_s == float(np.float32(0.1))


@pytest.mark.parametrize("value", [object(), {1, 2j}, np.array([object()]), 2**70])
def test_what_would_not_come_back_is_refused(value: object) -> None:
    group = group_of(DISPATCH)
    unstorable: Group = dataclasses.replace(group, task=dataclasses.replace(group.task, payload={"a": value}))
    with pytest.raises(PoolError, match=r"group 7 \(task t7\) cannot be stored"):
        encode_group(unstorable)


def test_keys_that_would_not_come_back_are_refused_before_the_group_is_accepted() -> None:
    keyed: Any = {1: "a"}
    group = dataclasses.replace(group_of(DISPATCH), task=dataclasses.replace(group_of(DISPATCH).task, payload=keyed))
    with pytest.raises(PoolError, match=r"cannot be stored: the keys of its task payload are \[1\]"):
        encode_group(group)


def test_an_answer_that_no_utf8_can_hold_does_not_end_the_run() -> None:
    group = group_of(DISPATCH)
    odd = dataclasses.replace(group.trajectories[0], answer="7\ud800 \N{SNOWMAN}", error="\udcff")
    decoded = decode_group(encode_group(dataclasses.replace(group, trajectories=(odd,))), index=7)
    assert decoded.trajectories[0].answer == "7\\ud800 \N{SNOWMAN}"
    assert decoded.trajectories[0].error == "\\udcff"
    assert_same(decoded.trajectories[0].turns, group.trajectories[0].turns)


def test_rewards_of_every_kind_come_back() -> None:
    group, rewards = group_of(DISPATCH), tuple(Reward(kind=kind, value=-0.5, at=2.0) for kind in get_args(RewardKind))
    group = dataclasses.replace(group, trajectories=(dataclasses.replace(group.trajectories[0], rewards=rewards),))
    assert_same(decode_group(encode_group(group), index=7), group)


def test_any_damaged_byte_is_noticed_and_the_group_named() -> None:
    data = encode_group(group_of(DISPATCH, tokens=2))
    for position in range(0, len(data), 7):
        damaged = data[:position] + bytes([data[position] ^ 0x10]) + data[position + 1 :]
        with pytest.raises(PoolError, match="group 7"):
            decode_group(damaged, index=7)
    for length in (0, 3, 8, len(data) - 1):
        with pytest.raises(PoolError, match="group 7"):
            decode_group(data[:length], index=7)


def test_the_bytes_of_another_group_are_refused() -> None:
    with pytest.raises(PoolError, match="group 8: its stored bytes are those of group 7"):
        decode_group(encode_group(group_of(DISPATCH)), index=8)


@pytest.mark.parametrize("turns", [1, 8, 50])
def test_a_token_takes_three_bytes_for_its_id_and_four_for_its_log_prob_at_any_number_of_turns(turns: int) -> None:
    chain = [None, *range(turns - 1)]
    group = tree_group(DISPATCH, [chain, chain], tokens=2000, prompt=500, told=100, vocab=150_000)
    new = 500 + 2 * 100 * (turns - 1)  # the first prompt is stored once for both members
    described = 500 * 2 * turns + 500  # what is said of each turn beside its arrays
    assert len(encode_group(group)) < 7 * group.sampled_tokens + 3 * new + described


def test_decoded_prompts_that_continue_each_other_share_their_memory() -> None:
    group = tree_group(DISPATCH, [[None, 0, 1]], tokens=5, prompt=20, told=4, vocab=100)
    turns = decode_group(encode_group(group), index=7).trajectories[0].turns
    for turn in turns[:-1]:
        assert np.shares_memory(turn.completion.prompt_ids, turns[-1].completion.prompt_ids)
        assert np.shares_memory(turn.completion.token_ids, turns[-1].completion.prompt_ids)
    assert not turns[0].completion.prompt_ids.flags.writeable


_episode = st.lists(st.integers(0, 3), max_size=5).map(
    lambda picks: [None, *(None if pick == 0 else max(0, number - pick) for number, pick in enumerate(picks))]
)


@settings(max_examples=50, deadline=None)
@given(
    episodes=st.lists(_episode, min_size=1, max_size=3),
    tokens=st.integers(0, 12),
    told=st.integers(0, 12),
    vocab=st.sampled_from([2, 2**16 - 1, 2**16 + 9, 2**24 + 9, 2**31 - 1]),
)
def test_any_tree_of_turns_comes_back(episodes: list[list[int | None]], tokens: int, told: int, vocab: int) -> None:
    group = tree_group(DISPATCH, episodes, tokens=tokens, prompt=9, told=told, vocab=vocab)
    assert_same(decode_group(encode_group(group), index=7), group)


def test_arrays_of_another_kind_than_a_completion_declares_are_refused() -> None:
    group = group_of(DISPATCH)
    turn = group.trajectories[0].turns[0]
    for odd in (np.zeros(3, np.int64), np.zeros((3, 1), np.int32), [1, 2, 3]):
        completion: Any = dataclasses.replace(turn.completion, token_ids=odd)  # type: ignore[arg-type]
        trajectory = dataclasses.replace(
            group.trajectories[0], turns=(dataclasses.replace(turn, completion=completion),)
        )
        with pytest.raises(PoolError, match="expected int32 with one dimension"):
            encode_group(dataclasses.replace(group, trajectories=(trajectory,)))
