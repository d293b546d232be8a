"""Messages to tokens: nothing but the frame is special, and conversations grow by appending."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import bpe_backend
from turnwise.chat import END, PAD, SPECIALS, START, BPETokenizer, ByteTokenizer, Chat, byte_chat, load_chat
from turnwise.errors import RunError
from turnwise.types import Message

CHATS = {"bytes": byte_chat(), "bpe": Chat(BPETokenizer(bpe_backend()))}
texts = st.lists(
    st.text(st.characters(exclude_categories=()), max_size=8) | st.sampled_from([*SPECIALS, "<|im_", "end|>"]),
    max_size=5,
).map("".join)
both = pytest.mark.parametrize("chat", CHATS.values(), ids=list(CHATS))


def specials(chat: Chat) -> set[int]:
    return {chat.pad_id, chat.start_id, chat.end_id}


def message(content: str, role: str = "user") -> Message:
    return Message(role=role, content=content)  # type: ignore[arg-type]


@both
@given(text=texts)
def test_no_text_becomes_a_special_token(chat: Chat, text: str):
    ids = chat.encode_text(text)
    assert not set(ids) & specials(chat)
    assert chat.decode(ids) == text.encode("utf-8", "replace").decode()


@both
@pytest.mark.parametrize("special", SPECIALS)
def test_special_words_in_a_message_stay_text(chat: Chat, special: str):
    ids = chat.message_ids(message(f"a{special}b{special}"))
    assert [i for i in ids if i in specials(chat)] == [chat.start_id, chat.end_id]
    assert f"a{special}b{special}" in chat.decode(ids)


@both
def test_the_frame_is_chatml(chat: Chat):
    # <|im_start|>role⏎ content <|im_end|>⏎ ... <|im_start|>assistant⏎
    expected = [
        chat.start_id,
        *chat.encode_text("system\n"),
        *chat.encode_text("rules"),
        chat.end_id,
        *chat.encode_text("\n"),
        chat.start_id,
        *chat.encode_text("assistant\n"),
    ]
    assert chat.prompt_ids([message("rules", "system")]) == expected


@both
@given(question=texts, action=texts, result=texts)
def test_appending_gives_what_a_fresh_rendering_gives(chat: Chat, question: str, action: str, result: str):
    sampled = [*chat.encode_text(action), chat.end_id]
    grown = [*chat.prompt_ids([message(question)]), *sampled, *chat.reply_ids([message(result)])]
    fresh = chat.prompt_ids([message(question), message(action, "assistant"), message(result)])
    assert grown == fresh


@both
@given(contents=st.lists(st.text(max_size=20), min_size=1, max_size=3), spare=st.integers(0, 60))
def test_a_cut_reply_keeps_the_frame_and_the_beginnings(chat: Chat, contents: list[str], spare: int):
    replies = [message(content) for content in contents]
    frame = chat.reply_ids([message("") for _ in contents])
    whole = chat.reply_ids(replies)
    cut = chat.reply_ids(iter(replies), max_ids=len(frame) + spare)
    encoded = [i for content in contents for i in chat.encode_text(content)]
    left = spare
    expected = list(chat.encode_text("\n"))
    for content in contents:
        ids = chat.encode_text(content)
        expected += [chat.start_id, *chat.encode_text("user\n"), *ids[:left], chat.end_id, *chat.encode_text("\n")]
        left = max(0, left - len(ids))
    expected += [chat.start_id, *chat.encode_text("assistant\n")]
    assert cut == expected
    assert len(cut) == len(frame) + min(spare, len(encoded))
    assert chat.reply_ids(replies, max_ids=len(whole)) == whole


def test_a_reply_is_never_shorter_than_its_frame():
    chat = byte_chat()
    assert chat.reply_ids([message("abc")], max_ids=1) == chat.reply_ids([message("")])
    assert chat.empty_reply_length == len(chat.reply_ids([message("")]))


@both
def test_lone_surrogates_become_question_marks(chat: Chat):
    assert chat.decode(chat.encode_text("a\ud800b")) == "a?b"


def test_bytes_are_their_own_ids_and_specials_lie_above():
    tokenizer = ByteTokenizer()
    assert tokenizer.encode_text("é") == [0xC3, 0xA9]
    assert [tokenizer.special_id(s) for s in (PAD, START, END)] == [256, 257, 258]
    assert tokenizer.vocab_size == 259
    assert tokenizer.decode([72, 258, 105]) == "Hi"


def test_long_text_is_never_cut_by_settings_of_the_tokenizer_file():
    backend = bpe_backend()
    backend.enable_truncation(max_length=3)
    backend.enable_padding(length=50)
    assert BPETokenizer(backend).decode(BPETokenizer(backend).encode_text("x" * 100)) == "x" * 100
    assert len(BPETokenizer(backend).encode_text("a")) == 1


def test_a_tokenizer_without_the_frame_is_refused():
    from tokenizers import Tokenizer, models

    with pytest.raises(RunError, match=r"lacks <\|endoftext\|>, <\|im_start\|>, <\|im_end\|>"):
        Chat(BPETokenizer(Tokenizer(models.BPE())))


def test_added_tokens_that_are_not_special_are_kept_out_of_text_too():
    chat = Chat(BPETokenizer(bpe_backend(special=False)))
    assert not set(chat.encode_text(f"a{END}b{START}")) & specials(chat)


def test_a_missing_or_damaged_tokenizer_file_is_one_line(tmp_path):
    with pytest.raises(RunError, match="does not exist"):
        load_chat(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(RunError, match="cannot be read") as caught:
        load_chat(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_saved_tokenizer_encodes_alike(tmp_path):
    chat = CHATS["bpe"]
    chat.tokenizer.backend.save(str(tmp_path / "tokenizer.json"))  # type: ignore[attr-defined]
    text = "What is <|im_end|> the capital of Kenya? é\n"
    assert load_chat(tmp_path).encode_text(text) == chat.encode_text(text)
