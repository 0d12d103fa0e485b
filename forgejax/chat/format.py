"""Chat messages <-> token ids, through a Hugging Face tokenizer folder and its chat template."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from forgejax.chat.codec import StreamDecoder, TextCodec
from forgejax.chat.messages import Message, Tool
from forgejax.chat.template import ChatTemplate, TemplateError
from forgejax.chat.tokenizer import TokenizerFolder
from forgejax.errors import GatewayError

_PROBE: tuple[Message, ...] = (
    {"role": "user", "content": "First question?"},
    {"role": "assistant", "content": "Some answer."},
    {"role": "user", "content": "Second question."},
)


@dataclass(frozen=True, kw_only=True)
class TextMark:
    """Stands for a text without keeping it: its length and digest."""

    length: int
    digest: bytes

    @classmethod
    def of(cls, text: str) -> TextMark:
        digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
        return cls(length=len(text), digest=digest)

    def begins(self, text: str) -> bool:
        return len(text) >= self.length and TextMark.of(text[: self.length]) == self


@dataclass(frozen=True, kw_only=True)
class RenderedPrompt:
    """A whole prompt as text, up to where the assistant begins to speak."""

    messages: tuple[Message, ...]
    tools: tuple[Tool, ...]
    text: str


@dataclass(frozen=True, kw_only=True)
class SpokenTurn:
    """A turn as text: the prompt it answered, and what was said without special tokens."""

    prompt: TextMark
    said: str


class ChatFormat:
    """The one place where chat becomes ids. Immutable; ``load`` checks that the folder can be used at all.

    A turn is ``prompt ids + sampled ids``; the sampled ids end in a stop id unless the reply was cut short.
    """

    def __init__(self, folder: TokenizerFolder) -> None:
        self._path = folder.path
        # Its first look is through a codec that hides every special token; what ends a turn is found in its output.
        probe = folder.codec(frozenset())
        text = ChatTemplate(folder.tokenizer, probe.quote, probe.quote).render(_PROBE[:2], (), prompt=False)
        self._turn_end = self._find_turn_end(probe, text)
        self.codec = folder.codec({self._turn_end})
        self.end_of_turn_id = self.codec.find_control_id(self._turn_end)
        self.stop_ids = frozenset({self.end_of_turn_id}) | folder.read_end_ids()
        self.vocab_size = self.codec.vocab_size
        self._template = ChatTemplate(folder.tokenizer, self.codec.quote, self.codec.quote_hidden)
        folder.check_encoding(self.codec, self._template.render(_PROBE, (), prompt=True))

    @classmethod
    def load(cls, path: str | Path) -> ChatFormat:
        """Reads ``tokenizer.json``, ``tokenizer_config.json`` and the chat template of a folder, without a network.

        Raises GatewayError where one is missing or damaged, or where the template cannot be used for chat.
        """
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it would advise installing torch
        return cls(TokenizerFolder.read(Path(path)))

    def render_text(self, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> RenderedPrompt:
        """The text of a whole prompt. Raises TemplateError."""
        text = self._template.render(messages, tools, prompt=True)
        return RenderedPrompt(messages=tuple(messages), tools=tuple(tools), text=text)

    def encode(self, prompt: RenderedPrompt) -> list[int]:
        """The ids of a whole prompt."""
        return self.codec.encode(prompt.text)

    def render(self, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> list[int]:
        """``encode(render_text(messages, tools))``. Raises TemplateError."""
        return self.encode(self.render_text(messages, tools))

    def continue_turn(self, prompt: RenderedPrompt, known: int, turn: SpokenTurn | None = None) -> list[int] | None:
        """The ids to append to an assistant turn that ended in its stop id, to get ``prompt``.

        ``prompt.messages[known - 1]`` is that turn's message. The result is, as text and as ids, what the whole prompt
        has after that turn; None where the template would change anything before it, or the turn itself. ``turn``
        saves two renders where the template repeats what was said word for word. Raises TemplateError.
        """
        after = None if turn is None else self._find_after_verbatim(prompt.text, turn)
        if after is None:
            after = self._find_after_rendered(prompt, known)
        return None if after is None else self.codec.encode(prompt.text[after:], at_start=False)

    def render_spoken(self, message: Message, history: Sequence[Message], tools: Sequence[Tool] = ()) -> str | None:
        """What the template writes for ``message`` after the generation prompt, its end of turn included.

        None where it does not write it there. Raises TemplateError.
        """
        before = self._template.render(history, tools, prompt=True)
        spoken = self._template.render((*history, message), tools, prompt=False)
        end = spoken.rfind(self._turn_end, len(before))
        if not spoken.startswith(before) or end < 0:
            return None
        return spoken[len(before) : end + len(self._turn_end)]

    def render_message(self, message: Message, history: Sequence[Message], tools: Sequence[Tool]) -> str:
        """What the template writes for ``message`` in a history, without its end of turn: behind the last line break it
        shares with the generation prompt where it does not go on from that. Raises TemplateError."""
        before = self._template.render(history, tools, prompt=True)
        whole = self._template.render((*history, message), tools, prompt=False)
        begin = len(before)
        while not whole.startswith(before[:begin]):
            begin = before.rfind("\n", 0, begin - 1) + 1
        end = self.codec.find_hidden(whole, begin)
        return whole[begin:] if end is None else whole[begin : end[1]]

    def encode_assistant(self, message: Message, history: Sequence[Message] = _PROBE[:1]) -> list[int]:
        """The ids a policy samples to say ``message``, its end-of-turn id included.

        As text, ``render(history) + encode_assistant(message)`` begins ``render((*history, message, *more))``.
        Raises TemplateError where the template writes another prompt before a spoken message than before a new one.
        """
        spoken = self.render_spoken(message, history)
        if spoken is None:
            raise TemplateError(
                f"the chat template in {self._path} does not write an assistant message after the generation prompt; "
                "such a template cannot show the policy what to say"
            )
        return self.codec.encode(spoken, at_start=False)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of sampled ids as an agent sees it: without special tokens, tool-call markers kept."""
        return self.codec.decode(ids)

    def make_decoder(self) -> StreamDecoder:
        return StreamDecoder(self.codec)

    def _find_after_verbatim(self, text: str, turn: SpokenTurn) -> int | None:
        """Where ``text`` goes on after ``turn``, if it holds prompt and reply as they were."""
        if not turn.prompt.begins(text):
            return None
        begin = turn.prompt.length
        found = self.codec.find_hidden(text, begin)
        if found is None or found[0] != self._turn_end or text[begin : found[1]].strip() != turn.said.strip():
            return None
        return found[1] + len(self._turn_end)

    def _find_after_rendered(self, prompt: RenderedPrompt, known: int) -> int | None:
        """Where the prompt goes on after its first ``known`` messages, if those render there as they do alone."""
        before = self._template.render(prompt.messages[: known - 1], prompt.tools, prompt=True)
        spoken = self._template.render(prompt.messages[:known], prompt.tools, prompt=False)
        if not (spoken.startswith(before) and prompt.text.startswith(spoken)):
            return None
        end = spoken.rfind(self._turn_end, len(before))
        return None if end < 0 else end + len(self._turn_end)

    def _find_turn_end(self, codec: TextCodec, text: str) -> str:
        turn_end = codec.find_control(text.partition(str(_PROBE[1]["content"]))[2])
        if turn_end is None:
            raise GatewayError(
                f"the chat template in {self._path} does not end an assistant message with a special token; "
                f"it renders {text!r}; add one, or the policy can never stop"
            )
        return turn_end
