"""The token account: each sampled token was trained, or is counted under the reason it was not."""

from collections.abc import Mapping


def close_account(*, sampled: int, trained: int, not_trained: Mapping[str, int]) -> int:
    """The open tokens: ``sampled`` less ``trained`` less every count of ``not_trained``. A sound account gives 0.

    A positive figure is tokens that were drawn and then lost sight of, a negative one tokens that were counted twice.
    Raises ValueError for a negative count.
    """
    for name, count in (("sampled", sampled), ("trained", trained), *not_trained.items()):
        if count < 0:
            raise ValueError(f"token account: {name} is {count}; expected a count of tokens, 0 or more")
    return sampled - trained - sum(not_trained.values())


def describe_account(*, sampled: int, trained: int, not_trained: Mapping[str, int]) -> str:
    """The state of the account in plain words; if it is open, names the entry whose size is nearest to the gap."""
    gap = close_account(sampled=sampled, trained=trained, not_trained=not_trained)
    if gap == 0:
        idle = sum(not_trained.values())
        return (
            f"The account closes: {sampled:,} tokens sampled = {trained:,} trained + {idle:,} counted under a reason."
        )
    share = f" ({abs(gap) / sampled:.2%} of those sampled)" if sampled else ""
    entries = {"trained": trained, **not_trained}
    nearest = min(entries, key=lambda name: (abs(entries[name] - abs(gap)), name))
    if gap > 0:
        what = f"{gap:,} sampled tokens{share} were neither trained nor counted under a reason"
        hint = "look first at where tokens like these are counted"
    else:
        what = f"{-gap:,} tokens{share} were counted more than once"
        hint = "look first at whether it overlaps another entry"
    return f"The account is open: {what}. The entry nearest in size is {nearest} ({entries[nearest]:,}): {hint}."
