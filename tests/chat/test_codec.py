from __future__ import annotations

import random

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from forgejax.chat import ChatFormat
from forgejax.chat.codec import TextCodec

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


def test_the_bytes_of_a_vocabulary_joined_are_the_text_and_hidden_tokens_have_none(chat_format: ChatFormat) -> None:
    codec = chat_format.codec
    spelled = codec.spell_vocabulary()
    text = f"{TEXT}<tool_call>"
    assert b"".join(spelled[id_] for id_ in codec.encode(text)) == text.encode()
    assert len(spelled) == codec.vocab_size and spelled[chat_format.end_of_turn_id] == b""
    assert sorted(each for each in spelled if len(each) == 1) == [bytes([byte]) for byte in range(256)]


def test_a_vocabulary_that_writes_spaces_as_signs_is_spelled_with_spaces() -> None:
    words = {"▁": 0, "a": 1, "▁a": 2, "b": 3, "▁ab": 4, "<0xC3>": 5, "<0xA9>": 6, "{": 7}
    merges = [("▁", "a"), ("▁a", "b")]
    tokenizer = Tokenizer(models.BPE(words, merges, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(parts)
    tokenizer.add_special_tokens([AddedToken("<end>", special=True)])
    codec = TextCodec(tokenizer, tokenizer, tokenizer, {"<end>"})
    assert codec.spell_vocabulary() == [b" ", b"a", b" a", b"b", b" ab", b"\xc3", b"\xa9", b"{", b""]
