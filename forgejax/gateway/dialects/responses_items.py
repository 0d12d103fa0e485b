"""The items of OpenAI's Responses: what a request brings, read into neutral messages and tools, and what a reply is
made of."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from forgejax.chat.messages import (
    Message,
    MessagePart,
    ReasoningPart,
    RefusalPart,
    TextPart,
    Tool,
    ToolCallPart,
    read_call,
)
from forgejax.gateway.dialects.base import name_call
from forgejax.gateway.dialects.chat_messages import ROLES, read_function, read_parts
from forgejax.gateway.dialects.fields import read_array, read_mapping, read_text, spell_json
from forgejax.gateway.memory import ReplyMemory
from forgejax.gateway.refusals import RefusedError, refuse_field

_TEXTS = ("input_text", "output_text", "text", "refusal", "summary_text", "reasoning_text")
_INPUT = re.compile(r'\s*\{\s*"input"\s*:\s*"')
_STRING = re.compile(r'(?:[^"\\]|\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4}))*')
_HIGH_HALF = re.compile(r"\\u[dD][89abAB][0-9a-fA-F]{2}$")


@dataclass(frozen=True, kw_only=True)
class OfferedTool:
    """A tool as the policy is shown it. ``custom``: it takes a text, which the policy writes as ``input``."""

    tool: Tool
    custom: bool = False
    namespace: str | None = None

    @property
    def name(self) -> str:
        return str(self.tool["function"]["name"])


def read_offered(value: object, name: str = "tools", namespace: str | None = None) -> tuple[OfferedTool, ...]:
    """Function and custom tools, those of namespaces among them. Tools that a vendor runs itself are left out."""
    offered: list[OfferedTool] = []
    for index, item in enumerate([] if value is None else read_array(value, name)):
        tool = read_mapping(item, f"{name}[{index}]")
        if tool.get("type") == "function":
            function = {key: tool[key] for key in ("name", "description", "parameters", "strict") if key in tool}
            read = read_function({"parameters": {}, **function}, f"{name}[{index}]")
            offered.append(OfferedTool(tool=read, namespace=namespace))
        elif tool.get("type") == "custom":
            offered.append(OfferedTool(tool=_read_custom(tool, f"{name}[{index}]"), custom=True, namespace=namespace))
        elif tool.get("type") == "namespace":
            inside = read_text(tool.get("name"), f"{name}[{index}].name")
            offered += read_offered(tool.get("tools"), f"{name}[{index}].tools", inside)
    return tuple({each.name: each for each in reversed(offered)}.values())[::-1]


def read_items(value: object, memory: ReplyMemory) -> tuple[Message, ...]:
    """A string, which a user says, or an array of items. Raises RefusedError."""
    if isinstance(value, str):
        return (Message.of_text("user", value),)
    reader = _ItemReader(memory)
    for index, item in enumerate(read_array(value, "input")):
        reader.read(read_mapping(item, f"input[{index}]"), f"input[{index}]")
    return tuple(reader.messages)


class _ItemReader:
    """Items of one turn of the assistant, which may have results between them, are one message."""

    def __init__(self, memory: ReplyMemory) -> None:
        self.messages: list[Message] = []
        self._memory = memory

    def read(self, item: Mapping[str, Any], name: str) -> None:
        kind = item.get("type", "message")
        if kind == "message":
            self._read_message(item, name)
        elif kind == "reasoning":
            self._say(_read_reasoning(item, name))
        elif kind in ("function_call", "custom_tool_call"):
            self._call(_read_call(item, name))
        elif kind in ("function_call_output", "custom_tool_call_output"):
            text = read_parts(item.get("output"), f"{name}.output", _TEXTS, others_told=True)
            call_id = read_text(item.get("call_id"), f"{name}.call_id")
            self.messages.append(Message(role="tool", parts=(TextPart(text=text),), tool_call_id=call_id))
        elif kind == "item_reference":
            self.read(self._find_item(item.get("id"), f"{name}.id"), name)
        elif isinstance(kind, str):
            # A vendor's own item, of a history that was held elsewhere: what it says is all that can be kept of it.
            self._say(TextPart(text=spell_json(item)))
        else:
            raise refuse_field(f"{name}.type", kind, "the name of an item's type")

    def _read_message(self, item: Mapping[str, Any], name: str) -> None:
        role = ROLES.get(str(item.get("role")))
        if role is None or role == "tool":
            raise refuse_field(f"{name}.role", item.get("role"), "one of user, system, developer, assistant")
        text = read_parts(item.get("content"), f"{name}.content", _TEXTS)
        if role != "assistant":
            self.messages.append(Message.of_text(role, text))
            return
        content = item.get("content")
        refused = isinstance(content, list) and any("refusal" in part for part in content if isinstance(part, dict))
        self._say(RefusalPart(text=text) if refused else TextPart(text=text))

    def _say(self, part: MessagePart) -> None:
        if self.messages and self.messages[-1].role == "assistant":
            self.messages[-1] = replace(self.messages[-1], parts=(*self.messages[-1].parts, part))
        else:
            self.messages.append(Message(role="assistant", parts=(part,)))

    def _call(self, call: ToolCallPart) -> None:
        """Adds the call to its turn, which some agents tear apart to put each result behind its call."""
        spoken = [index for index, message in enumerate(self.messages) if message.role == "assistant"]
        last = spoken[-1] if spoken else None
        if last is not None and all(message.role == "tool" for message in self.messages[last + 1 :]):
            before = self.messages[last]
            # The ids of one turn's calls differ in their last three digits only.
            if call.id is not None and any(str(each.id)[:-3] == call.id[:-3] for each in before.tool_calls):
                self.messages[last] = replace(before, parts=(*before.parts, call))
                return
        self._say(call)

    def _find_item(self, id_: object, name: str) -> Mapping[str, Any]:
        item = self._memory.find_item(id_) if isinstance(id_, str) else None
        if item is None:
            raise RefusedError(
                404, f"Item with id '{id_}' not found; send the item itself", code="item_not_found", param=name
            )
        return item


def word_items(reply: Message, reply_id: str, offered: Sequence[OfferedTool], *, cut: bool) -> list[dict[str, Any]]:
    """The output items of a reply; ``cut``: its last part is not whole."""
    last = len(reply.parts) - 1
    return [
        word_item(part, index, reply_id, offered, "incomplete" if cut and index == last else "completed")
        for index, part in enumerate(reply.parts)
    ]


def word_item(
    part: MessagePart, index: int, reply_id: str, offered: Sequence[OfferedTool], status: str
) -> dict[str, Any]:
    """One part as an output item, in whatever state it is."""
    key = f"{reply_id.removeprefix('resp_')}_{index}"
    if isinstance(part, ReasoningPart):
        content = [{"type": "reasoning_text", "text": part.text}] if part.text else []
        item: dict[str, Any] = {"id": f"rs_{key}", "type": "reasoning", "summary": [], "content": content}
        return item | {"encrypted_content": part.signature, "status": status}
    if isinstance(part, ToolCallPart):
        tool = next((each for each in offered if each.name == part.name), None)
        call = {"call_id": name_call(part.id, index), "name": part.name, "status": status}
        if tool is not None and tool.namespace is not None:
            call["namespace"] = tool.namespace
        if tool is not None and tool.custom:
            return {"id": f"ctc_{key}", "type": "custom_tool_call", "input": read_input(part), **call}
        return {"id": f"fc_{key}", "type": "function_call", "arguments": part.raw, **call}
    said = [word_text(part.text)] if part.text else []
    return {"id": f"msg_{key}", "type": "message", "role": "assistant", "status": status, "content": said}


def word_text(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def read_input(call: ToolCallPart) -> str:
    """The text a custom tool is called with: the ``input`` the policy wrote, or all it wrote where there is none."""
    given = None if call.arguments is None else call.arguments.get("input")
    return given if isinstance(given, str) else call.raw


class InputText:
    """The text of a custom tool's ``input`` while its JSON is drawn."""

    def __init__(self) -> None:
        self._raw = ""
        self._given = 0

    def push(self, piece: str) -> str:
        self._raw += piece
        begin = _INPUT.match(self._raw)
        if begin is None:
            return ""
        start = max(begin.end(), self._given)
        found = _STRING.match(self._raw, start)
        end = found.end() if found else start
        if _HIGH_HALF.search(self._raw, start, end):
            end -= 6  # the other half of the character is to come
        self._given = end
        return str(json.loads(f'"{self._raw[start:end]}"', strict=False))


def _read_custom(tool: Mapping[str, Any], name: str) -> Tool:
    format_ = tool.get("format") or {}
    described = str(tool.get("description") or "")
    grammar = format_.get("definition") if isinstance(format_, dict) else None
    if grammar:
        described = f"{described}\n\nThe input follows this {format_.get('syntax', '')} grammar:\n{grammar}".strip()
    properties = {"input": {"type": "string"}}
    parameters = {"type": "object", "properties": properties, "required": ["input"]}
    named = read_text(tool.get("name"), f"{name}.name")
    return {"type": "function", "function": {"name": named, "description": described, "parameters": parameters}}


def _read_reasoning(item: Mapping[str, Any], name: str) -> ReasoningPart:
    text = read_parts(item.get("content") or item.get("summary"), f"{name}.content", _TEXTS)
    signature = item.get("encrypted_content")
    return ReasoningPart(text=text, signature=signature if isinstance(signature, str) else None)


def _read_call(item: Mapping[str, Any], name: str) -> ToolCallPart:
    raw = item.get("arguments")
    if item["type"] == "custom_tool_call":
        raw = spell_json({"input": item.get("input") or ""})
    elif isinstance(raw, dict):
        raw = spell_json(raw)
    if raw is not None and not isinstance(raw, str):
        raise refuse_field(f"{name}.arguments", raw, "a string of JSON")
    call_id = read_text(item.get("call_id"), f"{name}.call_id")
    return read_call(read_text(item.get("name"), f"{name}.name"), raw or "", call_id)
