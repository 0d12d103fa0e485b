"""Makes the quickstart's tokenizer: a small byte-level BPE and a compact chat template.

    python examples/quickstart/make_tokenizer.py --config configs/quickstart.toml

Numbers are split into runs of at most two digits; every such run is one token, so that a number is two or three tokens
and a small policy sees each of them often. The rest of the vocabulary comes from what the agent and the tasks of the
configuration say. The result is a Hugging Face folder.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import tyro
from demonstrations import describe_agent, find_expression
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from forgejax.environments import ReasoningGym
from forgejax.run.config import load_config

END = "<|end|>"
CONTROL = ("<|pad|>", END, "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>")
MARKERS = ("<tool_call>", "</tool_call>")
TEMPLATE = """\
{%- if messages[0].role == 'system' or tools -%}
{{- '<|system|>' + (messages[0].content if messages[0].role == 'system' else '') -}}
{%- for tool in tools or [] -%}{{- '\\n' + (tool.function | tojson) -}}{%- endfor -%}
{{- '<|end|>' -}}
{%- endif -%}
{%- for message in messages -%}
{%- if message.role in ('user', 'tool') -%}{{- '<|' + message.role + '|>' + message.content + '<|end|>' -}}
{%- elif message.role == 'assistant' -%}
{{- '<|assistant|>' + (message.content or '') -}}
{%- for call in message.tool_calls or [] -%}
{{- '<tool_call>{"name": ' + (call.function.name | tojson) -}}
{{- ', "arguments": ' + (call.function.arguments | tojson) + '}</tool_call>' -}}
{%- endfor -%}
{{- '<|end|>' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}
"""


@dataclass(frozen=True, kw_only=True)
class Options:
    """``sample``: how many tasks of the configuration the vocabulary is learned from."""

    config: Path = Path("configs/quickstart.toml")
    agent: tuple[str, ...] = ("python", "examples/quickstart/agent.py", "--describe")
    vocab_size: int = 640
    sample: int = 2000


def main(options: Options) -> None:
    config = load_config(options.config)
    tasks = ReasoningGym(config.tasks)
    agent = describe_agent(options.agent)
    system = "\n".join([agent.system, *(json.dumps(tool["function"]) for tool in agent.tools)])
    name = agent.tools[0]["function"]["name"]
    corpus = []
    for index in range(options.sample):
        question = tasks.task(index).question
        arguments = json.dumps({"expression": find_expression(question)})
        corpus += [system, question, f'{{"name": "{name}", "arguments": {arguments}}}']
    # Each run of up to two digits, often enough to become one token.
    runs = [str(number) for number in range(100)] + [f"{number:02d}" for number in range(100)]
    write(Path(config.tokenizer), train([*corpus, *runs * 400], options.vocab_size))


def train(corpus: list[str], vocab_size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d{1,2}"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
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
        "model_max_length": 4096,
        "chat_template": TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    print(f"{folder}: {tokenizer.get_vocab_size()} tokens")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
