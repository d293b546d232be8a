"""Chat templates and tokenizers for tests: published ones where the shared data are, and small ones of our own."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from turnwise.chat import BPETokenizer, TemplateChat
from turnwise.templates import Template

DATA = Path(__file__).parents[2] / "shared/data"
QWEN2 = DATA / "tokenizers/qwen2"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="needs the shared data folder")

CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MARKS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>")
LLAMA = (
    *("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>"),
    *("<|eot_id|>", "<|eom_id|>", "<|python_tag|>"),
)
LLAMA_TOKENS = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}

GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content }}{{ eos_token }}{% else %}{{ raise_exception('no such role') }}"
    "{% endif %}{% endfor %}"
)
PHI = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
CODER = (
    "{% for m in messages %}{% if m.role == 'tool' %}<|im_start|>user\n<tool_response>\n{{ m.content }}\n"
    "</tool_response><|im_end|>\n{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for t in (tools or []) if m.role == 'system' %}\n{{ t | tojson }}{% endfor %}"
    "{% for c in m.tool_calls %}\n<tool_call>\n<function={{ c.function.name }}>\n"
    "{% for k, v in c.function.arguments | items %}<parameter={{ k }}>\n"
    "{{ v if v is string else v | tojson }}\n</parameter>\n{% endfor %}</function>\n</tool_call>{% endfor %}"
    "<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""The frames of four families, shortened."""


def byte_backend(special: Sequence[str], marks: Sequence[str] = ()):
    """A tokenizer of single bytes with special tokens, and added ones that are not special."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in special])
    backend.add_tokens([AddedToken(name, special=False, normalized=False) for name in marks])
    return backend


def template_chat(
    source: str, special: Sequence[str] = CHATML, marks: Sequence[str] = MARKS, tokens: dict[str, str] | None = None
) -> TemplateChat:
    """A chat framed by a template, over single bytes."""
    template = Template(source=source, tokens={"eos_token": "<|im_end|>"} if tokens is None else tokens)
    return TemplateChat(BPETokenizer(byte_backend(special, marks)), template)


def published(name: str) -> TemplateChat:
    """The chat of a published template, with the tokens that its family has."""
    (path,) = (DATA / "templates").glob(f"*{name}*")
    is_llama = "meta-llama" in path.name
    special, tokens = (LLAMA, LLAMA_TOKENS) if is_llama else (CHATML, {"eos_token": "<|im_end|>"})
    return template_chat(path.read_text(encoding="utf-8"), special, () if is_llama else MARKS, tokens)
