"""The messages and tools of OpenAI's chat completions, read into neutral ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from forgejax.chat.messages import Message, MessagePart, ReasoningPart, RefusalPart, Role, TextPart, Tool, read_call
from forgejax.gateway.dialects.fields import read_array, read_mapping, read_text, spell_json
from forgejax.gateway.refusals import refuse_field

ROLES: Mapping[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "function": "tool",
}


def read_messages(value: object) -> tuple[Message, ...]:
    """At least one message, each a neutral one. Raises RefusedError."""
    items = read_array(value, "messages")
    if not items:
        raise refuse_field("messages", value, "at least one message")
    return tuple(_read_message(item, f"messages[{index}]") for index, item in enumerate(items))


def read_tools(body: Mapping[str, Any]) -> tuple[Tool, ...]:
    """Function tools, as they were sent, those of the older ``functions`` field among them. Raises RefusedError."""
    tools = [] if body.get("tools") is None else read_array(body["tools"], "tools")
    functions = [] if body.get("functions") is None else read_array(body["functions"], "functions")
    return (
        *(_read_tool(item, f"tools[{index}]") for index, item in enumerate(tools)),
        *(read_function(item, f"functions[{index}]") for index, item in enumerate(functions)),
    )


def read_function(item: object, name: str) -> Tool:
    """A function as a tool. Raises RefusedError where a template could not print it."""
    function = read_mapping(item, name)
    read_text(function.get("name"), f"{name}.name")
    parameters = read_mapping(function.get("parameters") or {}, f"{name}.parameters")
    required = parameters.get("required")
    if required is not None:
        for index, key in enumerate(read_array(required, f"{name}.parameters.required")):
            read_text(key, f"{name}.parameters.required[{index}]")
    return {"type": "function", "function": function}


def read_parts(value: object, name: str, kinds: Sequence[str], *, others_told: bool = False) -> str:
    """A string, or the texts of an array of parts of these kinds, one line each. Null is the empty string.

    With ``others_told`` a part of another kind is told of instead of refused: what a tool returned stays in the history
    for good, and must not end the episode. Raises RefusedError.
    """
    if value is None or isinstance(value, str):
        return value or ""
    if not isinstance(value, list):
        raise refuse_field(name, value, "a string or an array of text parts")
    return "\n".join(
        read_part(part, f"{name}[{index}]", kinds, others_told=others_told) for index, part in enumerate(value)
    )


def read_part(item: object, name: str, kinds: Sequence[str], *, others_told: bool = False) -> str:
    """The text of one part."""
    part = read_mapping(item, name)
    kind = part.get("type")
    if kind not in kinds:
        if others_told and isinstance(kind, str):
            return f"[{kind}: not shown, for this model reads text alone]"
        raise refuse_field(f"{name}.type", kind, f"{kinds[0]}: this model reads nothing else")
    text = part.get("refusal" if kind == "refusal" else "text")
    if not isinstance(text, str):
        raise refuse_field(f"{name}.text", text, "a string")
    return text


def _read_message(item: object, name: str) -> Message:
    fields = read_mapping(item, name)
    given = fields.get("role")
    role = ROLES.get(given) if isinstance(given, str) else None
    if role is None:
        raise refuse_field(f"{name}.role", given, f"one of {', '.join(ROLES)}")
    calls = fields.get("tool_calls") or None
    if calls is not None and role != "assistant":
        raise refuse_field(f"{name}.tool_calls", calls, "no tool calls in a message that is not the assistant's")
    content = fields.get("content")
    if content is None and role in ("system", "user"):
        raise refuse_field(f"{name}.content", content, "a string or an array of text parts")
    named = {
        key: read_text(fields[key], f"{name}.{key}") for key in ("tool_call_id", "name") if fields.get(key) is not None
    }
    text = read_parts(content, f"{name}.content", ("text", "refusal"), others_told=role == "tool")
    if role != "assistant":
        return Message(role=role, parts=(TextPart(text=text),), **named)
    parts: list[MessagePart] = _read_reasoning(fields, name)
    if text:
        parts.append(TextPart(text=text))
    if fields.get("refusal") is not None:
        parts.append(RefusalPart(text=read_text(fields["refusal"], f"{name}.refusal")))
    for index, call in enumerate(read_array(calls or [], f"{name}.tool_calls")):
        parts.append(_read_call(call, f"{name}.tool_calls[{index}]"))
    if fields.get("function_call") is not None:
        parts.append(_read_function_call(fields["function_call"], f"{name}.function_call"))
    return Message(role=role, parts=tuple(parts), **named)


def _read_reasoning(fields: Mapping[str, Any], name: str) -> list[MessagePart]:
    """What was thought, under either of the two names it goes by."""
    for key in ("reasoning_content", "reasoning"):
        given = fields.get(key)
        if isinstance(given, str):
            return [ReasoningPart(text=given)] if given else []
        if given is not None and not isinstance(given, dict | list):
            raise refuse_field(f"{name}.{key}", given, "a string")
    return []


def _read_call(item: object, name: str) -> MessagePart:
    call = read_mapping(item, name)
    id_ = None if call.get("id") is None else read_text(call["id"], f"{name}.id")
    return _read_function_call(call.get("function"), f"{name}.function", id_)


def _read_function_call(item: object, name: str, id_: str | None = None) -> MessagePart:
    function = read_mapping(item, name)
    arguments = function.get("arguments")
    raw = spell_json(arguments) if isinstance(arguments, dict) else arguments
    if raw is not None and not isinstance(raw, str):
        raise refuse_field(f"{name}.arguments", arguments, "a string of JSON")
    return read_call(read_text(function.get("name"), f"{name}.name"), raw or "", id_)


def _read_tool(item: object, name: str) -> Tool:
    tool = read_mapping(item, name)
    if tool.get("type") != "function":
        raise refuse_field(f"{name}.type", tool.get("type"), "function: no other tools can be called")
    return {**tool, **read_function(tool.get("function"), f"{name}.function")}
