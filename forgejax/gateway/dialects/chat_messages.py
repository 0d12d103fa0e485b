"""The messages and tools of OpenAI's chat completions, read into neutral ones."""

from __future__ import annotations

from typing import Any

import msgspec

from forgejax.chat.messages import Message, Tool
from forgejax.gateway.dialects.fields import read_array, read_mapping, read_text
from forgejax.gateway.refusals import refuse_field

_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}


def read_messages(value: object) -> tuple[Message, ...]:
    """At least one message, each a neutral one. Raises RefusedError."""
    items = read_array(value, "messages")
    if not items:
        raise refuse_field("messages", value, "at least one message")
    return tuple(_read_message(item, f"messages[{index}]") for index, item in enumerate(items))


def read_tools(value: object) -> tuple[Tool, ...]:
    """Function tools, as they were sent. Raises RefusedError."""
    if value is None:
        return ()
    return tuple(_read_tool(item, f"tools[{index}]") for index, item in enumerate(read_array(value, "tools")))


def _read_message(item: object, name: str) -> Message:
    fields = read_mapping(item, name)
    given = fields.get("role")
    role = _ROLES.get(given) if isinstance(given, str) else None
    if role is None:
        raise refuse_field(f"{name}.role", given, f"one of {', '.join(_ROLES)}")
    calls = fields.get("tool_calls") or None
    if calls is not None and role != "assistant":
        raise refuse_field(f"{name}.tool_calls", calls, "no tool calls in a message that is not the assistant's")
    content = fields.get("content")
    if content is None and role != "assistant":
        raise refuse_field(f"{name}.content", content, "a string or an array of text parts")
    message: dict[str, Any] = {
        "role": role,
        "content": "" if content is None else _read_content(content, f"{name}.content"),
    }
    if calls is not None:
        items = read_array(calls, f"{name}.tool_calls")
        message["tool_calls"] = [_read_call(call, f"{name}.tool_calls[{index}]") for index, call in enumerate(items)]
    for key in ("tool_call_id", "name"):
        if fields.get(key) is not None:
            message[key] = read_text(fields[key], f"{name}.{key}")
    return message


def _read_content(value: object, name: str) -> str:
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise refuse_field(name, value, "a string or an array of text parts")
    return "\n".join(_read_part(part, f"{name}[{index}]") for index, part in enumerate(value))


def _read_part(item: object, name: str) -> str:
    part = read_mapping(item, name)
    kind = part.get("type")
    if kind not in ("text", "refusal"):
        raise refuse_field(f"{name}.type", kind, "text: this model reads nothing else")
    if not isinstance(part.get(kind), str):
        raise refuse_field(f"{name}.{kind}", part.get(kind), "a string")
    return str(part[kind])


def _read_call(item: object, name: str) -> dict[str, Any]:
    call = read_mapping(item, name)
    function = read_mapping(call.get("function"), f"{name}.function")
    arguments = function.get("arguments")
    if not isinstance(arguments, str):
        raise refuse_field(f"{name}.function.arguments", arguments, "a string of JSON")
    neutral = {
        "type": "function",
        "function": {
            "name": read_text(function.get("name"), f"{name}.function.name"),
            "arguments": _read_arguments(arguments),
        },
    }
    if call.get("id") is not None:
        neutral["id"] = read_text(call["id"], f"{name}.id")
    return neutral


def _read_arguments(arguments: str) -> Any:
    """The object that ``arguments`` spells, which chat templates print; the string itself where it spells none."""
    try:
        value = msgspec.json.decode(arguments)
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        return arguments
    return value if isinstance(value, dict) else arguments


def _read_tool(item: object, name: str) -> Tool:
    tool = read_mapping(item, name)
    if tool.get("type") != "function":
        raise refuse_field(f"{name}.type", tool.get("type"), "function: no other tools can be called")
    function = read_mapping(tool.get("function"), f"{name}.function")
    read_text(function.get("name"), f"{name}.function.name")
    parameters = read_mapping(function.get("parameters") or {}, f"{name}.function.parameters")
    required = parameters.get("required")
    if required is not None:
        for index, key in enumerate(read_array(required, f"{name}.function.parameters.required")):
            read_text(key, f"{name}.function.parameters.required[{index}]")
    return tool
