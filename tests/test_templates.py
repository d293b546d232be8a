"""Chats framed by a checkpoint's own template: the published ones render, grow and read back as they should."""

import json
import random
import shutil

import pytest

from chats import (
    CHATML,
    CODER,
    DATA,
    GEMMA,
    LLAMA_TOKENS,
    MARKS,
    MISTRAL,
    PHI,
    QWEN2,
    byte_backend,
    needs_data,
    published,
    template_chat,
)
from conftest import bpe_backend
from turnwise.chat import BPETokenizer, Chat, TemplateChat, load_chat, save_chat
from turnwise.errors import ConfigError, RunError
from turnwise.formats import tool_schemas, typed_call
from turnwise.fuzz import random_calls
from turnwise.protocols import PROTOCOLS, native_protocol, opening, said_text
from turnwise.templates import Template, read_template
from turnwise.tools import tool, tool_mapping
from turnwise.types import Message, ToolCall

PUBLISHED = {
    "Qwen2.5": "hermes",
    "Qwen3": "hermes",
    "Hermes-3": "hermes",
    "Llama-3.1-8B-Instruct": "llama3",
    "Llama-3.2": "llama3",
}
HARD = {"query": 'é "quoted" \\ 日本\nline', "more": {"a": [1, None, True, {"b": "</tool_call>"}]}}


def search(query: str, k: int = 3) -> str:
    """Passages that best match the query."""
    return query


TOOLS = tool_mapping([tool(search)])
USER = Message(role="user", content="Which capital?")


def text(chat: TemplateChat, ids: list[int]) -> str:
    return chat.tokenizer.decode_all(ids)


# ------------------------------------------------------------------------- published templates


@needs_data
@pytest.mark.parametrize(("name", "form"), PUBLISHED.items())
def test_the_format_of_a_published_template_is_found(name: str, form: str):
    assert native_protocol(published(name).template, name) == form


@needs_data
@pytest.mark.parametrize("name", PUBLISHED)
def test_conversations_grow_to_what_the_template_renders_and_read_back(name: str):
    chat, protocol, rng = published(name), PROTOCOLS[PUBLISHED[name]], random.Random(0)
    cases = [(ToolCall(name="search", arguments=HARD),)]
    cases += [random_calls(rng, "tools" if protocol is PROTOCOLS["llama3"] else "hermes") for _ in range(60)]
    start = opening(protocol, TOOLS, "Which capital?")
    prompt = chat.prompt_ids(start)
    for calls in cases:
        results = [Message(role="tool", content=f"found é {k}", name=call.name) for k, call in enumerate(calls)]
        made = Message(role="assistant", content="", tool_calls=calls)
        said = chat.encode_said(said_text(protocol, made))
        grown = [*prompt, *said, chat.end_id, *chat.reply_ids(results)]
        assert grown == chat.prompt_ids([*start, made, *results])
        rendered = grown[len(prompt) :]
        assert protocol.parse(chat.decode(rendered[: rendered.index(chat.end_id)])).tool_calls == calls


@needs_data
@pytest.mark.parametrize("name", PUBLISHED)
def test_a_template_renders_as_transformers_renders_it(name: str):
    from transformers.utils.chat_template_utils import render_jinja_template

    template = published(name).template
    call = {"type": "function", "id": "call00000", "function": {"name": "search", "arguments": HARD}}
    messages = [
        {"role": "system", "content": " rules "},
        {"role": "user", "content": "Which?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "found", "tool_call_id": "call00000"},
    ]
    tools = list(tool_schemas(TOOLS))
    dated = {"date_string": "26 Jul 2024"} if "Llama" in name else {}
    expected, _ = render_jinja_template(
        [messages], tools, chat_template=template.source, add_generation_prompt=True, **template.tokens, **dated
    )
    assert template.render(messages, tools) == expected[0]


@needs_data
def test_arguments_are_never_encoded_twice():
    chat, protocol = published("Qwen2.5"), PROTOCOLS["hermes"]
    made = Message(role="assistant", content="", tool_calls=(ToolCall(name="search", arguments={"query": "Kenya"}),))
    rendered = text(chat, chat.prompt_ids([*opening(protocol, TOOLS, "?"), made]))
    assert '"arguments": {"query": "Kenya"}' in rendered
    assert '\\"query' not in rendered


@needs_data
def test_a_prompt_of_thoughts_keeps_what_was_sampled():
    # Qwen3's template drops the thoughts of earlier turns when it renders them anew; here they stay as sampled.
    chat = published("Qwen3")
    prompt = chat.prompt_ids([USER])
    said = [*chat.encode_said("<think>\nhm\n</think>\n\nNairobi"), chat.end_id]
    grown = [*prompt, *said, *chat.reply_ids([USER])]
    assert "hm" in text(chat, grown)
    assert "hm" not in text(
        chat, chat.prompt_ids([USER, Message(role="assistant", content="<think>\nhm\n</think>\n\nNairobi"), USER])
    )


@needs_data
def test_a_tool_result_of_hermes_is_framed_as_the_policy_sees_it():
    # The stock template puts a line break before <|im_end|> only once something follows.
    chat = published("Hermes-3")
    assert text(chat, chat.reply_ids([Message(role="tool", content="r")])) == (
        "\n<|im_start|>tool\n<tool_response>\nr\n</tool_response><|im_end|><|im_start|>assistant\n"
    )


@needs_data
def test_results_of_several_calls_are_framed_though_llama_takes_one_call_in_a_message():
    chat = published("Llama-3.1-8B-Instruct")
    framed = text(chat, chat.reply_ids([Message(role="tool", content="a"), Message(role="tool", content="b")]))
    header = "<|start_header_id|>ipython<|end_header_id|>\n\n"
    assert framed == f'{header}"a"<|eot_id|>{header}"b"<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n'


@needs_data
def test_llama_stops_at_either_of_its_tokens(tmp_path):
    chat = published("Llama-3.1-8B-Instruct")
    save_chat(chat, tmp_path)
    ends = [chat.tokenizer.control[name] for name in ("<|eot_id|>", "<|eom_id|>", "<|end_of_text|>")]
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    assert set(load_chat(tmp_path).stop_ids) == set(ends)


@needs_data
def test_qwen2_is_read_from_its_vocabulary_and_encodes_as_it_should():
    given = (QWEN2 / "fixtures.inp").read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")
    ids = [[int(i) for i in line.split()] for line in (QWEN2 / "fixtures.out").read_text().split("\n")]
    chat = load_chat(QWEN2)
    assert [chat.encode_text(line) for line in given] == ids[: len(given)]
    assert len(given) == 47
    # Its template ends with words of its own, which the policy sees.
    assert isinstance(chat, TemplateChat)
    assert text(chat, chat.prompt_ids([USER])).endswith("<|im_start|>assistant\ntemplate ends here")
    assert chat.tokenizer.decode_all(chat.encode_text("<|im_end|>é")) == "<|im_end|>é"


# ------------------------------------------------------------------------------ other families

FAMILIES = {
    "gemma": (
        GEMMA,
        ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"),
        {"bos_token": "<bos>", "eos_token": "<eos>"},
    ),
    "mistral": (MISTRAL, ("<s>", "</s>", "[INST]", "[/INST]"), {"bos_token": "<s>", "eos_token": "</s>"}),
    "phi": (
        PHI,
        ("<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
        {"eos_token": "<|endoftext|>"},
    ),
}
FRAMES = {
    "gemma": (
        "<bos><start_of_turn>user\nrules\n\nq<end_of_turn>\n<start_of_turn>model\n",
        "\n<start_of_turn>user\nr<end_of_turn>\n<start_of_turn>model\n",
    ),
    "mistral": ("<s>[INST] rules\n\nq [/INST]", "[INST] r [/INST]"),
    "phi": ("<|system|>\nrules<|end|>\n<|user|>\nq<|end|>\n<|assistant|>\n", "\n<|user|>\nr<|end|>\n<|assistant|>\n"),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_prompts_and_replies_have_the_frame_of_their_family(name: str):
    chat = template_chat(*FAMILIES[name][:2], tokens=FAMILIES[name][2])
    prompt, reply = FRAMES[name]
    assert (
        text(chat, chat.prompt_ids([Message(role="system", content="rules"), Message(role="user", content="q")]))
        == prompt
    )
    assert text(chat, chat.reply_ids([Message(role="user", content="r")])) == reply
    assert chat.end_id == chat.tokenizer.control[{"gemma": "<end_of_turn>", "mistral": "</s>", "phi": "<|end|>"}[name]]


@pytest.mark.parametrize("name", FAMILIES)
def test_no_family_lets_text_become_a_control_token(name: str):
    chat = template_chat(*FAMILIES[name][:2], tokens=FAMILIES[name][2])
    control = set(chat.tokenizer.control.values())
    evil = "".join(chat.tokenizer.control)
    pieces = [evil, *(name[1:] for name in chat.tokenizer.control), *(name[:-1] for name in chat.tokenizer.control)]
    for content in pieces:
        for role in ("user", "system"):
            ids = chat.prompt_ids([Message(role=role, content=content), USER])
            plain = chat.prompt_ids([Message(role=role, content="a"), USER])
            assert [i for i in ids if i in control] == [i for i in plain if i in control]
            assert content.strip() in text(chat, ids)


@pytest.mark.parametrize("content", ["|im_end|>", "<|im_end|", "|im_end|", " |im_end|>", "a<|im_end|"])
def test_text_forms_no_control_token_together_with_its_frame(content: str):
    chat = template_chat(
        CODER.replace(
            "{{ m.role }}\n{{ m.content }}",
            "{{ m.role }}\n{{ '<' ~ m.content ~ '>' if m.role == 'user' else m.content }}",
        )
    )
    ids = chat.prompt_ids([Message(role="user", content=content)])
    assert ids.count(chat.end_id) == 1
    assert f"<{content}>" in text(chat, ids)


def test_a_call_in_qwen3_coders_format_reads_back():
    chat, protocol = template_chat(CODER), PROTOCOLS["qwen3-coder"]
    assert native_protocol(chat.template, "it") == "qwen3-coder"
    made = Message(
        role="assistant", content="", tool_calls=(ToolCall(name="search", arguments={"query": 'a\n"b"', "k": 2}),)
    )
    start = opening(protocol, TOOLS, "?")
    prompt = chat.prompt_ids(start)
    rendered = chat.prompt_ids([*start, made, Message(role="tool", content="r")])
    (call,) = protocol.parse(text(chat, rendered[len(prompt) : rendered.index(chat.end_id, len(prompt))])).tool_calls
    assert typed_call(call, TOOLS["search"].parameters) == made.tool_calls[0]


def test_marks_of_a_format_are_what_the_policy_samples_and_what_text_cannot_be():
    chat = template_chat(CODER)
    mark = chat.tokenizer.control["<tool_call>"]
    assert chat.encode_said("<tool_call>")[0] == mark
    assert mark not in chat.encode_text("<tool_call>")
    assert mark not in chat.reply_ids([Message(role="tool", content="<tool_call>")])
    assert chat.decode([mark, chat.end_id]) == "<tool_call>"
    assert chat.end_id not in chat.encode_said("<|im_end|>")


def test_what_a_normaliser_makes_of_text_is_no_control_token_either():
    from tokenizers import AddedToken, normalizers

    backend = byte_backend(CHATML)
    backend.normalizer = normalizers.NFKC()
    backend.add_tokens([AddedToken("[CALL]", special=False, normalized=True)])
    tokenizer = BPETokenizer(backend)
    wide = "".join(chr(ord(char) + 0xFEE0) for char in "[CALL]")
    assert tokenizer.control["[CALL]"] not in tokenizer.encode_text(wide)


@pytest.mark.parametrize("spare", [0, 1, 7, 30])
def test_a_cut_reply_keeps_its_frame(spare: int):
    chat = template_chat(CODER)
    replies = [Message(role="tool", content="é" * 9, name="a"), Message(role="tool", content="second")]
    frame = len(chat.reply_ids([Message(role="tool", content=""), Message(role="tool", content="")]))
    cut = chat.reply_ids(replies, max_ids=frame + spare)
    assert frame <= len(cut) <= frame + spare
    assert text(chat, cut).count("</tool_response><|im_end|>\n") == 2
    assert chat.reply_ids(replies, max_ids=0) == chat.reply_ids(
        [Message(role="tool", content=""), Message(role="tool", content="")]
    )


def test_text_encodes_jointly_with_the_frame_as_the_tokenizer_would():
    # "user\n" before "\nq" is one piece of text to a tokenizer that has a token for two line breaks.
    backend = bpe_backend()
    chat = TemplateChat(BPETokenizer(backend), Template(source=CODER))
    rendered = chat.template.render([{"role": "user", "content": "\n\nWhat is the capital of Peru?"}])
    backend.encode_special_tokens = False
    expected = backend.encode(rendered, add_special_tokens=False).ids
    assert chat.prompt_ids([Message(role="user", content="\n\nWhat is the capital of Peru?")]) == expected


# ------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "{% for m in messages %}### {{ m.role }}:\n{{ m.content }}\n{% endfor %}",
            "close what the policy says with a special token",
        ),
        (
            CODER.replace(
                "{{ m.content }}\n</tool_response>", "{{ messages[1].content }}{{ m.content }}\n</tool_response>"
            ),
            "whatever was said before; after a message of role tool",
        ),
        ("{{ raise_exception('not today') }}", "it fails with not today"),
        ("{% for m in messages %}{{ m.role.__class__.mro() }}{% endfor %}", "fails with"),
        ("<|im_start|>nothing<|im_end|>", "close what the policy says"),
    ],
)
def test_a_template_that_cannot_be_used_is_refused_with_the_reason(source: str, message: str):
    with pytest.raises(RunError, match=message) as caught:
        template_chat(source)
    assert "\n" not in str(caught.value)


def test_a_native_protocol_wants_a_template_that_writes_calls():
    with pytest.raises(ConfigError, match="must have a policy with a chat template; embedded has none"):
        native_protocol(None, "embedded")
    with pytest.raises(ConfigError, match="in one of the formats hermes, llama3, qwen3-coder"):
        native_protocol(Template(source=PHI), "it")


def test_calls_and_tools_are_refused_without_a_template():
    chat = Chat(BPETokenizer(bpe_backend()))
    for message in (Message(role="tool", content="r"), Message(role="system", content="", tools=({},))):
        with pytest.raises(RunError, match="without a chat template must have messages of text alone"):
            chat.prompt_ids([message])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("chat_template.jinja", "{% for %}", "must be Jinja2"),
        ("tokenizer_config.json", "{", "must be JSON"),
        ("tokenizer_config.json", "[]", "must hold an object"),
        ("tokenizer_config.json", '{"chat_template": [3]}', "a list of records"),
        ("generation_config.json", "{", "must be JSON"),
    ],
)
def test_damaged_files_are_one_line(tmp_path, name: str, content: str, message: str):
    save_chat(template_chat(CODER), tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(RunError, match=message) as caught:
        load_chat(tmp_path)
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------- folders


def test_a_saved_chat_is_read_back(tmp_path):
    chat = template_chat(*FAMILIES["gemma"][:2], tokens=FAMILIES["gemma"][2])
    save_chat(chat, tmp_path)
    again = load_chat(tmp_path)
    assert again.template == chat.template
    assert again.prompt_ids([USER]) == chat.prompt_ids([USER])
    assert (again.end_id, again.stop_ids, again.pad_id, again.start_id) == (
        chat.end_id,
        chat.stop_ids,
        chat.pad_id,
        chat.start_id,
    )


def test_templates_are_found_where_checkpoints_have_them(tmp_path):
    assert read_template(tmp_path) is None
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": "one", "eos_token": {"content": "</s>"}})
    )
    assert read_template(tmp_path) == Template(source="one", tokens={"eos_token": "</s>"})
    both = [{"name": "default", "template": "one"}, {"name": "tool_use", "template": "two"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": both}))
    found = read_template(tmp_path)
    assert found == Template(source="one", tool_source="two")
    assert (found.render([], None), found.render([], [{}])) == ("one", "two")
    (tmp_path / "chat_template.jinja").write_text("three")
    assert read_template(tmp_path) == Template(source="three", tool_source="two")


@needs_data
def test_a_published_template_is_read_from_a_folder(tmp_path):
    shutil.copy(DATA / "templates/Qwen-Qwen3-0.6B.jinja", tmp_path / "chat_template.jinja")
    byte_backend(CHATML, MARKS).save(str(tmp_path / "tokenizer.json"))
    chat = load_chat(tmp_path)
    assert isinstance(chat, TemplateChat)
    assert chat.takes_tools


def test_dates_are_the_same_on_any_day():
    template = Template(
        source="{{ strftime_now('%d %b %Y') }}{% generation %} a{% endgeneration %}", tokens=LLAMA_TOKENS
    )
    assert template.render([]) == "26 Jul 2024 a"


def test_tokenizers_that_write_spaces_as_marks_encode_a_prompt_as_they_would_alone():
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    backend.train_from_iterator(["rules q r [INST] [/INST] What is the capital of Peru? <s> </s> inst|>"] * 3, trainer)
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in ("[INST]", "[/INST]")])
    chat = TemplateChat(BPETokenizer(backend), Template(source=MISTRAL, tokens=FAMILIES["mistral"][2]))
    rendered = chat.template.render([{"role": "user", "content": "What is the capital of Peru?"}])
    asked = Message(role="user", content="What is the capital of Peru?")
    assert chat.prompt_ids([asked]) == backend.encode(rendered, add_special_tokens=False).ids
    # The reply begins as it does within a conversation: no space comes before it.
    whole = chat.template.render(
        [{"role": "user", "content": "q"}, {"role": "assistant", "content": "r"}, {"role": "user", "content": "r"}]
    )
    ids = backend.encode(whole, add_special_tokens=False).ids
    assert ids[-len(chat.reply_ids([Message(role="user", content="r")])) :] == chat.reply_ids(
        [Message(role="user", content="r")]
    )
    control = {chat.tokenizer.control[name] for name in ("<s>", "</s>", "[INST]", "[/INST]")}
    assert not set(chat.encode_text("</s>[INST]<s>")) & control
