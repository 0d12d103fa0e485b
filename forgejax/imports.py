"""Python objects that a configuration names: ``module:name``, or ``path/to/file.py:name``."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from forgejax.errors import ConfigError


def load_object(path: str, what: str) -> Any:
    """Imports what ``path`` names; ``what`` it is stands in the error.

    Raises ConfigError where there is no such module, file or name.
    """
    place, _, name = path.rpartition(":")
    try:
        module = _load_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
        return getattr(module, name)
    except (ImportError, AttributeError, ValueError, OSError) as error:
        raise ConfigError(
            f'{what} "{path}" cannot be imported: {error}; expected "module:name" or "path/to/file.py:name"'
        ) from error


def _load_file(file: Path) -> ModuleType:
    """The module in a file, the same one each time."""
    known = sys.modules.get(name := f"forgejax_loaded.{file.resolve()}")
    if known is not None:
        return known
    if not file.is_file():
        raise FileNotFoundError(f"there is no file {file}")
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ImportError(f"{file} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up while it is being made
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
