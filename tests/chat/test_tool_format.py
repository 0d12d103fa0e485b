"""The tool-call format of a policy."""

from __future__ import annotations

import pytest

from forgejax.chat import ChatFormat
from forgejax.chat.tool_calls import TOOL_CALL_FORMATS
from forgejax.chat.tool_format import choose_tool_format
from tests.chat.families import FAMILIES, load_families


@pytest.fixture(scope="module")
def formats(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ChatFormat]:
    return load_families(tmp_path_factory.mktemp("families"))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_tool_format_is_the_one_the_template_writes(formats: dict[str, ChatFormat], family: str) -> None:
    name = FAMILIES[family][3]
    assert choose_tool_format("auto", formats[family]) is (None if name is None else TOOL_CALL_FORMATS[name])
    assert choose_tool_format("llama3", formats[family]) is TOOL_CALL_FORMATS["llama3"]
