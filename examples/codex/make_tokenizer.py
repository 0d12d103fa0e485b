"""Makes the tokenizer of the Codex run: a byte-level BPE and a chat template that shows system messages anywhere.

    python examples/codex/make_tokenizer.py

The vocabulary comes from what Codex tells its model. Runs of up to two digits are one token each, and so is the name of
each file of the tasks. The result is a Hugging Face folder.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from forgejax.environments import WriteFileConfig

sys.path.insert(0, str(Path(__file__).resolve().parent))
from demonstrations import record, write_command

END = "<|end|>"
CONTROL = ("<|pad|>", END, "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>")
MARKERS = ("<tool_call>", "</tool_call>")
TEMPLATE = """\
{%- macro show_tools() -%}
{%- for tool in tools or [] -%}{{- '\\n' + (tool.function | tojson) -}}{%- endfor -%}
{%- endmacro -%}
{%- if messages[0].role != 'system' and tools -%}{{- '<|system|>' + show_tools() + '<|end|>' -}}{%- endif -%}
{%- for message in messages -%}
{%- if message.role == 'assistant' -%}
{{- '<|assistant|>' + (message.content or '') -}}
{%- for call in message.tool_calls or [] -%}
{{- '<tool_call>{"name": ' + (call.function.name | tojson) -}}
{{- ', "arguments": ' + (call.function.arguments | tojson) + '}</tool_call>' -}}
{%- endfor -%}
{%- else -%}
{{- '<|' + message.role + '|>' + message.content + (show_tools() if loop.first and message.role == 'system' else '') -}}
{%- endif -%}
{{- '<|end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}
"""


@dataclass(frozen=True, kw_only=True)
class Options:
    """``recorder`` is a tokenizer that Codex is recorded with: any that knows how to write a call."""

    out: Path = Path("examples/codex/tokenizer")
    recorder: str = "examples/quickstart/tokenizer"
    vocab_size: int = 2048


def main(options: Options) -> None:
    messages, tools = record(options.recorder)
    told = [str(message["content"]) for message in messages] + [json.dumps(tool["function"]) for tool in tools]
    commands = [write_command("10", f"{name}.txt") for name in WriteFileConfig().names]
    runs = [str(number) for number in range(100)] + [f"{number:02d}" for number in range(100)]
    write(options.out, train([*told, *commands * 100, *runs * 400], options.vocab_size))


def train(corpus: list[str], vocab_size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"\d{1,2}"), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in CONTROL])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in MARKERS])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[*CONTROL, *MARKERS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return tokenizer


def write(folder: Path, tokenizer: Tokenizer) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END,
        "pad_token": CONTROL[0],
        "clean_up_tokenization_spaces": False,
        "model_max_length": 32768,
        "chat_template": TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    print(f"{folder}: {tokenizer.get_vocab_size()} tokens")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
