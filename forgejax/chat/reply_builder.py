"""From sampled ids to an answer: decode, stop strings, thoughts, tool calls; the same whether it streams or not."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from forgejax.chat.format import ChatFormat
from forgejax.chat.messages import ChatRequest, Message, MessagePart, ReasoningPart, TextPart, ToolCallPart
from forgejax.chat.reply import (
    Delta,
    PartEnd,
    ReasoningDelta,
    Reply,
    ReplyFinish,
    TextDelta,
    TokenLogprob,
    ToolCallDelta,
    ToolCallStart,
    Usage,
)
from forgejax.chat.thoughts import Channel, ThoughtSplitter
from forgejax.chat.tool_calls import (
    CallSpan,
    CallStart,
    CallText,
    MalformedSpan,
    Span,
    ToolCallFormat,
    measure_overlap,
)
from forgejax.types import Completion, FinishReason


class StopStrings:
    """Passes text on up to the first of ``stops``; what may be the beginning of one waits."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.hit: str | None = None

    def push(self, text: str) -> str:
        if not self._stops:
            return text
        if self.hit is not None:
            return ""
        text = self._held + text
        found = [(at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            at, self.hit = min(found, key=lambda hit: hit[0])
            self._held = ""
            return text[:at]
        held = max(measure_overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def finish(self) -> str:
        text, self._held = self._held, ""
        return text


class ReplyBuilder:
    """Builds one reply, whose turn ``signature`` names. ``feed`` may be called from the engine's thread, ``finish``
    after the last ``feed``. ``thinking``: the prompt has opened a thought. ``number``, of the request in its session,
    makes the ids of calls."""

    def __init__(
        self,
        chat_format: ChatFormat,
        tool_calls: ToolCallFormat,
        request: ChatRequest,
        *,
        number: int,
        signature: str,
        thinking: bool = False,
    ) -> None:
        self._format = chat_format
        self._request = request
        self._number = number
        self._signature = signature
        self._decoder = chat_format.make_decoder()
        self._stops = StopStrings(request.stop)
        self._thoughts = ThoughtSplitter(chat_format.thoughts, inside=thinking)
        self._parser = tool_calls.make_parser(request.callable_tools)
        self._fed = 0
        self._thought_ids = 0
        self._parts: list[MessagePart] = []  # the complete ones
        self._channel: Channel = "text"  # of the part that may still grow
        self._pieces: list[str] = []
        self._call = ToolCallStart(part=0, id="", name="")  # the open one
        self.calls = 0  # that the agent is handed, whatever is wrong with them
        self.malformed: list[str] = []

    @property
    def stopped(self) -> bool:
        """Whether a stop string has ended the text."""
        return self._stops.hit is not None

    def begin(self, text: str) -> list[Delta]:
        """Takes what the reply begins with and the policy did not draw; before the first ``feed``."""
        return self._read(self._thoughts.push(text))

    def feed(self, ids: Sequence[int]) -> list[Delta]:
        """Takes the next ids and gives what an agent may see of them by now."""
        self._fed += len(ids)
        deltas = self._read(self._thoughts.push(self._stops.push(self._decoder.push(ids))))
        if self._thoughts.thinking:
            self._thought_ids = self._fed
        return deltas

    def finish(self, completion: Completion) -> tuple[list[Delta], Reply]:
        """The deltas still held back, and the whole reply."""
        deltas: list[Delta] = []
        while self._fed < len(completion.token_ids):
            # One by one while it thinks, so that it is known which token ended the thought.
            run = None if self._thoughts.over else self._fed + 1
            deltas += self.feed(completion.token_ids[self._fed : run].tolist())
        tail = self._stops.push(self._decoder.finish()) + self._stops.finish()
        deltas += self._read([*self._thoughts.push(tail), *self._thoughts.finish()])
        deltas += self._take(self._parser.finish()) + self._complete_part()
        return deltas, Reply(
            message=Message(role="assistant", parts=tuple(self._parts)),
            finish=self._find_finish(completion),
            usage=Usage(
                prompt_tokens=len(completion.prompt_ids),
                completion_tokens=len(completion.token_ids),
                cached_tokens=completion.cached_tokens,
                reasoning_tokens=min(self._thought_ids, len(completion.token_ids)),
            ),
            signature=self._signature,
            stop=self._stops.hit,
            logprobs=self._list_logprobs(completion) if self._request.logprobs else None,
        )

    def _find_finish(self, completion: Completion) -> ReplyFinish:
        if completion.finish_reason is not FinishReason.STOP:
            return "length"
        return "tool_calls" if self.calls else "stop"

    def _list_logprobs(self, completion: Completion) -> tuple[TokenLogprob, ...]:
        spell = self._format.codec.spell_token
        pairs = zip(completion.token_ids.tolist(), np.asarray(completion.logprobs).tolist(), strict=True)
        return tuple(TokenLogprob(data=spell(id_), logprob=logprob) for id_, logprob in pairs)

    def _read(self, pieces: Sequence[tuple[Channel, str]]) -> list[Delta]:
        deltas: list[Delta] = []
        for channel, text in pieces:
            deltas += self._take(self._parser.push(text)) if channel == "text" else self._add("reasoning", text)
        return deltas

    def _take(self, spans: Sequence[Span]) -> list[Delta]:
        deltas: list[Delta] = []
        for span in spans:
            if isinstance(span, CallStart):
                deltas += self._complete_part()
                # Numbered, not random: some templates print it, and equal seeds must give equal prompts.
                call_id = f"call_{self._number:05d}{self.calls:03d}"
                self._call = ToolCallStart(part=len(self._parts), id=call_id, name=span.name)
                self.calls += 1
                deltas.append(self._call)
            elif isinstance(span, CallText):
                deltas.append(ToolCallDelta(part=len(self._parts), text=span.text))
            elif isinstance(span, CallSpan):
                deltas += self._end_call(span)
            else:
                if isinstance(span, MalformedSpan):
                    self.malformed.append(span.problem)
                deltas += self._add("text", span.text)
        return deltas

    def _end_call(self, span: CallSpan) -> list[Delta]:
        if span.problem is not None:
            self.malformed.append(span.problem)
        call = ToolCallPart(
            id=self._call.id, name=span.name, raw=span.text, arguments=span.arguments, problem=span.problem
        )
        self._parts.append(call)
        return [PartEnd(part=self._call.part, call=call)]

    def _add(self, channel: Channel, text: str) -> list[Delta]:
        deltas = self._complete_part() if channel != self._channel else []
        self._channel = channel
        self._pieces.append(text)
        kind = TextDelta if channel == "text" else ReasoningDelta
        return [*deltas, kind(part=len(self._parts), text=text)]

    def _complete_part(self) -> list[Delta]:
        if not self._pieces:
            return []
        text, self._pieces = "".join(self._pieces), []
        reasoning = self._channel == "reasoning"
        self._parts.append(ReasoningPart(text=text, signature=self._signature) if reasoning else TextPart(text=text))
        return [PartEnd(part=len(self._parts) - 1, signature=self._signature if reasoning else None)]
