"""What a process finds of its own when its episode begins: values for its placeholders, a home and the files in it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from forgejax.agents.scaffolds.base import AgentConfig, EpisodeSpec
from forgejax.environments.scratch import make_scratch, remove_tree
from forgejax.errors import AgentError

PLACEHOLDERS = ("question", "base_url", "origin", "api_key", "model", "context", "home")
_PLACEHOLDER = re.compile(rf"{{({'|'.join(PLACEHOLDERS)})}}")


@dataclass(frozen=True, kw_only=True)
class Lodging:
    """The values of one episode's placeholders, and where its process works; None leaves it where the trainer is.

    ``root`` holds the home and the folder to work in, where the configuration asks for a ``{home}``.
    """

    values: Mapping[str, str]
    directory: Path | None
    root: Path | None = None

    def fill(self, text: str) -> str:
        """Puts the episode's values into a word of the configuration; other braces are left as they are."""
        return _PLACEHOLDER.sub(lambda found: self.values[found[1]], text)

    def leave(self) -> None:
        """Takes home and folder away. What cannot be removed goes with the process, or when another one begins."""
        if self.root is not None:
            remove_tree(self.root)


def prepare_lodging(config: AgentConfig, episode: EpisodeSpec) -> Lodging:
    """Makes the home of an episode and writes ``config.files`` into it; blocks. Raises AgentError where it cannot."""
    parts = urlsplit(episode.base_url)
    values = {
        "question": episode.question,
        "base_url": episode.base_url,
        "origin": f"{parts.scheme}://{parts.netloc}",
        "api_key": episode.api_key,
        "model": episode.model,
        "context": str(episode.context_length),
    }
    directory = episode.workspace.directory
    if not asks_for_home(config):
        return Lodging(values=values, directory=directory)
    try:
        root = make_scratch("episode")
        home, work = root / "home", root / "work"
        home.mkdir()
        work.mkdir()
        lodging = Lodging(values={**values, "home": str(home)}, directory=directory or work, root=root)
        for name, content in config.files.items():
            place = home / name
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(lodging.fill(content), encoding="utf-8")
    except OSError as error:
        raise AgentError(f"the home of an episode cannot be made: {error}; make room, or set TMPDIR") from error
    return lodging


def asks_for_home(config: AgentConfig) -> bool:
    """Whether the program is given a home of its own in each episode."""
    return bool(config.files) or any("{home}" in text for text in list_texts(config))


def list_texts(config: AgentConfig) -> Iterable[str]:
    """Every text of the configuration in which placeholders are filled."""
    return (*config.command, *config.env.values(), *config.files.values(), config.answer_file)
