"""What a configuration names is found, or the sentence says what is missing."""

from pathlib import Path

import pytest

from forgejax.errors import ConfigError
from forgejax.imports import load_object

FILE = """
from dataclasses import dataclass

@dataclass
class Made:
    value: int = 3
"""


def test_a_name_in_a_module_and_a_name_in_a_file_are_found(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(FILE, encoding="utf-8")

    assert load_object("json:dumps", "it")([1]) == "[1]"
    assert load_object(f"{tmp_path}/mine.py:Made", "it")().value == 3


def test_a_file_is_loaded_once(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(FILE, encoding="utf-8")
    found = [load_object(f"{tmp_path}/mine.py:Made", "it") for _ in range(2)]

    assert found[0] is found[1]


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        ("no_such_module:name", "No module named 'no_such_module'"),
        ("json:no_such_name", "has no attribute 'no_such_name'"),
        ("nowhere/mine.py:name", "there is no file nowhere/mine.py"),
        ("json", "Empty module name"),
    ],
)
def test_what_is_not_there_is_told_with_what_is_expected(path: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=rf'^agent function "{path}" cannot be imported: .*{problem}') as caught:
        load_object(path, "agent function")
    assert str(caught.value).endswith('expected "module:name" or "path/to/file.py:name"')


def test_a_file_that_fails_while_it_is_loaded_is_not_half_loaded(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("raise ImportError('not today')", encoding="utf-8")
    for _ in range(2):
        with pytest.raises(ConfigError, match="not today"):
            load_object(f"{tmp_path}/mine.py:Made", "it")
