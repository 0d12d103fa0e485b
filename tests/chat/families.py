"""Chat templates in the manner of the open-weight families, and a tokenizer folder for each."""

from __future__ import annotations

from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from forgejax.chat import ChatFormat
from tests.chat.tokenizers import HERMES_TEMPLATE

_IM_TURN = "{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}"
_DEFAULT_SYSTEM = """
{%- if messages[0].role != 'system' %}{{- '<|im_start|>system\\nYou are kind.<|im_end|>\\n' }}{%- endif %}"""
_JSON_CALLS = """
{%- for c in m.tool_calls or [] %}
    {%- if m.content or not loop.first %}{{- '\\n' }}{%- endif %}
    {{- '<tool_call>\\n{"name": "' + c.function.name + '", "arguments": ' + (c.function.arguments | tojson) }}
    {{- '}\\n</tool_call>' }}
{%- endfor %}"""
_RESULT_AS_USER = """
{%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}
{{- '\\n<tool_response>\\n' + m.content + '\\n</tool_response>' }}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\\n' }}{%- endif %}"""
_IM_PROMPT = "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"

PLAIN = f"{_DEFAULT_SYSTEM}{{%- for m in messages %}}{_IM_TURN}{{%- endfor %}}{_IM_PROMPT}"

TOOLS_IN_SYSTEM = f"""
{{%- if tools %}}
    {{{{- '<|im_start|>system\\n' + (messages[0].content if messages[0].role == 'system' else 'You are kind.') }}}}
    {{%- for t in tools %}}{{{{- '\\n' + (t | tojson) }}}}{{%- endfor %}}{{{{- '<|im_end|>\\n' }}}}
{{%- elif messages[0].role == 'system' %}}{{{{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}}}
{{%- else %}}{{{{- '<|im_start|>system\\nYou are kind.<|im_end|>\\n' }}}}
{{%- endif %}}
{{%- for m in messages %}}
    {{%- if m.role == 'assistant' %}}
        {{%- generation %}}{{{{- '<|im_start|>assistant\\n' + m.content }}}}{_JSON_CALLS}{{{{- '<|im_end|>\\n' }}}}
        {{%- endgeneration %}}
    {{%- elif m.role == 'tool' %}}{_RESULT_AS_USER}
    {{%- elif m.role != 'system' or not loop.first %}}{_IM_TURN}
    {{%- endif %}}
{{%- endfor %}}{_IM_PROMPT}"""

THINKING = f"""
{{%- set last = namespace(user=-1) %}}
{{%- for m in messages %}}{{%- if m.role == 'user' %}}{{%- set last.user = loop.index0 %}}{{%- endif %}}{{%- endfor %}}
{{%- for m in messages %}}
    {{%- if m.role == 'assistant' %}}
        {{%- set said = m.content.split('</think>')[-1].lstrip('\\n') %}}
        {{%- set parts = m.content.split('</think>') %}}
        {{%- set thought = parts[0].split('<think>')[-1].strip('\\n') if parts | length > 1 %}}
        {{{{- '<|im_start|>assistant\\n' }}}}
        {{%- if loop.index0 > last.user and (loop.last or thought) %}}
            {{{{- '<think>\\n' + (thought or '') + '\\n</think>\\n\\n' }}}}
        {{%- endif %}}
        {{{{- said }}}}{_JSON_CALLS}{{{{- '<|im_end|>\\n' }}}}
    {{%- elif m.role == 'tool' %}}{_RESULT_AS_USER}
    {{%- else %}}{_IM_TURN}
    {{%- endif %}}
{{%- endfor %}}{_IM_PROMPT}"""

XML_CALLS = f"""
{{%- for m in messages %}}
    {{%- if m.role == 'assistant' and m.tool_calls %}}
        {{{{- '<|im_start|>assistant' }}}}
        {{%- if m.content | trim %}}{{{{- '\\n' + m.content | trim + '\\n' }}}}{{%- endif %}}
        {{%- for c in m.tool_calls %}}
            {{{{- '\\n<tool_call>\\n<function=' + c.function.name + '>\\n' }}}}
            {{%- for key, value in c.function.arguments | items %}}
                {{{{- '<parameter=' + key + '>\\n' }}}}
                {{{{- value | tojson if value is mapping else value | string }}}}
                {{{{- '\\n</parameter>\\n' }}}}
            {{%- endfor %}}
            {{{{- '</function>\\n</tool_call>' }}}}
        {{%- endfor %}}
        {{{{- '<|im_end|>\\n' }}}}
    {{%- elif m.role == 'tool' %}}{_RESULT_AS_USER}
    {{%- else %}}{_IM_TURN}
    {{%- endif %}}
{{%- endfor %}}{_IM_PROMPT}"""

HEADERS = """
{{- bos_token }}
{%- set today = strftime_now('%d %b %Y') %}
{%- set system = messages[0].content | trim if messages[0].role == 'system' else '' %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: ' + today + '\\n\\n' + system + '<|eot_id|>' }}
{%- for m in messages %}
    {%- set role = 'ipython' if m.role == 'tool' else m.role %}
    {%- if m.tool_calls %}
        {%- if m.tool_calls | length != 1 %}{{- raise_exception('one call at a time') }}{%- endif %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n{"name": "' + m.tool_calls[0].function.name }}
        {{- '", "parameters": ' + (m.tool_calls[0].function.arguments | tojson) + '}<|eot_id|>' }}
    {%- elif not (loop.first and m.role == 'system') %}
        {%- if loop.index0 == 0 %}{%- for t in tools or [] %}{{- t | tojson(indent=4) }}{%- endfor %}{%- endif %}
        {{- '<|start_header_id|>' + role + '<|end_header_id|>\\n\\n' + m.content | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"""

OPEN_THINKING = """
{%- set last = namespace(user=-1) %}
{%- for m in messages %}{%- if m.role == 'user' %}{%- set last.user = loop.index0 %}{%- endif %}{%- endfor %}
{{- ']~!b[' }}
{%- for m in messages %}
    {%- if m.role == 'assistant' %}
        {%- set said = m.content.split('</think>')[-1].strip('\\n') %}
        {{- ']~b]ai\\n' }}
        {%- if '</think>' in m.content and loop.index0 > last.user %}
            {{- '<think>\\n' + m.content.split('</think>')[0].split('<think>')[-1].strip('\\n') + '\\n</think>\\n\\n' }}
        {%- endif %}
        {{- said }}
        {%- if m.tool_calls %}
            {{- '\\n<minimax:tool_call>\\n' }}
            {%- for c in m.tool_calls %}
                {{- '<invoke name="' + c.function.name + '">' }}
                {%- for key, value in c.function.arguments.items() %}
                    {{- '<parameter name="' + key + '">' + (value if value is string else value | tojson) }}
                    {{- '</parameter>' }}
                {%- endfor %}
                {{- '</invoke>\\n' }}
            {%- endfor %}
            {{- '</minimax:tool_call>' }}
        {%- endif %}
        {{- '[e~[\\n' }}
    {%- else %}
        {{- ']~b]' + m.role + '\\n' + m.content + '[e~[\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- ']~b]ai\\n<think>\\n' }}{%- endif %}"""

_IM = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_TAGS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>")
_LLAMA = ("<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|python_tag|>")
_MINIMAX = ("[e~[", "]~b]", "]~!b[")
_MINIMAX_TAGS = ("<think>", "</think>", "<minimax:tool_call>", "</minimax:tool_call>")

FAMILIES: dict[str, tuple[str, tuple[str, ...], tuple[str, ...], str | None]] = {
    # template, special tokens, other added tokens, tool format
    "smollm2": (PLAIN, _IM, (), None),
    "hermes": (HERMES_TEMPLATE, _IM, _TAGS[:2], "hermes"),
    "qwen2.5": (TOOLS_IN_SYSTEM, _IM, _TAGS[:2], "hermes"),
    "qwen3": (THINKING, _IM, _TAGS, "hermes"),
    "qwen3-coder": (XML_CALLS, _IM, _TAGS, "qwen3_coder"),
    "llama3": (HEADERS, _LLAMA, (), "llama3"),
    "minimax-m2": (OPEN_THINKING, _MINIMAX, _MINIMAX_TAGS, "minimax"),
}
_ENDS = {"llama3": "<|eot_id|>", "minimax-m2": "[e~["}


def save_family(folder: Path, family: str) -> Path:
    """A byte-level BPE with the family's control tokens and template; Llama's puts its BOS before every text."""
    template, special, tags, _ = FAMILIES[family]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(["user assistant system tool name arguments parameters"] * 4, trainer)
    tokenizer.add_special_tokens(list(special))
    tokenizer.add_tokens([AddedToken(tag, normalized=False) for tag in tags])
    bos = special[0] if family == "llama3" else None
    if bos is not None:
        id_ = tokenizer.token_to_id(bos)
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, id_)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=_ENDS.get(family, "<|im_end|>"), bos_token=bos)
    fast.chat_template = template
    fast.save_pretrained(folder)
    return folder


_SHIPPED = {folder.parent.name: folder for folder in Path(__file__).parents[2].glob("examples/*/tokenizer")}
FAMILY_NAMES = (*FAMILIES, *sorted(_SHIPPED))


def load_families(folder: Path) -> dict[str, ChatFormat]:
    """The format of every family, made under ``folder``, and of every tokenizer that is shipped with an example."""
    folders = {family: save_family(folder / family, family) for family in FAMILIES} | _SHIPPED
    return {name: ChatFormat.load(path) for name, path in folders.items()}
