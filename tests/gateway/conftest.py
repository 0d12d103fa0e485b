"""The tokenizer folder is trained once: it never changes."""

from pathlib import Path

import pytest

from forgejax.gateway import ChatFormat

from .fakes import save_tokenizer


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def chat_format(tokenizer_folder: Path) -> ChatFormat:
    return ChatFormat.load(tokenizer_folder)
