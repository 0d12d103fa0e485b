"""Text <-> token ids, with the special tokens of a chat template kept apart from the text around them."""

from __future__ import annotations

import functools
import re
from collections.abc import Collection, Iterable, Sequence

from tokenizers import Tokenizer

QUOTE = "\ufdd0"
"""A Unicode noncharacter put inside a control token's spelling that came from a user, so that it stays plain text."""

_REPLACEMENT = "\ufffd"
_HOLD_LIMIT = 64


class TextCodec:
    """Encodes rendered chats and decodes sampled ids.

    ``tokenizer`` finds its added tokens in text, ``plain`` is the same tokenizer without any. Encoding cuts the text at
    the added tokens and encodes each piece for itself, so pieces that come back (system prompts, tool schemas) are
    remembered. Ids in ``hidden`` are left out of decoded text. Thread-safe: nothing here changes after construction.
    """

    def __init__(self, tokenizer: Tokenizer, plain: Tokenizer, hidden: Collection[int]) -> None:
        self._tokenizer = tokenizer
        self._control_ids = {token.content: id_ for id_, token in tokenizer.get_added_tokens_decoder().items()}
        spellings = sorted(self._control_ids, key=len, reverse=True)
        self._control = re.compile("(" + "|".join(map(re.escape, spellings)) + ")")
        self._hidden = frozenset(hidden)
        self.vocab_size = 1 + max(tokenizer.get_vocab(with_added_tokens=True).values())

        @functools.lru_cache(maxsize=512)
        def encode_piece(piece: str) -> tuple[int, ...]:
            return tuple(plain.encode(piece, add_special_tokens=False).ids)

        self._encode_piece = encode_piece

    def encode(self, text: str) -> list[int]:
        """The ids of a rendered text; control tokens spelled with ``QUOTE`` inside become ordinary text."""
        ids: list[int] = []
        for index, piece in enumerate(self._control.split(text)):
            if index % 2:
                ids.append(self._control_ids[piece])
            elif piece:
                ids.extend(self._encode_piece(piece.replace(QUOTE, "")))
        return ids

    def quoted(self, text: str) -> str:
        """``text`` with every control token's spelling made plain text."""
        text = text.replace(QUOTE, "")
        return self._control.sub(lambda found: found[0][0] + QUOTE + found[0][1:], text)

    def first_control(self, text: str) -> str | None:
        """The spelling of the first control token in ``text``."""
        found = self._control.search(text)
        return None if found is None else found[0]

    def control_id(self, spelling: str) -> int:
        return self._control_ids[spelling]

    def visible(self, ids: Iterable[int]) -> list[int]:
        return [id_ for id_ in map(int, ids) if id_ not in self._hidden]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ``ids`` without hidden ones; bytes that are no UTF-8 become U+FFFD."""
        return self._tokenizer.decode(self.visible(ids), skip_special_tokens=False)

    def token_text(self, id_: int) -> str:
        """One token as text, hidden or not."""
        return self._tokenizer.decode([id_], skip_special_tokens=False)


class StreamDecoder:
    """Decodes ids as they are drawn; a character whose bytes are not all there waits for the next id."""

    def __init__(self, codec: TextCodec) -> None:
        self._codec = codec
        self._context: list[int] = []
        self._pending: list[int] = []

    def push(self, ids: Sequence[int]) -> str:
        self._pending += self._codec.visible(ids)
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
