"""The messages and tools of OpenAI's chat completions, read into neutral ones."""

from __future__ import annotations

from typing import Any

import msgspec

from forgejax.chat.messages import Message, Tool
from forgejax.gateway.dialects.fields import array, mapping, text
from forgejax.gateway.refusals import bad_field

_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}


def read_messages(value: object) -> tuple[Message, ...]:
    """At least one message, each a neutral one. Raises RefusedError."""
    items = array(value, "messages")
    if not items:
        raise bad_field("messages", value, "at least one message")
    return tuple(_message(item, f"messages[{index}]") for index, item in enumerate(items))


def read_tools(value: object) -> tuple[Tool, ...]:
    """Function tools, as they were sent. Raises RefusedError."""
    if value is None:
        return ()
    return tuple(_tool(item, f"tools[{index}]") for index, item in enumerate(array(value, "tools")))


def _message(item: object, name: str) -> Message:
    fields = mapping(item, name)
    given = fields.get("role")
    role = _ROLES.get(given) if isinstance(given, str) else None
    if role is None:
        raise bad_field(f"{name}.role", given, f"one of {', '.join(_ROLES)}")
    calls = fields.get("tool_calls") or None
    if calls is not None and role != "assistant":
        raise bad_field(f"{name}.tool_calls", calls, "no tool calls in a message that is not the assistant's")
    content = fields.get("content")
    if content is None and role != "assistant":
        raise bad_field(f"{name}.content", content, "a string or an array of text parts")
    message: dict[str, Any] = {"role": role, "content": "" if content is None else _content(content, f"{name}.content")}
    if calls is not None:
        items = array(calls, f"{name}.tool_calls")
        message["tool_calls"] = [_call(call, f"{name}.tool_calls[{index}]") for index, call in enumerate(items)]
    for key in ("tool_call_id", "name"):
        if fields.get(key) is not None:
            message[key] = text(fields[key], f"{name}.{key}")
    return message


def _content(value: object, name: str) -> str:
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise bad_field(name, value, "a string or an array of text parts")
    return "\n".join(_part(part, f"{name}[{index}]") for index, part in enumerate(value))


def _part(item: object, name: str) -> str:
    part = mapping(item, name)
    kind = part.get("type")
    if kind not in ("text", "refusal"):
        raise bad_field(f"{name}.type", kind, "text: this model reads nothing else")
    if not isinstance(part.get(kind), str):
        raise bad_field(f"{name}.{kind}", part.get(kind), "a string")
    return str(part[kind])


def _call(item: object, name: str) -> dict[str, Any]:
    call = mapping(item, name)
    function = mapping(call.get("function"), f"{name}.function")
    arguments = function.get("arguments")
    if not isinstance(arguments, str):
        raise bad_field(f"{name}.function.arguments", arguments, "a string of JSON")
    neutral = {
        "type": "function",
        "function": {"name": text(function.get("name"), f"{name}.function.name"), "arguments": _arguments(arguments)},
    }
    if call.get("id") is not None:
        neutral["id"] = text(call["id"], f"{name}.id")
    return neutral


def _arguments(arguments: str) -> Any:
    """The object that ``arguments`` spells, which chat templates print; the string itself where it spells none."""
    try:
        value = msgspec.json.decode(arguments)
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        return arguments
    return value if isinstance(value, dict) else arguments


def _tool(item: object, name: str) -> Tool:
    tool = mapping(item, name)
    if tool.get("type") != "function":
        raise bad_field(f"{name}.type", tool.get("type"), "function: no other tools can be called")
    function = mapping(tool.get("function"), f"{name}.function")
    text(function.get("name"), f"{name}.function.name")
    parameters = mapping(function.get("parameters") or {}, f"{name}.function.parameters")
    required = parameters.get("required")
    if required is not None:
        for index, key in enumerate(array(required, f"{name}.function.parameters.required")):
            text(key, f"{name}.function.parameters.required[{index}]")
    return tool
