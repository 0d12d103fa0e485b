"""What cannot be configured."""

from __future__ import annotations

import math
from typing import Any

import pytest

from forgejax.errors import ConfigError
from forgejax.gateway import GatewayConfig


@pytest.mark.parametrize(
    "wrong",
    [
        {"port": 70000},
        {"tool_format": "xml"},
        {"max_tokens_default": 0},
        {"max_tokens_limit": 0},
        {"cancel_grace_s": 0},
        {"host": ""},
        {"body_timeout_s": math.nan},
    ],
)
def test_impossible_settings_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"gateway.{next(iter(wrong))}"):
        GatewayConfig(**wrong)
