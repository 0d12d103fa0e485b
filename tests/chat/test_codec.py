from __future__ import annotations

import random

import pytest

from forgejax.chat import ChatFormat

TEXT = "naïve — 你好, мир 🙂👩‍👩‍👧 \ufffd end"


def test_a_character_is_streamed_whole_or_not_at_all(chat_format: ChatFormat) -> None:
    decoder = chat_format.make_decoder()
    pieces = [decoder.push([id_]) for id_ in chat_format.codec.encode(TEXT.replace("\ufffd", ""))]
    assert "".join(pieces) == TEXT.replace("\ufffd", "") and not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("run", [1, 2, 7, 1000])
def test_streamed_text_is_the_decoded_text(chat_format: ChatFormat, run: int) -> None:
    ids = chat_format.codec.encode(TEXT)
    decoder = chat_format.make_decoder()
    streamed = "".join(decoder.push(ids[start : start + run]) for start in range(0, len(ids), run)) + decoder.finish()
    assert streamed == chat_format.decode(ids) == TEXT


def test_ids_that_are_no_utf8_stream_as_they_decode(chat_format: ChatFormat) -> None:
    draw = random.Random(0)
    for _ in range(50):
        ids = [draw.randrange(chat_format.vocab_size) for _ in range(40)]
        decoder = chat_format.make_decoder()
        assert "".join(decoder.push([id_]) for id_ in ids) + decoder.finish() == chat_format.decode(ids)


def test_an_endless_run_of_broken_bytes_is_not_held_back_for_ever(chat_format: ChatFormat) -> None:
    broken = chat_format.codec.encode("é")[-1]  # a continuation byte
    decoder = chat_format.make_decoder()
    streamed = [decoder.push([broken]) for _ in range(500)]
    assert len("".join(streamed)) >= 400
    assert len("".join(streamed) + decoder.finish()) == 500


def test_ids_outside_the_vocabulary_have_no_text(chat_format: ChatFormat) -> None:
    assert chat_format.decode([chat_format.vocab_size + 7]) == ""


def test_a_long_text_is_encoded_as_a_short_one_is(chat_format: ChatFormat) -> None:
    text = "the answer is naïve 🙂 " * 500
    assert chat_format.codec.encode(text) == chat_format.codec._tokenizer.encode(text, add_special_tokens=False).ids
