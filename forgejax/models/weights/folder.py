"""Where weights come from: a Hugging Face folder or a GGUF file, its settings as a config.json, its tensors by row."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from numpy.typing import NDArray

from forgejax.errors import CheckpointError, ConfigError
from forgejax.models.families import Family, family_of
from forgejax.models.policy import PolicyConfig
from forgejax.models.weights.gguf_file import GgufSource, gguf_settings
from forgejax.models.weights.safetensors_file import SafetensorsFile

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


@runtime_checkable
class Source(Protocol):
    """Stored tensors, under the names of the Hugging Face layout."""

    shapes: Mapping[str, tuple[int, ...]]

    def rows(self, name: str, start: int, stop: int) -> NDArray[Any]:
        """Rows ``start`` to ``stop`` of a tensor, a float array that may be a view. Raises CheckpointError."""
        ...

    def release(self) -> None:
        """Gives memory behind rows that were read back; no view of them may be used after."""
        ...


def read_settings(path: Path) -> dict[str, Any]:
    """The ``config.json`` of a folder, or what a GGUF file says in its place. Raises ConfigError."""
    if path.suffix == ".gguf":
        return gguf_settings(path)
    file = path / "config.json"
    if not path.is_dir():
        raise ConfigError(
            f"policy.path {path} is no folder; give a Hugging Face folder or a .gguf file "
            "(python scripts/fetch_model.py smollm2 makes a small one)"
        )
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} cannot be read: {error}; give a Hugging Face folder or a .gguf file") from error
    if not isinstance(settings, dict):
        raise ConfigError(f"{file} holds {type(settings).__name__}; expected a JSON object")
    return settings


def read_policy_config(path: str | Path, base: PolicyConfig) -> PolicyConfig:
    """``base`` with the architecture of the weights in ``path``; path, param_dtype and compute_dtype are kept.

    Raises:
        ConfigError: no weights there, a family or a setting that is not supported (the message names the key).
    """
    settings = read_settings(Path(path))
    try:
        return family_of(settings).read(settings, base)
    except ConfigError as error:
        raise ConfigError(f"{path} cannot be loaded: {error}") from error


def open_source(path: Path, family: Family, num_layers: int) -> Source:
    """The tensors of a folder or a GGUF file. Raises CheckpointError."""
    return GgufSource(path, family, num_layers) if path.suffix == ".gguf" else FolderSource(path)


class FolderSource:
    """The safetensors of a folder: one file, or several with an index."""

    def __init__(self, folder: Path):
        files = [SafetensorsFile(folder / name) for name in _weight_files(folder)]
        self._file_of = {name: file for file in files for name in file.entries}
        self._files = files
        self.shapes: Mapping[str, tuple[int, ...]] = {
            name: file.entries[name].shape for name, file in self._file_of.items()
        }

    def rows(self, name: str, start: int, stop: int) -> NDArray[Any]:
        return self._file_of[name].rows(name, start, stop)

    def release(self) -> None:
        for file in self._files:
            file.release()


def _weight_files(folder: Path) -> list[str]:
    index = folder / _INDEX
    if not index.is_file():
        if (folder / _SINGLE).is_file():
            return [_SINGLE]
        raise CheckpointError(
            f"{folder} holds no weights: neither {_SINGLE} nor {_INDEX} is there; give a complete folder "
            "(weights in .bin files must be saved as safetensors first)"
        )
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(weight_map.values()))
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{index} cannot be read: {error!r}; copy the file again") from error
    absent = [name for name in names if not (folder / name).is_file()]
    if absent:
        raise CheckpointError(
            f"{index} names {len(names)} files; absent are {len(absent)}: {', '.join(absent[:8])}; copy them as well"
        )
    return names
