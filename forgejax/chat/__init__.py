"""Messages <-> token ids, through a tokenizer and its chat template. Knows no HTTP."""

from forgejax.chat.format import ChatFormat

__all__ = ["ChatFormat"]
