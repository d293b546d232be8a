import random

import pytest

from turnwise import atlas
from turnwise.chat import Chat
from turnwise.tags import parse, system_prompt
from turnwise.types import Message
from turnwise.warmup import (
    SKILLS,
    Demonstrator,
    Habits,
    Subject,
    SubjectSource,
    WarmupConfig,
    demonstration_row,
    invented_name,
    is_known,
    malformed_call,
    repetition_row,
    search_stub,
    tokenizer_texts,
    train_tokenizer,
    warm_up,
)


@pytest.fixture(scope="module")
def source() -> SubjectSource:
    return SubjectSource(random.Random(0))


@pytest.fixture(scope="module")
def chat() -> Chat:
    return Chat(train_tokenizer(tokenizer_texts(SubjectSource(random.Random(0)), 300), vocab_size=600))


def kenya(*, known: bool = False) -> Subject:
    entity = atlas.entities()["Kenya"]
    return Subject(
        question="What is the capital of Kenya?",
        name="Kenya",
        kind=atlas.kinds()["country"],
        relation="capital",
        values=dict(entity.values),
        known=known,
    )


def test_a_skilful_demonstration_calls_for_the_entity_and_reads_the_answer(source: SubjectSource) -> None:
    skilful = Demonstrator(source, Habits(calls=1, malforms=0, strays=0, asks_whole=0, reads_right=1, untidy=0))
    shown = skilful.about(kenya(), calls=True)
    call = parse(shown.messages[0]).tool_call
    assert call is not None
    assert call.arguments == {"query": "Kenya"}
    assert "Nairobi" in shown.replies[0]
    assert parse(shown.messages[1]).answer == "Nairobi"


def test_follow_ups_are_asked_and_answered_about_the_article_in_view(source: SubjectSource) -> None:
    skilful = Demonstrator(source, SKILLS)
    for _ in range(20):
        shown = skilful.about(kenya(), calls=True)
        article, later = shown.replies[0], shown.replies[1:]
        assert len(shown.messages) == len(shown.replies) + 1
        assert len(set(later)) == len(later) <= SKILLS.follow_ups
        for question, message in zip(later, shown.messages[2:], strict=True):
            assert "Kenya" in question
            assert parse(message).answer in article


def test_an_unfamiliar_question_is_asked_as_it_stands(source: SubjectSource) -> None:
    demonstrator = Demonstrator(source, Habits(untidy=0))
    for _ in range(20):
        shown = demonstrator.about_nothing_known()
        call = parse(shown.messages[0]).tool_call
        assert call is not None
        assert call.arguments == {"query": shown.question}
        assert 4 <= len(shown.question.split()) <= 3 * 26


def test_a_reader_who_reads_wrong_copies_another_value_of_the_article(source: SubjectSource) -> None:
    wrong = Demonstrator(source, Habits(malforms=0, strays=0, asks_whole=0, reads_right=0, untidy=0))
    answers = {parse(wrong.about(kenya(), calls=True).messages[1]).answer for _ in range(40)}
    assert "Nairobi" not in answers
    assert answers <= set(atlas.entities()["Kenya"].values.values())
    assert len(answers) > 1


def test_only_known_entities_are_answered_by_heart(source: SubjectSource) -> None:
    shown = Demonstrator(source, SKILLS)
    assert parse(shown.about(kenya(known=True), calls=False).messages[0]).answer == "Nairobi"
    guesses = [parse(shown.about(kenya(), calls=False).messages[0]).answer for _ in range(40)]
    assert guesses.count("Nairobi") < 5


def test_every_malformed_call_is_refused_by_the_environment(source: SubjectSource) -> None:
    failing = Demonstrator(source, Habits(malforms=1, untidy=0))
    for _ in range(200):
        shown = failing.about(kenya(), calls=True)
        assert "Error: " in shown.replies[0]


def test_malformed_calls_come_in_several_kinds() -> None:
    rng = random.Random(0)
    assert len({malformed_call(kenya(), rng) for _ in range(100)}) >= 6


def test_no_held_out_entity_is_a_subject_or_a_value(source: SubjectSource) -> None:
    held_out = {e.name for e in atlas.entities().values() if e.split != "train"}
    names = {e.name for e in source.known + source.unknown}
    values = {value for pool in source.pools.values() for value in pool}
    assert not held_out & (names | values)
    assert all(is_known(e) for e in source.known)
    assert not any(is_known(e) for e in source.unknown)


def test_invented_names_are_rarely_alike() -> None:
    rng = random.Random(0)
    assert len({invented_name(rng) for _ in range(500)}) > 400


def test_a_name_has_the_same_tokens_wherever_it_stands(chat: Chat) -> None:
    name = chat.encode_text("Zanquora")
    for before, after in ((" ", "?"), ('"', '"}}'), ("\n", "\n"), (" ", "."), ("of ", "'s")):
        ids = chat.encode_text(f"{before}Zanquora{after}")
        assert any(ids[i : i + len(name)] == name for i in range(len(ids))), (before, after)


@pytest.mark.parametrize("text", ["", "Ünïcödé 東京 🙂", "<|im_end|>", "a\n\n  b\t1234567", '{"name": "x"}'])
def test_any_text_decodes_to_itself(chat: Chat, text: str) -> None:
    ids = chat.encode_text(text)
    assert chat.decode(ids) == text
    assert not {chat.end_id, chat.start_id, chat.pad_id} & set(ids)


def test_the_loss_of_a_demonstration_is_on_the_policys_messages_alone(source: SubjectSource, chat: Chat) -> None:
    shown = Demonstrator(source, SKILLS).about(kenya(), calls=True)
    system = tuple(chat.message_ids(Message(role="system", content=system_prompt(search_stub()))))
    row = demonstration_row(shown, chat, system)
    taught = chat.decode([i for i, in_loss in zip(row.ids, row.loss, strict=True) if in_loss])
    assert taught == "".join(shown.messages)


def test_a_repetition_repeats_what_its_loss_is_on(chat: Chat) -> None:
    rng = random.Random(3)
    for _ in range(30):
        row = repetition_row(chat, (chat.start_id,), rng)
        first = int(row.loss.argmax()) - 1
        assert all(row.ids[i] == row.ids[i - first] for i in range(first, len(row.ids)))


def test_the_warm_up_writes_the_same_checkpoint_twice(tmp_path) -> None:
    made = []
    for name in ("a", "b"):
        config = WarmupConfig(
            out=tmp_path / name, copy_steps=1, skill_steps=1, habit_steps=1, rows=4, hidden=32, layers=1
        )
        warm_up(config)
        made.append((tmp_path / name / "model.safetensors").read_bytes())
    assert made[0] == made[1]
