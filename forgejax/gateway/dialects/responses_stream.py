"""The events of one of OpenAI's Responses while it is drawn, each with its number."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from forgejax.chat.messages import MessagePart, ReasoningPart, TextPart, ToolCallPart
from forgejax.chat.reply import Delta, PartEnd, ReasoningDelta, Reply, TextDelta, ToolCallDelta, ToolCallStart
from forgejax.gateway.dialects.base import Event
from forgejax.gateway.dialects.responses_items import InputText, OfferedTool, read_input, word_item, word_text
from forgejax.gateway.refusals import RefusedError

WordResponse = Callable[[str, Reply | None, Mapping[str, Any] | None], Mapping[str, Any]]
"""The whole response in a status, with the reply if it is there and the error if it failed."""


class ResponsesStream:
    """A response is created and in progress; its items are added, grow and are done; then it is complete."""

    def __init__(self, reply_id: str, offered: Sequence[OfferedTool], word_response: WordResponse) -> None:
        self._id = reply_id
        self._offered = offered
        self._word_response = word_response
        self._number = 0
        self._part: MessagePart | None = None  # the open one, as far as it is known
        self._input = InputText()

    def start(self) -> Sequence[Event]:
        return [
            self._word(f"response.{status}", response=self._word_response("in_progress", None, None))
            for status in ("created", "in_progress")
        ]

    def delta(self, delta: Delta) -> Sequence[Event]:
        if isinstance(delta, PartEnd):
            return self._end_part(delta)
        events: list[Event] = []
        if isinstance(delta, ToolCallStart):
            self._part = ToolCallPart(id=delta.id, name=delta.name, raw="", arguments=None)
            self._input = InputText()
            return [self._word_state("added", delta.part, self._part)]
        if isinstance(delta, ToolCallDelta):
            return self._grow_call(delta)
        if self._part is None:
            self._part = ReasoningPart(text="") if isinstance(delta, ReasoningDelta) else TextPart(text="")
            events.append(self._word_state("added", delta.part, self._part))
            events.append(self._word_content("added", delta.part, self._part))
        assert isinstance(self._part, TextPart | ReasoningPart)
        self._part = replace(self._part, text=self._part.text + delta.text)
        more: dict[str, Any] = {"logprobs": []} if isinstance(delta, TextDelta) else {}
        kind = "output_text" if isinstance(delta, TextDelta) else "reasoning_text"
        place = self._place(delta.part) | {"content_index": 0}
        return [*events, self._word(f"response.{kind}.delta", **place, delta=delta.text, **more)]

    def end(self, reply: Reply) -> Sequence[Event]:
        status = "incomplete" if reply.finish == "length" else "completed"
        return [self._word(f"response.{status}", response=self._word_response(status, reply, None))]

    def error(self, refusal: RefusedError) -> Sequence[Event]:
        error = {"code": refusal.code or refusal.kind, "message": refusal.message}
        return [self._word("response.failed", response=self._word_response("failed", None, error))]

    def _grow_call(self, delta: ToolCallDelta) -> list[Event]:
        assert isinstance(self._part, ToolCallPart)
        self._part = replace(self._part, raw=self._part.raw + delta.text)
        if not self._is_custom(self._part):
            return [self._word("response.function_call_arguments.delta", **self._place(delta.part), delta=delta.text)]
        text = self._input.push(delta.text)
        if not text:
            return []
        return [self._word("response.custom_tool_call_input.delta", **self._place(delta.part), delta=text)]

    def _end_part(self, end: PartEnd) -> list[Event]:
        part, place = end.call or self._part, self._place(end.part)
        assert part is not None
        if isinstance(part, ToolCallPart):
            if self._is_custom(part):
                events = [self._word("response.custom_tool_call_input.done", **place, input=read_input(part))]
            else:
                place |= {"name": part.name, "arguments": part.raw}
                events = [self._word("response.function_call_arguments.done", **place)]
        else:
            more: dict[str, Any] = {"logprobs": []} if isinstance(part, TextPart) else {}
            kind = "output_text" if isinstance(part, TextPart) else "reasoning_text"
            place |= {"content_index": 0, "text": part.text}
            events = [self._word(f"response.{kind}.done", **place, **more)]
            events.append(self._word_content("done", end.part, part))
        if isinstance(part, ReasoningPart):
            part = replace(part, signature=end.signature)
        events.append(self._word_state("done", end.part, part))
        self._part = None
        return events

    def _is_custom(self, call: ToolCallPart) -> bool:
        return any(tool.custom for tool in self._offered if tool.name == call.name)

    def _place(self, index: int) -> dict[str, Any]:
        assert self._part is not None
        return {"item_id": self._word_item(index, self._part, "in_progress")["id"], "output_index": index}

    def _word_item(self, index: int, part: MessagePart, status: str) -> dict[str, Any]:
        return word_item(part, index, self._id, self._offered, status)

    def _word_state(self, state: str, index: int, part: MessagePart) -> Event:
        item = self._word_item(index, part, "completed" if state == "done" else "in_progress")
        if item["type"] == "custom_tool_call" and state == "added":
            item["input"] = ""
        return self._word(f"response.output_item.{state}", output_index=index, item=item)

    def _word_content(self, state: str, index: int, part: TextPart | ReasoningPart | MessagePart) -> Event:
        text = part.text if isinstance(part, TextPart | ReasoningPart) else ""
        reasoning = isinstance(part, ReasoningPart)
        content = {"type": "reasoning_text", "text": text} if reasoning else word_text(text)
        return self._word(f"response.content_part.{state}", **self._place(index), content_index=0, part=content)

    def _word(self, kind: str, **fields: Any) -> Event:
        number, self._number = self._number, self._number + 1
        return kind, json.dumps({"type": kind, "sequence_number": number, **fields}, separators=(",", ":"))
