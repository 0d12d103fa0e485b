"""Text <-> token ids, with the special tokens of a chat template kept apart from the text around them."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence

from tokenizers import Tokenizer

from forgejax.chat.piece_cache import PieceCache

QUOTE = "\ufdd0"
"""A Unicode noncharacter put inside a control token's spelling that came from a user, so that it stays plain text."""

_REPLACEMENT = "\ufffd"
_HOLD_LIMIT = 64
_LONG_CHARACTERS = 2_000
_CACHE_BYTES = 32 * 1024 * 1024
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TextCodec:
    """Encodes rendered chats and decodes sampled ids.

    ``tokenizer`` finds its added tokens in text; ``first`` and ``inner`` are the same tokenizer without any, as it
    encodes text at the very beginning and text behind an added token. Encoding cuts the text at the added tokens and
    encodes each piece for itself, so pieces that come back (system prompts, tool schemas) are remembered. Ids of
    ``hidden`` spellings are left out of decoded text. Thread-safe.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        first: Tokenizer,
        inner: Tokenizer,
        hidden: Collection[str],
        cache_bytes: int = _CACHE_BYTES,
    ) -> None:
        self._tokenizer = tokenizer
        self._first = first
        self._inner = inner
        self._control_ids = {token.content: id_ for id_, token in tokenizer.get_added_tokens_decoder().items()}
        self._control = _any_of(self._control_ids)
        self._hidden_control = _any_of(hidden)
        self._hidden = frozenset(self._control_ids[spelling] for spelling in hidden)
        self._all_ids = frozenset(self._control_ids.values())
        self.vocab_size = 1 + max(tokenizer.get_vocab(with_added_tokens=True).values())
        self._byte_level = b'"ByteLevel"' in tokenizer.decoder.__getstate__() if tokenizer.decoder else False
        self._cache = PieceCache(cache_bytes)

    def encode(self, text: str, *, at_start: bool = True) -> list[int]:
        """The ids of a rendered text; control tokens spelled with ``QUOTE`` inside become ordinary text.

        ``at_start`` is False for text that goes on behind a control token.
        """
        ids: list[int] = []
        for index, piece in enumerate(self._control.split(text)):
            if index % 2:
                ids.append(self._control_ids[piece])
            elif piece and index == 0 and at_start and self._first is not self._inner:
                ids.extend(self._encode_plain(self._first, piece.replace(QUOTE, "")))
            elif piece:
                ids.extend(self._encode_inner(piece.replace(QUOTE, "")))
        return ids

    def quote(self, text: str) -> str:
        """``text`` with every control token's spelling made plain text."""
        return _quote(self._control, text)

    def quote_hidden(self, text: str) -> str:
        """``text`` with the spellings of hidden tokens made plain text; decoded text holds no others of its own."""
        return _quote(self._hidden_control, text)

    def find_control(self, text: str) -> str | None:
        """The spelling of the first control token in ``text``."""
        found = self._control.search(text)
        return None if found is None else found[0]

    def find_hidden(self, text: str, start: int) -> tuple[str, int] | None:
        """The first hidden token in ``text`` from ``start`` on: its spelling and where it begins."""
        found = self._hidden_control.search(text, start)
        return None if found is None else (found[0], found.start())

    @property
    def spellings(self) -> Collection[str]:
        """Every control token's."""
        return self._control_ids.keys()

    def find_control_id(self, spelling: str) -> int:
        return self._control_ids[spelling]

    def drop_hidden(self, ids: Iterable[int]) -> list[int]:
        return [id_ for id_ in map(int, ids) if id_ not in self._hidden]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ``ids`` without hidden ones; bytes that are no UTF-8 become U+FFFD."""
        return self._tokenizer.decode(self.drop_hidden(ids), skip_special_tokens=False)

    def decode_token(self, id_: int) -> str:
        """One token as text, hidden or not."""
        return self._tokenizer.decode([id_], skip_special_tokens=False)

    def spell_token(self, id_: int) -> bytes:
        """The bytes one token stands for, which may be a part of a character."""
        token = self._tokenizer.id_to_token(id_) or ""
        if id_ in self._all_ids:
            return token.encode()
        if self._byte_level:
            return bytes(_BYTE_OF[character] for character in token)
        byte = _BYTE_TOKEN.fullmatch(token)
        if byte:
            return bytes([int(byte[1], 16)])
        # Behind itself, for some decoders leave out the space that a text begins with.
        alone = self.decode_token(id_)
        return self._tokenizer.decode([id_, id_], skip_special_tokens=False)[len(alone) :].encode()

    def spell_vocabulary(self) -> list[bytes]:
        """The bytes of every token, none for hidden ones: what masks over the vocabulary are made from."""
        return [b"" if id_ in self._hidden else self.spell_token(id_) for id_ in range(self.vocab_size)]

    def _encode_inner(self, piece: str) -> Sequence[int]:
        ids = self._cache.get(piece)
        if ids is None:
            ids = self._encode_plain(self._inner, piece)
            self._cache.put(piece, ids)
        return ids

    def _encode_plain(self, tokenizer: Tokenizer, piece: str) -> list[int]:
        if len(piece) < _LONG_CHARACTERS:
            ids: list[int] = tokenizer.encode(piece, add_special_tokens=False).ids
        else:  # ``encode`` keeps every other thread waiting for as long as it takes; a batch does not
            ids = tokenizer.encode_batch_fast([piece], add_special_tokens=False)[0].ids
        if self._all_ids.isdisjoint(ids) or len(piece) < 2:
            return ids
        # The vocabulary itself spells a control token (Unigram's does): cut until the words are words again.
        half = len(piece) // 2
        return self._encode_plain(tokenizer, piece[:half]) + self._encode_plain(self._inner, piece[half:])


class StreamDecoder:
    """Decodes ids as they are drawn; a character whose bytes are not all there waits for the next id."""

    def __init__(self, codec: TextCodec) -> None:
        self._codec = codec
        self._context: list[int] = []
        self._pending: list[int] = []

    def push(self, ids: Sequence[int]) -> str:
        self._pending += self._codec.drop_hidden(ids)
        text = self._text()
        if text.endswith(_REPLACEMENT) and len(self._pending) <= _HOLD_LIMIT:
            return ""
        # The last ids stay as context: some decoders treat the first token of a text unlike the others.
        self._context, self._pending = self._pending[-1:] or self._context, []
        return text

    def finish(self) -> str:
        """What was held back; an unfinished character becomes U+FFFD."""
        text, self._pending = self._text(), []
        return text

    def _text(self) -> str:
        if not self._pending:
            return ""
        # A context that is itself no whole character (the hold limit was reached) must not join what follows.
        before = self._codec.decode(self._context)
        if before.endswith(_REPLACEMENT):
            return self._codec.decode(self._pending)
        return self._codec.decode(self._context + self._pending)[len(before) :]


def _any_of(spellings: Iterable[str]) -> re.Pattern[str]:
    longest_first = sorted(spellings, key=len, reverse=True)
    return re.compile("(" + "|".join(map(re.escape, longest_first)) + ")" if longest_first else "(?!)")


def _quote(control: re.Pattern[str], text: str) -> str:
    text = text.replace(QUOTE, "")
    return control.sub(lambda found: found[0][0] + QUOTE + found[0][1:], text)


def _spell_bytes() -> dict[str, int]:
    """GPT-2's alphabet, in which byte-level tokens are written: printable Latin-1 is itself, the other bytes follow."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(others)}


_BYTE_OF = _spell_bytes()
