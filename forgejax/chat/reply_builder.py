"""From sampled ids to an answer: decode, stop strings, tool calls; the same way whether it streams or not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from forgejax.chat.format import ChatFormat
from forgejax.chat.messages import ChatRequest
from forgejax.chat.reply import Reply, TokenLogprob, ToolCall, Usage, WireFinish
from forgejax.chat.tool_calls import CallPart, MalformedPart, Part, ToolCallFormat, overlap
from forgejax.types import Completion, FinishReason


@dataclass(frozen=True, kw_only=True)
class TextDelta:
    text: str


@dataclass(frozen=True, kw_only=True)
class ToolCallDelta:
    index: int
    call: ToolCall


Delta = TextDelta | ToolCallDelta


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
        held = max(overlap(text, stop) for stop in self._stops)
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
        self._decoder = chat_format.stream_decoder()
        self._stops = StopStrings(request.stop)
        self._parser = tool_calls.parser(request.tools)
        self._fed = 0
        self._texts: list[str] = []
        self._calls: list[ToolCall] = []
        self.malformed: list[str] = []

    @property
    def stopped(self) -> bool:
        """Whether a stop string has ended the text."""
        return self._stops.hit

    @property
    def calls(self) -> int:
        return len(self._calls)

    def feed(self, ids: Sequence[int]) -> list[Delta]:
        """Takes the next ids and gives what an agent may see of them by now."""
        self._fed += len(ids)
        return self._deltas(self._parser.push(self._stops.push(self._decoder.push(ids))))

    def finish(self, completion: Completion) -> tuple[list[Delta], Reply]:
        """The deltas still held back, and the whole reply."""
        deltas = self.feed(completion.token_ids[self._fed :].tolist())
        tail = self._stops.push(self._decoder.finish()) + self._stops.finish()
        deltas += self._deltas(self._parser.push(tail) + self._parser.finish())
        return deltas, Reply(
            content="".join(self._texts),
            tool_calls=tuple(self._calls),
            finish=self._finish_reason(completion),
            usage=Usage(
                prompt_tokens=len(completion.prompt_ids),
                completion_tokens=len(completion.token_ids),
                cached_tokens=completion.cached_tokens,
            ),
            logprobs=self._logprobs(completion) if self._request.logprobs else None,
        )

    def _finish_reason(self, completion: Completion) -> WireFinish:
        if completion.finish_reason is not FinishReason.STOP:
            return "length"
        return "tool_calls" if self._calls else "stop"

    def _logprobs(self, completion: Completion) -> tuple[TokenLogprob, ...]:
        text = self._format.codec.token_text
        pairs = zip(completion.token_ids.tolist(), np.asarray(completion.logprobs).tolist(), strict=True)
        return tuple(TokenLogprob(text=text(id_), logprob=logprob) for id_, logprob in pairs)

    def _deltas(self, parts: Sequence[Part]) -> list[Delta]:
        deltas: list[Delta] = []
        for part in parts:
            if isinstance(part, CallPart):
                # Numbered, not random: some templates print it, and equal seeds must give equal prompts.
                call_id = f"call_{self._number:05d}{len(self._calls):03d}"
                call = ToolCall(id=call_id, name=part.name, arguments=part.arguments)
                deltas.append(ToolCallDelta(index=len(self._calls), call=call))
                self._calls.append(call)
                continue
            if isinstance(part, MalformedPart):
                self.malformed.append(part.problem)
            self._texts.append(part.text)
            deltas.append(TextDelta(text=part.text))
        return deltas
