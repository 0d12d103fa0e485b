"""The content blocks of Anthropic's Messages: read into neutral messages and tools, and made of a reply."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from forgejax.chat.messages import Message, MessagePart, ReasoningPart, TextPart, Tool, ToolCallPart, read_call
from forgejax.gateway.dialects.base import name_call
from forgejax.gateway.dialects.chat_messages import read_function, read_part, read_parts
from forgejax.gateway.dialects.fields import read_array, read_mapping, read_text, spell_json
from forgejax.gateway.refusals import refuse_field

_BILLING = "x-anthropic-billing-header:"  # Claude Code's first system block: another one in each request, for no model
_ERRORS = ("error", "<tool_use_error>")


def read_system(value: object) -> tuple[Message, ...]:
    """A string or text blocks; no message where there is nothing for the model in it."""
    if isinstance(value, list):
        texts = [read_part(block, f"system[{index}]", ("text",)) for index, block in enumerate(value)]
        text = "\n".join(text for text in texts if not text.startswith(_BILLING))
    else:
        text = read_parts(value, "system", ("text",))
    return (Message.of_text("system", text),) if text else ()


def read_dialogue(value: object) -> tuple[Message, ...]:
    """At least one message; results of tools are messages of their own, neighbours of the assistant's are one."""
    items = read_array(value, "messages")
    if not items:
        raise refuse_field("messages", value, "at least one message")
    messages: list[Message] = []
    for index, item in enumerate(items):
        name = f"messages[{index}]"
        fields = read_mapping(item, name)
        role, content = fields.get("role"), fields.get("content")
        if role == "assistant":
            parts = _read_assistant(content, f"{name}.content")
            if messages and messages[-1].role == "assistant":
                parts = (*messages.pop().parts, *parts)
            messages.append(Message(role="assistant", parts=parts))
        elif role == "user":
            messages += _read_user(content, f"{name}.content")
        elif role == "system":
            messages.append(Message.of_text("system", read_parts(content, f"{name}.content", ("text",))))
        else:
            raise refuse_field(f"{name}.role", role, "one of user, assistant, system")
    return tuple(messages)


def read_schemas(value: object) -> tuple[Tool, ...]:
    """The tools an agent runs itself, by their schema; tools of the vendor's own kinds are left out."""
    tools: list[Tool] = []
    for index, item in enumerate([] if value is None else read_array(value, "tools")):
        name = f"tools[{index}]"
        tool = read_mapping(item, name)
        if tool.get("type") in (None, "custom"):
            function = {"name": tool.get("name"), "parameters": tool.get("input_schema") or {}}
            if tool.get("description") is not None:
                function["description"] = read_text(tool["description"], f"{name}.description")
            tools.append(read_function(function, name))
    return tuple(tools)


def has_vendors_tools(value: object) -> bool:
    tools = value if isinstance(value, list) else []
    return any(isinstance(tool, dict) and tool.get("type") not in (None, "custom") for tool in tools)


def word_block(part: MessagePart, index: int) -> dict[str, Any]:
    """One part of a reply as a content block. Arguments that are no object are told as such: a block holds one."""
    if isinstance(part, ReasoningPart):
        return {"type": "thinking", "thinking": part.text, "signature": part.signature or ""}
    if isinstance(part, ToolCallPart):
        given = {"INVALID_JSON": part.raw} if part.arguments is None else part.arguments
        return {"type": "tool_use", "id": name_call(part.id, index), "name": part.name, "input": given}
    return {"type": "text", "text": part.text, "citations": None}


def _read_user(content: object, name: str) -> list[Message]:
    if not isinstance(content, list):
        if content is None:
            raise refuse_field(name, content, "a string or an array of blocks")
        return [Message.of_text("user", read_parts(content, name, ("text",)))]
    messages: list[Message] = []
    texts: list[str] = []
    for index, item in enumerate(content):
        block = read_mapping(item, f"{name}[{index}]")
        if block.get("type") != "tool_result":
            texts.append(read_part(block, f"{name}[{index}]", ("text",)))
            continue
        if texts:
            messages.append(Message.of_text("user", "\n".join(texts)))
            texts = []
        messages.append(_read_result(block, f"{name}[{index}]"))
    if texts or not messages:
        messages.append(Message.of_text("user", "\n".join(texts)))
    return messages


def _read_result(block: Mapping[str, Any], name: str) -> Message:
    text = read_parts(block.get("content"), f"{name}.content", ("text",), others_told=True)
    if block.get("is_error") is True and not text.lower().startswith(_ERRORS):
        text = f"Error: {text}"
    call_id = read_text(block.get("tool_use_id"), f"{name}.tool_use_id")
    return Message(role="tool", parts=(TextPart(text=text),), tool_call_id=call_id)


def _read_assistant(content: object, name: str) -> tuple[MessagePart, ...]:
    if not isinstance(content, list):
        text = read_parts(content, name, ("text",))
        return (TextPart(text=text),) if text else ()
    return tuple(
        _read_block(read_mapping(item, f"{name}[{index}]"), f"{name}[{index}]") for index, item in enumerate(content)
    )


def _read_block(block: Mapping[str, Any], name: str) -> MessagePart:
    kind = block.get("type")
    if kind == "text":
        return TextPart(text=read_part(block, name, ("text",)))
    if kind in ("thinking", "redacted_thinking"):
        signature = block.get("signature" if kind == "thinking" else "data")
        thought = block.get("thinking") or ""
        if not isinstance(thought, str):
            raise refuse_field(f"{name}.thinking", thought, "a string")
        return ReasoningPart(text=thought, signature=signature if isinstance(signature, str) and signature else None)
    if kind == "tool_use":
        given = block.get("input")
        raw = given if isinstance(given, str) else spell_json({} if given is None else given)
        if isinstance(given, dict) and set(given) == {"INVALID_JSON"} and isinstance(given["INVALID_JSON"], str):
            raw = given["INVALID_JSON"]
        return read_call(read_text(block.get("name"), f"{name}.name"), raw, read_text(block.get("id"), f"{name}.id"))
    if isinstance(kind, str):
        # A vendor's own block, of a history that was held elsewhere: what it says is all that can be kept of it.
        return TextPart(text=spell_json(block))
    raise refuse_field(f"{name}.type", kind, "the name of a block's type")
