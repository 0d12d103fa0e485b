"""Typed reading of JSON bodies: a wrong type is a 400 that names the field, what was given and what was expected."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from forgejax.chat.messages import CallRule, Tool
from forgejax.gateway.refusals import refuse_field
from forgejax.types import SamplingLaw

_MOST_STOPS = 64
_LONGEST_STOP = 256
_MOST_BIASES, _LARGEST_BIAS = 300, 100.0

IGNORED = frozenset(
    {
        "background",
        "chat_template_kwargs",
        "container",
        "context_management",
        "continue_final_message",
        "conversation",
        "frequency_penalty",
        "guided_json",
        "include",
        "inference_geo",
        "logit_bias",
        "max_tool_calls",
        "mcp_servers",
        "min_tokens",
        "modalities",
        "output_config",
        "parallel_tool_calls",
        "prediction",
        "presence_penalty",
        "prompt",
        "reasoning",
        "reasoning_effort",
        "repetition_penalty",
        "response_format",
        "speed",
        "stop_token_ids",
        "stream_options",
        "text",
        "thinking",
        "tools",
        "truncation",
        "verbosity",
        "web_search_options",
    }
)
"""Fields of the vendors' APIs that have no effect here, in one dialect or another; they are counted by name."""


def read_integer(
    body: Mapping[str, Any], name: str, *, least: int | None = None, most: int | None = None, default: int | None = None
) -> int | None:
    """An integer in [least, most]; null and absence give ``default``. An integral float counts."""
    value = body.get(name)
    if value is None:
        return default
    bounds = "" if least is None else f" of at least {least}"
    bounds += "" if most is None else f" and at most {most}"
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool):
        raise refuse_field(name, value, f"an integer{bounds}")
    if (least is not None and value < least) or (most is not None and value > most):
        raise refuse_field(name, value, f"an integer{bounds}")
    return value


def read_number(body: Mapping[str, Any], name: str, *, default: float) -> float:
    """A finite number; null and absence give ``default``."""
    value = body.get(name)
    if value is None:
        return default
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise refuse_field(name, value, "a number")
    try:
        number = float(value)
    except OverflowError:  # an integer beyond what a float holds
        number = math.inf
    if not math.isfinite(number):
        raise refuse_field(name, value, "a number")
    return number


def read_boolean(body: Mapping[str, Any], name: str) -> bool:
    """A boolean; null and absence are false."""
    value = body.get(name)
    if value is None:
        return False
    if not isinstance(value, bool):
        raise refuse_field(name, value, "true or false")
    return value


def read_mapping(value: object, name: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise refuse_field(name, value, "an object")
    return value


def read_text(value: object, name: str) -> str:
    """A non-empty string."""
    if not isinstance(value, str) or not value:
        raise refuse_field(name, value, "a non-empty string")
    return value


def read_array(value: object, name: str) -> list[Any]:
    if not isinstance(value, list):
        raise refuse_field(name, value, "an array")
    return value


def spell_json(value: Any) -> str:
    """JSON as it goes over the wire and into texts: characters as they are."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def read_law(body: Mapping[str, Any]) -> SamplingLaw:
    """Temperature, top-p, top-k, min-p. What lies out of range is the nearest that can be drawn from: the run's own law
    overrides it in training, and is no reason to end an episode."""
    temperature = min(max(read_number(body, "temperature", default=1.0), 0.0), 2.0)
    top_p = min(read_number(body, "top_p", default=1.0), 1.0)
    top_k = max(0, read_integer(body, "top_k", least=-1) or 0)
    if top_p <= 0.0:
        top_p, top_k = 1.0, 1  # the smallest nucleus there is holds one token
    min_p = min(max(read_number(body, "min_p", default=0.0), 0.0), 1.0)
    return SamplingLaw(temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p)


def read_bias(body: Mapping[str, Any], name: str) -> tuple[tuple[int, float], ...]:
    """Token ids and what is added to their logits, by id; at most 100 either way, as OpenAI has it."""
    value = body.get(name)
    if value is None:
        return ()
    given = read_mapping(value, name)
    if len(given) > _MOST_BIASES:
        raise refuse_field(name, f"an object of {len(given)}", f"at most {_MOST_BIASES} token ids")
    found: dict[int, float] = {}
    for id_ in given:
        if not (id_.isascii() and id_.isdecimal() and len(id_) < 10):
            raise refuse_field(name, id_, "token ids as keys")
        field = f"{name}.{id_}"
        bias = read_number({field: given[id_]}, field, default=0.0)
        found[int(id_)] = min(max(bias, -_LARGEST_BIAS), _LARGEST_BIAS)
    return tuple(sorted(found.items()))


def read_limit(body: Mapping[str, Any], name: str) -> int | None:
    """A limit of tokens; -1 is none."""
    limit = read_integer(body, name, least=-1)
    if limit == 0:
        raise refuse_field(name, 0, "an integer of at least 1, or -1 for no limit")
    return None if limit == -1 else limit


def read_stops(body: Mapping[str, Any], name: str) -> tuple[str, ...]:
    """A string or an array of strings; empty ones stop nothing. More, or longer ones, than anybody means are refused:
    the engine looks for all of them at every token, while all others wait."""
    value = body.get(name)
    if value is None:
        return ()
    items = [value] if isinstance(value, str) else read_array(value, name)
    if len(items) > _MOST_STOPS:
        raise refuse_field(name, f"an array of {len(items)}", f"at most {_MOST_STOPS} strings")
    stops = tuple(read_text(item, f"{name}[{index}]") for index, item in enumerate(items) if item != "")
    longest = max(map(len, stops), default=0)
    if longest > _LONGEST_STOP:
        raise refuse_field(name, f"{longest} characters long", f"at most {_LONGEST_STOP} in each string")
    return stops


def list_ignored(body: Mapping[str, Any], served: frozenset[str]) -> tuple[str, ...]:
    """The fields that were sent and have no effect, those nobody knows as ``other``; null asks for nothing."""
    sent = {name for name, value in body.items() if value is not None} - served
    return tuple(sorted({name if name in IGNORED else "other" for name in sent}))


@dataclass(frozen=True, kw_only=True)
class CallChoice:
    """Whether the policy may or must call, and which tools; ``allowed`` is None for all of them."""

    rule: CallRule
    allowed: frozenset[str] | None


def choose_calls(rule: object, named: Sequence[object] | None, tools: Sequence[Tool], field: str) -> CallChoice:
    """What a request chooses in ``field``. Raises RefusedError where it must call and cannot."""
    rules: Mapping[str, CallRule] = {"auto": "auto", "none": "none", "required": "required"}
    if not isinstance(rule, str) or rule not in rules:
        raise refuse_field(field, rule, "none, auto, required, a tool's name or allowed tools")
    known = {tool["function"]["name"] for tool in tools}
    allowed = None if named is None else frozenset(name for name in named if isinstance(name, str))
    if allowed is not None and (not allowed or not allowed <= known):
        raise refuse_field(field, list(named or ()), f"names of the tools that were sent: {', '.join(sorted(known))}")
    if rules[rule] == "required" and not tools:
        raise refuse_field(field, rule, "none or auto where no tools are sent")
    return CallChoice(rule=rules[rule], allowed=allowed)
