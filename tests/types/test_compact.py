import numpy as np
import pytest

from forgejax.types.compact import Tip, Tips, count_shared, pack_ids, unpack_ids


def ids(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


@pytest.mark.parametrize(
    ("values", "size"),
    [((), 1), ((0, 65535), 5), ((65536,), 4), ((1, 2**24 - 1), 7), ((2**24,), 5), ((-1, 3), 9), ((2**31 - 1,), 5)],
)
def test_ids_take_two_three_or_four_bytes_and_come_back(values: tuple[int, ...], size: int) -> None:
    packed = pack_ids(ids(*values))
    assert len(packed) == size
    found = unpack_ids(packed)
    assert found.dtype == np.int32 and found.tolist() == list(values)


@pytest.mark.parametrize("packed", [b"", b"\x02\x00", b"\x03\x00\x00", b"\x05" + bytes(5), b"\x00"])
def test_bytes_that_are_no_packed_ids_are_refused(packed: bytes) -> None:
    with pytest.raises(ValueError, match="no packed token ids"):
        unpack_ids(packed)


@pytest.mark.parametrize("size", [0, 1, 255, 256, 257, 5000])
def test_what_is_shared_is_counted_to_the_first_difference(size: int) -> None:
    a = np.arange(6000, dtype=np.int32)
    b = a.copy()
    b[size] = -1
    assert count_shared(a, b) == count_shared(b, a) == size
    assert count_shared(a, a[:size]) == size


def test_a_prompt_is_what_it_adds_to_the_sequence_it_begins_with_most() -> None:
    tips: Tips[str] = Tips(limit=3)
    first, long = np.arange(20, dtype=np.int32), np.arange(100, 140, dtype=np.int32)
    assert tips.add(Tip(key="a", prompt_ids=first, sampled_ids=ids(7, 8))) == (None, 0)
    continued = np.concatenate([first, ids(7, 8, 50)])
    assert tips.add(Tip(key="b", prompt_ids=continued, sampled_ids=ids(9))) == ("a", 22)
    stripped = np.concatenate([first, ids(8, 60)])  # what was sampled before has been cut
    assert tips.add(Tip(key="c", prompt_ids=stripped, sampled_ids=ids(1))) == ("b", 20)
    assert tips.add(Tip(key="d", prompt_ids=long, sampled_ids=ids(1))) == (None, 0)
    assert tips.add(Tip(key="e", prompt_ids=np.append(stripped, 1), sampled_ids=ids())) == ("c", 23)
    assert tips.ids == (23 + 1) + 41 + 23  # "a" lies in "b", and "c" in "e"
    assert tips.add(Tip(key="f", prompt_ids=ids(3, 4), sampled_ids=ids(1))) == (None, 0)
    assert tips.add(Tip(key="g", prompt_ids=continued, sampled_ids=ids(2))) == ("e", 20)  # "b" is too long ago
