"""Reasoning as a channel of its own: how a template takes thoughts, and how they are cut out of what is drawn."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

from forgejax.chat.messages import (
    Message,
    MessagePart,
    ReasoningPart,
    RefusalPart,
    TemplateMessage,
    TextPart,
    ToolCallPart,
)
from forgejax.chat.tool_calls import measure_overlap

THOUGHT_TAGS = (("<think>", "</think>"), ("[THINK]", "[/THINK]"), ("<seed:think>", "</seed:think>"))
"""The tags families put around a thought; the first pair holds where a template names none."""

_FIELDS = ("reasoning_content", "reasoning", "thinking")
_PROBE_THOUGHT, _PROBE_WORDS = "probing-thought", "probing-words"

Channel = Literal["reasoning", "text"]


@dataclass(frozen=True, kw_only=True)
class ThoughtFormat:
    """Where a chat template looks for what an assistant thought.

    ``field`` is the message's field it reads; None where thoughts are written into the content, between the tags.
    ``known`` is False where the family shows no sign of thinking, and the tags are only what others use.
    """

    opening: str
    closing: str
    field: str | None
    known: bool = True

    @classmethod
    def find(cls, render: Callable[[list[TemplateMessage]], str | None], spellings: Iterable[str]) -> ThoughtFormat:
        """Of the template that ``render`` renders (None where it refuses); ``spellings`` are its source and tokens."""
        known = tuple(spellings)
        named = [pair for pair in THOUGHT_TAGS if any(pair[1] in spelling for spelling in known)]
        opening, closing = (named or THOUGHT_TAGS)[0]
        for field in _FIELDS:
            asked: TemplateMessage = {"role": "user", "content": "?"}
            text = render([asked, {"role": "assistant", "content": _PROBE_WORDS, field: _PROBE_THOUGHT}])
            if text is not None and _PROBE_THOUGHT in text and _PROBE_WORDS in text:
                return cls(opening=opening, closing=closing, field=field)
        return cls(opening=opening, closing=closing, field=None, known=bool(named))

    def spell(self, message: Message) -> TemplateMessage:
        """``message`` as the template reads it. A call whose arguments are no object is text there: templates print
        objects, and nobody can make one of it."""
        spelled: dict[str, Any] = {"role": message.role}
        calls = [call for call in message.tool_calls if call.arguments is not None]
        content = "".join(map(_write_text, message.parts))
        if message.reasoning and self.field is not None:
            spelled[self.field] = message.reasoning
        elif message.reasoning:
            content = f"{self.opening}\n{message.reasoning}\n{self.closing}\n\n{content}"
        spelled["content"] = content
        if calls:
            spelled["tool_calls"] = [
                {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in calls
            ]
        for key in ("tool_call_id", "name"):
            if getattr(message, key) is not None:
                spelled[key] = getattr(message, key)
        return spelled

    def split_message(self, message: Message) -> Message:
        """An assistant's message with a thought that stands in its text, between the tags, as reasoning."""
        inline = message.text.lstrip().startswith(self.opening) and self.closing in message.text
        if message.role != "assistant" or message.reasoning or not inline:
            return message
        splitter = ThoughtSplitter(self, inside=False)
        texts: dict[Channel, str] = {"reasoning": "", "text": ""}
        for channel, text in [*splitter.push(message.text), *splitter.finish()]:
            texts[channel] += text
        others = tuple(part for part in message.parts if not isinstance(part, TextPart | RefusalPart))
        reasoning = (ReasoningPart(text=texts["reasoning"]),) if texts["reasoning"] else ()
        said = (TextPart(text=texts["text"]),) if texts["text"] else ()
        return replace(message, parts=(*reasoning, *said, *others))

    def opens(self, prompt: str) -> bool:
        """Whether a reply to ``prompt`` begins inside a thought."""
        return prompt.rstrip().endswith(self.opening)

    def shows(self, written: str, thought: str) -> bool:
        """Whether a message as the template wrote it holds ``thought``."""
        return re.search(re.escape(thought.strip()) + r"\s*" + re.escape(self.closing), written) is not None


class ThoughtSplitter:
    """Cuts the thought off the beginning of a reply while it streams.

    White space beside the tags belongs to the format. Tags behind the first words are words. ``inside``: the prompt
    ended in the opening tag.
    """

    def __init__(self, thoughts: ThoughtFormat, *, inside: bool) -> None:
        self._thoughts = thoughts
        self._held = ""
        self._channel: Channel | None = "reasoning" if inside else None  # None until it is known whether there is one
        self._begun = False  # something of this channel was given out

    @property
    def thinking(self) -> bool:
        return self._channel == "reasoning"

    @property
    def over(self) -> bool:
        """Whether all that follows is words."""
        return self._channel == "text"

    def push(self, text: str) -> list[tuple[Channel, str]]:
        if self._channel == "text" and self._begun:
            return [("text", text)] if text else []
        self._held += text
        given: list[tuple[Channel, str]] = []
        if self._channel is None:
            self._look_for_opening()
        if self._channel == "reasoning":
            self._give_thought(given)
        if self._channel == "text":
            self._give_words(given)
        return given

    def finish(self) -> list[tuple[Channel, str]]:
        held, self._held = self._held, ""
        if self._channel == "reasoning":
            thought = held.strip() if not self._begun else held.rstrip()
            return [("reasoning", thought)] if thought else []
        return [("text", held)] if held and self._channel is None else []

    def _look_for_opening(self) -> None:
        begun = self._held.lstrip()
        if begun.startswith(self._thoughts.opening):
            self._channel, self._held = "reasoning", begun[len(self._thoughts.opening) :]
        elif not self._thoughts.opening.startswith(begun):
            self._channel, self._begun = "text", True

    def _give_thought(self, given: list[tuple[Channel, str]]) -> None:
        thought, closed, rest = self._held.partition(self._thoughts.closing)
        if not self._begun:
            thought = thought.lstrip()
        if closed:
            self._held = rest
        else:
            end = len(thought) - measure_overlap(thought, self._thoughts.closing)
            kept = thought[:end].rstrip()
            self._held, thought = thought[len(kept) :], kept
        if thought := thought.rstrip() if closed else thought:
            given.append(("reasoning", thought))
            self._begun = True
        if closed:
            self._channel, self._begun = "text", False

    def _give_words(self, given: list[tuple[Channel, str]]) -> None:
        words = self._held if self._begun else self._held.lstrip()
        self._held = ""
        if words:
            given.append(("text", words))
            self._begun = True


def _write_text(part: MessagePart) -> str:
    if isinstance(part, TextPart | RefusalPart):
        return part.text
    if isinstance(part, ToolCallPart) and part.arguments is None:
        return f"{part.name}({part.raw})"
    return ""
