"""Chat messages <-> token ids, through a Hugging Face tokenizer folder and its chat template."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from forgejax.chat.codec import StreamDecoder, TextCodec
from forgejax.chat.messages import Message, TemplateMessage, Tool
from forgejax.chat.template import ChatTemplate, TemplateError
from forgejax.chat.thoughts import ThoughtFormat
from forgejax.chat.tokenizer import TokenizerFolder
from forgejax.errors import GatewayError

_PROBE: tuple[TemplateMessage, ...] = (
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

    messages: tuple[TemplateMessage, ...]
    tools: tuple[Tool, ...]
    text: str


@dataclass(frozen=True, kw_only=True)
class SpokenTurn:
    """A turn as text: what stood before the assistant's message, what was said in it without special tokens, and what
    of that was thought."""

    before: TextMark
    said: str
    thought: str = ""


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
        self.thoughts = ThoughtFormat.find(self._try_template, [folder.template_source, *self.codec.spellings])
        self._opening = self._find_opening()

    @classmethod
    def load(cls, path: str | Path) -> ChatFormat:
        """Reads ``tokenizer.json``, ``tokenizer_config.json`` and the chat template of a folder, without a network.

        Raises GatewayError where one is missing or damaged, or where the template cannot be used for chat.
        """
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it would advise installing torch
        return cls(TokenizerFolder.read(Path(path)))

    def render_chat(self, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> RenderedPrompt:
        """The text of a whole prompt, each message spelled as the template reads it. Raises TemplateError."""
        return self.render_text([self.thoughts.spell(message) for message in messages], tools)

    def render_text(self, messages: Sequence[TemplateMessage], tools: Sequence[Tool] = ()) -> RenderedPrompt:
        """The text of a whole prompt. Raises TemplateError."""
        text = self._template.render(messages, tools, prompt=True)
        return RenderedPrompt(messages=tuple(messages), tools=tuple(tools), text=text)

    def mark_turn(self, prompt: RenderedPrompt) -> TextMark:
        """Stands for ``prompt`` up to where the assistant's message begins, its header not included."""
        return TextMark.of(prompt.text.removesuffix(self._opening))

    def encode(self, prompt: RenderedPrompt) -> list[int]:
        """The ids of a whole prompt."""
        return self.codec.encode(prompt.text)

    def render(self, messages: Sequence[TemplateMessage], tools: Sequence[Tool] = ()) -> list[int]:
        """``encode(render_text(messages, tools))``. Raises TemplateError."""
        return self.encode(self.render_text(messages, tools))

    def continue_turn(self, prompt: RenderedPrompt, known: int, turn: SpokenTurn) -> list[int] | None:
        """The ids to append to an assistant turn that ended in its stop id, to get ``prompt``.

        ``prompt.messages[known - 1]`` is that turn's message. The result is, as text and as ids, what the whole prompt
        has after that message, however the template spells it; None where the template would change anything before
        it, leave out what was thought in it, or give it another shape than one turn of the assistant. Raises
        TemplateError.
        """
        begin = turn.before.length
        header = self._opening.partition(self.thoughts.opening)[0]
        if not turn.before.begins(prompt.text) or not prompt.text.startswith(header.rstrip(), begin):
            return None
        found = self.codec.find_hidden(prompt.text, begin + len(header.rstrip()))
        if found is None or found[0] != self._turn_end:
            return None
        written = prompt.text[begin : found[1]]
        if turn.thought and not self.thoughts.shows(written, self.codec.quote_hidden(turn.thought)):
            return None
        verbatim = turn.said.strip() and written.rstrip().endswith(turn.said.strip())
        if not verbatim and self._count_ends(prompt, known, begin) != 1:
            return None
        return self.codec.encode(prompt.text[found[1] + len(self._turn_end) :], at_start=False)

    def render_spoken(
        self, message: TemplateMessage, history: Sequence[TemplateMessage], tools: Sequence[Tool] = ()
    ) -> str | None:
        """What the template writes for ``message`` after the generation prompt, its end of turn included.

        None where it does not write it there. Raises TemplateError.
        """
        before = self._template.render(history, tools, prompt=True)
        spoken = self._template.render((*history, message), tools, prompt=False)
        end = spoken.rfind(self._turn_end, len(before))
        if not spoken.startswith(before) or end < 0:
            return None
        return spoken[len(before) : end + len(self._turn_end)]

    def render_message(
        self, message: TemplateMessage, history: Sequence[TemplateMessage], tools: Sequence[Tool]
    ) -> str:
        """What the template writes for ``message`` in a history, without its end of turn: behind the last line break it
        shares with the generation prompt where it does not go on from that. Raises TemplateError."""
        before = self._template.render(history, tools, prompt=True)
        whole = self._template.render((*history, message), tools, prompt=False)
        begin = len(before)
        while not whole.startswith(before[:begin]):
            begin = before.rfind("\n", 0, begin - 1) + 1
        end = self.codec.find_hidden(whole, begin)
        return whole[begin:] if end is None else whole[begin : end[1]]

    def encode_assistant(self, message: TemplateMessage, history: Sequence[TemplateMessage] = _PROBE[:1]) -> list[int]:
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

    def _count_ends(self, prompt: RenderedPrompt, known: int, begin: int) -> int:
        """How many ends of turn the template writes from ``begin`` on for the message before ``known``."""
        spoken = self._template.render(prompt.messages[:known], prompt.tools, prompt=False)
        return spoken.count(self._turn_end, begin)

    def _try_template(self, messages: list[TemplateMessage]) -> str | None:
        try:
            return self._template.render(messages, (), prompt=False)
        except TemplateError:
            return None

    def _find_opening(self) -> str:
        """What the template writes where the assistant is to speak; empty where it writes another history there."""
        asked = self._template.render(_PROBE, (), prompt=True)
        before = self._template.render(_PROBE, (), prompt=False)
        return asked[len(before) :] if asked.startswith(before) else ""

    def _find_turn_end(self, codec: TextCodec, text: str) -> str:
        turn_end = codec.find_control(text.partition(str(_PROBE[1]["content"]))[2])
        if turn_end is None:
            raise GatewayError(
                f"the chat template in {self._path} does not end an assistant message with a special token; "
                f"it renders {text!r}; add one, or the policy can never stop"
            )
        return turn_end
