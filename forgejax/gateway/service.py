"""What every session of a gateway shares."""

from __future__ import annotations

from dataclasses import dataclass, field

from forgejax.chat.format import ChatFormat
from forgejax.chat.tool_calls import ToolCallFormat
from forgejax.gateway.config import GatewayConfig
from forgejax.gateway.limits import Limits
from forgejax.gateway.metrics import GatewayMetrics
from forgejax.gateway.records.base import SessionRecords
from forgejax.gateway.side_calls.rules import SideCallRules
from forgejax.grammar import GrammarCompiler
from forgejax.types import Sampler


@dataclass(frozen=True, kw_only=True)
class Service:
    """``tool_format`` is None where the policy knows no way to call tools; ``tell_tools`` says that the chat template
    prints none, so that the policy must be told of them."""

    sampler: Sampler
    chat_format: ChatFormat
    tool_format: ToolCallFormat | None
    tell_tools: bool
    context_length: int
    config: GatewayConfig
    metrics: GatewayMetrics
    grammars: GrammarCompiler
    limits: Limits
    side_calls: SideCallRules = field(default_factory=SideCallRules)
    records: SessionRecords = field(default_factory=SessionRecords)
