"""Settings every test runs under: 8 fake CPU devices and no silent rank promotion."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_NUM_CPU_DEVICES"] = "8"
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # compiled in many variants, run a few times: quickly, not well
os.environ["NPROC"] = "32"  # threads for the collectives of 8 devices; see forgejax/sharding/mesh.py

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from forgejax.chat import ChatFormat


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained once: it never changes."""
    from tests.chat.tokenizers import save_tokenizer  # noqa: PLC0415

    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def chat_format(tokenizer_folder: Path) -> "ChatFormat":
    from forgejax.chat import ChatFormat  # noqa: PLC0415

    return ChatFormat.load(tokenizer_folder)
