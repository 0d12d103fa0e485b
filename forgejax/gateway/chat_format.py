"""Chat messages <-> token ids, through a Hugging Face tokenizer folder and its chat template."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
from tokenizers import Tokenizer

from forgejax.errors import GatewayError
from forgejax.gateway.chat import Message, Tool
from forgejax.gateway.text_codec import StreamDecoder, TextCodec
from forgejax.gateway.tool_calls import TOOL_CALL_FORMATS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_PROBE: tuple[Message, ...] = (
    {"role": "user", "content": "First question?"},
    {"role": "assistant", "content": "Some answer."},
    {"role": "user", "content": "Second question."},
)


class TemplateError(GatewayError):
    """The chat template refuses these messages, or has no place for them."""


class ChatFormat:
    """The one place where chat becomes ids. Immutable; ``load`` checks that the folder can be used at all.

    A turn is ``prompt ids + sampled ids``; the sampled ids end in a stop id unless the reply was cut short.
    """

    def __init__(self, path: Path, template: PreTrainedTokenizerFast, codec: TextCodec) -> None:
        self._path = path
        self._template = template
        self.codec = codec
        self._turn_end = self._find_turn_end()
        self.end_of_turn_id = codec.control_id(self._turn_end)
        self.stop_ids = frozenset({self.end_of_turn_id}) | _end_of_sequence_ids(path, template)
        self.vocab_size = codec.vocab_size

    @classmethod
    def load(cls, path: str | Path) -> ChatFormat:
        """Reads ``tokenizer.json``, ``tokenizer_config.json`` and the chat template of a folder, without a network.

        Raises GatewayError where one is missing or damaged, or where the template cannot be used for chat.
        """
        folder = Path(path)
        if not folder.is_dir():
            raise GatewayError(f"tokenizer folder {folder} does not exist; give a folder that holds tokenizer.json")
        tokenizer_json = _read_json(folder / "tokenizer.json")
        _read_json(folder / "tokenizer_config.json")
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it would advise installing torch
        # Imported here: it takes a second, and only what loads a tokenizer should wait for it.
        from transformers import PreTrainedTokenizerFast  # noqa: PLC0415

        try:
            template = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
        except (ValueError, TypeError, KeyError, AttributeError, OSError) as error:
            raise GatewayError(
                f"tokenizer folder {folder} cannot be loaded: {error}; save the tokenizer again"
            ) from error
        if not template.chat_template:
            raise GatewayError(
                f"tokenizer folder {folder} has no chat template; add chat_template to tokenizer_config.json, "
                "or a chat_template.jinja file"
            )
        tokenizer: Tokenizer = template.backend_tokenizer
        added = tokenizer.get_added_tokens_decoder()
        if not added:
            raise GatewayError(f"tokenizer folder {folder} has no special tokens; a chat needs one that ends a turn")
        plain = Tokenizer.from_str(json.dumps(tokenizer_json | {"added_tokens": [], "post_processor": None}))
        shown = {marker for tool_format in TOOL_CALL_FORMATS.values() for marker in tool_format.markers}
        hidden = {id_ for id_, token in added.items() if token.special and token.content not in shown}
        chat_format = cls(folder, template, TextCodec(tokenizer, plain, hidden))
        chat_format._check_encoding(tokenizer)
        return chat_format

    def render(self, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> list[int]:
        """The ids of a whole prompt, up to where the assistant begins to speak. Raises TemplateError."""
        return self.codec.encode(self._text(messages, tools, prompt=True))

    def continuation(
        self, known_messages: Sequence[Message], new_messages: Sequence[Message], tools: Sequence[Tool] = ()
    ) -> list[int] | None:
        """The ids to append after an assistant turn that ended in its stop id, to get the next prompt.

        ``known_messages`` ends with that assistant message. Equal, as text, to what the whole prompt has after that
        turn; None where the template would change anything before it. Raises TemplateError.
        """
        before = self._text(known_messages[:-1], tools, prompt=True)
        spoken = self._text(known_messages, tools, prompt=False)
        whole = self._text((*known_messages, *new_messages), tools, prompt=True)
        if not (spoken.startswith(before) and whole.startswith(spoken)):
            return None
        end = spoken.rfind(self._turn_end, len(before))
        return None if end < 0 else self.codec.encode(whole[end + len(self._turn_end) :])

    def encode_assistant(self, message: Message, history: Sequence[Message] = _PROBE[:1]) -> list[int]:
        """The ids a policy samples to say ``message``, its end-of-turn id included.

        As text, ``render(history) + encode_assistant(message)`` begins ``render((*history, message, *more))``.
        Raises TemplateError where the template writes another prompt before a spoken message than before a new one.
        """
        before = self._text(history, (), prompt=True)
        spoken = self._text((*history, message), (), prompt=False)
        end = spoken.rfind(self._turn_end, len(before))
        if not spoken.startswith(before) or end < 0:
            raise TemplateError(
                f"the chat template in {self._path} does not write an assistant message after the generation prompt; "
                "such a template cannot show the policy what to say"
            )
        return self.codec.encode(spoken[len(before) : end + len(self._turn_end)])

    def decode(self, ids: Iterable[int]) -> str:
        """The text of sampled ids as an agent sees it: without special tokens, tool-call markers kept."""
        return self.codec.decode(ids)

    def stream_decoder(self) -> StreamDecoder:
        return StreamDecoder(self.codec)

    def _text(self, messages: Sequence[Message], tools: Sequence[Tool], *, prompt: bool) -> str:
        quoted = [
            self._quoted(message) if message["role"] != "assistant" else _with_object_arguments(message)
            for message in messages
        ]
        try:
            text = self._template.apply_chat_template(
                quoted,
                tools=[self._quoted(tool) for tool in tools] or None,
                add_generation_prompt=prompt,
                tokenize=False,
            )
        # The template is a program from outside: besides its own errors it may trip over whatever a message holds.
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
            raise TemplateError(
                f"the chat template does not accept these messages: {error}; change their roles, order or content"
            ) from error
        if not isinstance(text, str):
            raise TemplateError(f"the chat template rendered {type(text).__name__}; expected text")
        return text

    def _quoted(self, value: Any) -> Any:
        if isinstance(value, str):
            return self.codec.quoted(value)
        if isinstance(value, Mapping):
            return {key: self._quoted(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self._quoted(item) for item in value]
        return value

    def _find_turn_end(self) -> str:
        text = self._text(_PROBE[:2], (), prompt=False)
        answer = _PROBE[1]["content"]
        turn_end = self.codec.first_control(text.partition(answer)[2])
        if turn_end is None:
            raise GatewayError(
                f"the chat template in {self._path} does not end an assistant message with a special token; "
                f"it renders {text!r}; add one, or the policy can never stop"
            )
        return turn_end

    def _check_encoding(self, tokenizer: Tokenizer) -> None:
        """Pieces encoded one by one must give what the tokenizer gives for the whole."""
        text = self._text(_PROBE, (), prompt=True)
        whole = tokenizer.encode(text, add_special_tokens=False).ids
        if self.codec.encode(text) != whole:
            raise GatewayError(
                f"the tokenizer in {self._path} encodes text differently at its start or beside special tokens; "
                "use a byte-level tokenizer without such rules"
            )


def _with_object_arguments(message: Message) -> Message:
    """``message`` with tool-call arguments that are JSON text as the objects they spell."""
    if not message.get("tool_calls"):
        return message
    calls = []
    for call in message["tool_calls"]:
        function = dict(call["function"])
        if isinstance(function["arguments"], str):
            try:
                function["arguments"] = json.loads(function["arguments"])
            except ValueError as error:
                raise TemplateError(f"tool-call arguments {function['arguments']!r} are not JSON: {error}") from error
        calls.append({**call, "function": function})
    return {**message, "content": message.get("content") or "", "tool_calls": calls}


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


def _end_of_sequence_ids(path: Path, template: PreTrainedTokenizerFast) -> frozenset[int]:
    """The tokenizer's own end of sequence, and those that ``generation_config.json`` names, where there is one."""
    ids = set() if template.eos_token_id is None else {int(template.eos_token_id)}
    generation = path / "generation_config.json"
    if generation.exists():
        named = _read_json(generation).get("eos_token_id", [])
        ids.update(named if isinstance(named, list) else [named])
    return frozenset(ids)
