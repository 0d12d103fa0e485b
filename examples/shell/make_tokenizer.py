"""Makes the tokenizer of the shell run: a byte-level BPE of what tasks, commands and the agent say.

    python examples/shell/make_tokenizer.py

Digits are one token each. The result is a Hugging Face folder.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

sys.path.insert(0, str(Path(__file__).resolve().parent))
from make_tasks import draw_task
from shell_agent import DONE, show

END = "<|end|>"
CONTROL = ("<|pad|>", END, "<|system|>", "<|user|>", "<|assistant|>")
TEMPLATE = """\
{%- for message in messages -%}
{{- '<|' + message.role + '|>' + (message.content or '') + '<|end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}
"""


@dataclass(frozen=True, kw_only=True)
class Options:
    """``sample``: how many tasks the vocabulary is learned from."""

    out: Path = Path("examples/shell/tokenizer")
    vocab_size: int = 512
    sample: int = 4000


def main(options: Options) -> None:
    tasks = [draw_task(index, -1) for index in range(options.sample)]
    corpus = [text for task in tasks for text in (task.instruction, task.solution)]
    corpus += [
        DONE,
        show(0, ""),
        show(1, ""),
        show(127, ": command not found"),
        show(2, ": No such file or directory"),
    ] * 99
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"\d"), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in CONTROL])
    trainer = trainers.BpeTrainer(
        vocab_size=options.vocab_size,
        special_tokens=list(CONTROL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    options.out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(options.out / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END,
        "pad_token": CONTROL[0],
        "clean_up_tokenization_spaces": False,
        "model_max_length": 32768,
        "chat_template": TEMPLATE,
    }
    (options.out / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    print(f"{options.out}: {tokenizer.get_vocab_size()} tokens")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
