"""The encoder's memory, and tokenizers that put a space before a text's first word."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from forgejax.chat import ChatFormat
from forgejax.chat.format import SpokenTurn
from forgejax.chat.piece_cache import PieceCache

TEMPLATE = (
    "{{ start }}{% for m in messages %}{{ '<s>' + m.role + ': ' + m.content + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant: ' }}{% endif %}"
)


def test_the_cache_is_bounded_by_bytes_and_forgets_the_least_used_first() -> None:
    cache = PieceCache(10_000)
    for number in range(100):
        cache.put(f"{number:03d}" + "x" * 700, [number])
        assert cache.size_bytes <= 10_000
        assert list(cache.get("000" + "x" * 700) or ()) == [0]
    assert cache.get("050" + "x" * 700) is None and list(cache.get("099" + "x" * 700) or ()) == [99]
    cache.put("y" * 2000, [1])  # more than an eighth of it
    assert cache.get("y" * 2000) is None


def test_a_space_before_the_first_word_of_a_text_goes_before_no_other(tmp_path: Path) -> None:
    for name, start in (("bare", "Hello "), ("marked", "")):
        words = ["<unk>", *"▁abcdefghijklmnopqrstuvwxyzHS:.!?", "▁a", "▁H"]
        tokenizer = Tokenizer(models.BPE(vocab={w: i for i, w in enumerate(words)}, merges=[("▁", "a"), ("▁", "H")]))
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        tokenizer.decoder = decoders.Metaspace(prepend_scheme="first", split=False)
        tokenizer.add_special_tokens(["<s>", "</s>"])
        fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")
        fast.chat_template = TEMPLATE.replace("{{ start }}", start)
        fast.save_pretrained(tmp_path / name)
        chat_format = ChatFormat.load(tmp_path / name)
        messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "ha"}]
        prompt = chat_format.render_text([*messages, messages[0]])
        whole = tokenizer.encode(prompt.text, add_special_tokens=False).ids
        before = chat_format.mark_turn(chat_format.render_text(messages[:1]))
        continued = chat_format.continue_turn(prompt, 2, SpokenTurn(before=before, said="ha"))
        assert chat_format.encode(prompt) == whole and continued is not None
        spoken = chat_format.encode_assistant(messages[1], messages[:1])
        assert [*chat_format.render(messages[:1])[:-1], *continued] != whole
        assert whole[-len(continued) :] == continued and spoken[-1] == chat_format.end_of_turn_id
