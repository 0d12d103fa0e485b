"""From sampled ids to an answer: decode, stop strings, tool calls; the same way whether it streams or not."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from forgejax.chat.format import ChatFormat
from forgejax.chat.messages import ChatRequest
from forgejax.chat.reply import (
    Delta,
    Reply,
    ReplyFinish,
    ReplyPart,
    TextDelta,
    TextPart,
    TokenLogprob,
    ToolCallDelta,
    ToolCallPart,
    Usage,
)
from forgejax.chat.tool_calls import CallSpan, MalformedSpan, Span, ToolCallFormat, measure_overlap
from forgejax.types import Completion, FinishReason


class StopStrings:
    """Passes text on up to the first of ``stops``; what may be the beginning of one waits."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.hit = False

    def push(self, text: str) -> str:
        if not self._stops:
            return text
        if self.hit:
            return ""
        text = self._held + text
        at = min((found for stop in self._stops if (found := text.find(stop)) >= 0), default=-1)
        if at >= 0:
            self.hit, self._held = True, ""
            return text[:at]
        held = max(measure_overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def finish(self) -> str:
        text, self._held = self._held, ""
        return text


class ReplyBuilder:
    """Builds one reply. ``feed`` may be called from the engine's thread, ``finish`` after the last ``feed``."""

    def __init__(self, chat_format: ChatFormat, tool_calls: ToolCallFormat, request: ChatRequest, number: int) -> None:
        self._format = chat_format
        self._request = request
        self._number = number
        self._decoder = chat_format.make_decoder()
        self._stops = StopStrings(request.stop)
        self._parser = tool_calls.make_parser(request.tools)
        self._fed = 0
        self._parts: list[ReplyPart] = []  # the complete ones
        self._text: list[str] = []  # pieces of a text part that may still grow
        self.calls = 0
        self.malformed: list[str] = []

    @property
    def stopped(self) -> bool:
        """Whether a stop string has ended the text."""
        return self._stops.hit

    def feed(self, ids: Sequence[int]) -> list[Delta]:
        """Takes the next ids and gives what an agent may see of them by now."""
        self._fed += len(ids)
        return self._take(self._parser.push(self._stops.push(self._decoder.push(ids))))

    def finish(self, completion: Completion) -> tuple[list[Delta], Reply]:
        """The deltas still held back, and the whole reply."""
        deltas = self.feed(completion.token_ids[self._fed :].tolist())
        tail = self._stops.push(self._decoder.finish()) + self._stops.finish()
        deltas += self._take(self._parser.push(tail) + self._parser.finish())
        self._complete_text()
        return deltas, Reply(
            parts=tuple(self._parts),
            finish=self._find_finish(completion),
            usage=Usage(
                prompt_tokens=len(completion.prompt_ids),
                completion_tokens=len(completion.token_ids),
                cached_tokens=completion.cached_tokens,
            ),
            logprobs=self._list_logprobs(completion) if self._request.logprobs else None,
        )

    def _find_finish(self, completion: Completion) -> ReplyFinish:
        if completion.finish_reason is not FinishReason.STOP:
            return "length"
        return "tool_calls" if self.calls else "stop"

    def _list_logprobs(self, completion: Completion) -> tuple[TokenLogprob, ...]:
        text = self._format.codec.decode_token
        pairs = zip(completion.token_ids.tolist(), np.asarray(completion.logprobs).tolist(), strict=True)
        return tuple(TokenLogprob(text=text(id_), logprob=logprob) for id_, logprob in pairs)

    def _take(self, spans: Sequence[Span]) -> list[Delta]:
        deltas: list[Delta] = []
        for span in spans:
            if isinstance(span, CallSpan):
                self._complete_text()
                # Numbered, not random: some templates print it, and equal seeds must give equal prompts.
                call_id = f"call_{self._number:05d}{self.calls:03d}"
                call = ToolCallPart(id=call_id, name=span.name, arguments=span.arguments, raw=span.raw)
                deltas.append(ToolCallDelta(part=len(self._parts), call=call))
                self._parts.append(call)
                self.calls += 1
                continue
            if isinstance(span, MalformedSpan):
                self.malformed.append(span.problem)
            self._text.append(span.text)
            deltas.append(TextDelta(part=len(self._parts), text=span.text))
        return deltas

    def _complete_text(self) -> None:
        if self._text:
            self._parts.append(TextPart(text="".join(self._text)))
            self._text = []
