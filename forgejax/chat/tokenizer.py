"""A Hugging Face tokenizer folder, read and checked."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

from forgejax.chat.codec import TextCodec
from forgejax.chat.thoughts import THOUGHT_TAGS
from forgejax.chat.tool_calls import TOOL_CALL_FORMATS
from forgejax.errors import GatewayError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True, kw_only=True)
class TokenizerFolder:
    """``tokenizer`` is loaded from ``path``; ``content`` is its tokenizer.json."""

    path: Path
    tokenizer: PreTrainedTokenizerFast
    content: Mapping[str, Any]

    @classmethod
    def read(cls, path: Path) -> TokenizerFolder:
        """Raises GatewayError where something is missing or damaged."""
        if not path.is_dir():
            raise GatewayError(f"tokenizer folder {path} does not exist; give a folder that holds tokenizer.json")
        content = _read_json(path / "tokenizer.json")
        _read_json(path / "tokenizer_config.json")
        # Imported here: it takes a second, and only what loads a tokenizer should wait for it.
        from transformers import PreTrainedTokenizerFast  # noqa: PLC0415

        try:
            tokenizer = PreTrainedTokenizerFast.from_pretrained(path, local_files_only=True)
        except (ValueError, TypeError, KeyError, AttributeError, OSError) as error:
            raise GatewayError(
                f"tokenizer folder {path} cannot be loaded: {error}; save the tokenizer again"
            ) from error
        if not tokenizer.chat_template:
            raise GatewayError(
                f"tokenizer folder {path} has no chat template; add chat_template to tokenizer_config.json, "
                "or a chat_template.jinja file"
            )
        if not tokenizer.backend_tokenizer.get_added_tokens_decoder():
            raise GatewayError(f"tokenizer folder {path} has no special tokens; a chat needs one that ends a turn")
        return cls(path=path, tokenizer=tokenizer, content=content)

    @property
    def template_source(self) -> str:
        template = self.tokenizer.chat_template
        return template if isinstance(template, str) else json.dumps(template)

    def codec(self, ends: Collection[str]) -> TextCodec:
        """``ends`` are hidden from agents whatever the folder says of them, and so is every end of sequence."""
        backend: Tokenizer = self.tokenizer.backend_tokenizer
        shown = {marker for tool_format in TOOL_CALL_FORMATS.values() for marker in tool_format.markers}
        shown.update(tag for pair in THOUGHT_TAGS for tag in pair)  # templates look for them in what an agent sends
        ending = self.read_end_ids()
        hidden = {
            token.content
            for id_, token in backend.get_added_tokens_decoder().items()
            if token.content in ends or id_ in ending or (token.special and token.content not in shown)
        }
        plain = {**self.content, "added_tokens": [], "post_processor": None}
        first = Tokenizer.from_str(json.dumps(plain))
        behind = {**plain, "pre_tokenizer": _behind_a_token(plain.get("pre_tokenizer"))}
        inner = first if behind == plain else Tokenizer.from_str(json.dumps(behind))
        return TextCodec(backend, first, inner, hidden)

    def read_end_ids(self) -> frozenset[int]:
        """The tokenizer's own end of sequence, and those ``generation_config.json`` names, where there is one."""
        eos = self.tokenizer.eos_token_id
        ids = set() if eos is None else {int(eos)}
        generation = self.path / "generation_config.json"
        if generation.exists():
            named = _read_json(generation).get("eos_token_id") or []
            ids.update(named if isinstance(named, list) else [named])
        return frozenset(ids)

    def check_encoding(self, codec: TextCodec, text: str) -> None:
        """Pieces of ``text`` encoded one by one must give what the tokenizer gives for the whole."""
        whole = self.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
        if codec.encode(text) != whole:
            raise GatewayError(
                f"the tokenizer in {self.path} encodes text differently beside special tokens; "
                "use a tokenizer whose special tokens neither strip white space nor normalize"
            )


def _behind_a_token(pre_tokenizer: Any) -> Any:
    """The pre-tokenizer as it acts on text behind a special token: a space that goes before a text's first word only
    does not go before other words."""
    if isinstance(pre_tokenizer, list):
        return [_behind_a_token(item) for item in pre_tokenizer]
    if not isinstance(pre_tokenizer, Mapping):
        return pre_tokenizer
    inner = {key: _behind_a_token(item) for key, item in pre_tokenizer.items()}
    if inner.get("type") == "Metaspace" and inner.get("prepend_scheme") == "first":
        inner["prepend_scheme"] = "never"
    return inner


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise GatewayError(f"{path} is missing; save the tokenizer there (tokenizer.save_pretrained)") from error
    except (OSError, ValueError) as error:
        raise GatewayError(f"{path} cannot be read as JSON: {error}; save the tokenizer again") from error
    if not isinstance(value, dict):
        raise GatewayError(f"{path} holds {type(value).__name__}; expected a JSON object; save the tokenizer again")
    return value
