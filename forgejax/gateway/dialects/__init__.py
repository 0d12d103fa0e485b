"""Wire formats, one a file. The first words the errors of paths that are nobody's."""

from collections.abc import Sequence

from forgejax.gateway.dialects.anthropic_messages import AnthropicMessages
from forgejax.gateway.dialects.base import Dialect
from forgejax.gateway.dialects.chat_completions import ChatCompletions
from forgejax.gateway.dialects.responses import Responses

DIALECTS: Sequence[Dialect] = (ChatCompletions(), Responses(), AnthropicMessages())

__all__ = ["DIALECTS", "Dialect"]
