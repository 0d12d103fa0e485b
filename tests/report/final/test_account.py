import pytest

from forgejax.report.final.account import close_account, describe_account


def test_an_account_in_which_each_token_has_one_place_closes() -> None:
    assert close_account(sampled=100, trained=70, not_trained={"evaluation": 20, "cancelled": 10}) == 0
    sentence = describe_account(sampled=100, trained=70, not_trained={"evaluation": 20, "cancelled": 10})
    assert sentence == "The account closes: 100 tokens sampled = 70 trained + 30 counted under a reason."


def test_lost_tokens_are_positive_and_the_entry_of_nearest_size_is_named() -> None:
    not_trained = {"evaluation": 500, "in_flight_at_end": 95}
    assert close_account(sampled=1695, trained=1000, not_trained=not_trained) == 100
    sentence = describe_account(sampled=1695, trained=1000, not_trained=not_trained)
    assert "100 sampled tokens (5.90% of those sampled) were neither trained" in sentence
    assert "in_flight_at_end (95)" in sentence


def test_tokens_counted_twice_are_negative() -> None:
    assert close_account(sampled=10, trained=10, not_trained={"evaluation": 4}) == -4
    assert "4 tokens (40.00% of those sampled) were counted more than once" in describe_account(
        sampled=10, trained=10, not_trained={"evaluation": 4}
    )


def test_a_negative_count_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="cancelled is -1"):
        close_account(sampled=1, trained=1, not_trained={"cancelled": -1})
