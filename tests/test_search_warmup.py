import dataclasses
import functools
import random
import re

import pytest

from turnwise import atlas
from turnwise.chat import Chat
from turnwise.policy import save_policy, tiny_policy
from turnwise.search_tags import NO_SEARCHES_LEFT, parse, system_prompt
from turnwise.search_warmup import (
    SEARCH_SKILLS,
    Chain,
    ChainSource,
    SearchDemonstrator,
    SearchHabits,
    SearchWarmupConfig,
    malformed_search,
    search_warm_up,
    single,
    task_chain,
)
from turnwise.types import Message
from turnwise.warmup import (
    Demonstration,
    SubjectSource,
    demonstration_row,
    search_stub,
    tokenizer_texts,
    train_tokenizer,
)

CLEAN = dataclasses.replace(SEARCH_SKILLS, follow_ups=0, hurries=0.0)
WELL_FORMED = r"<think>\n[^<]+\n</think>\n<(search|answer)>\n[^<]+\n</\1>"
ARTICLE = r"<information>\n([^<]*)\n</information>"


@pytest.fixture(scope="module")
def chains() -> ChainSource:
    return ChainSource(SubjectSource(random.Random(0)))


@pytest.fixture(scope="module")
def chat() -> Chat:
    return Chat(train_tokenizer(tokenizer_texts(SubjectSource(random.Random(0)), 300), vocab_size=600))


def demonstrator(chains: ChainSource, habits: SearchHabits) -> SearchDemonstrator:
    return SearchDemonstrator(chains.subjects, habits)


@functools.cache
def verne() -> Chain:
    """The birthplace of the author of From the Earth to the Moon."""
    (task,) = [
        t
        for t in atlas.tasks("train", hops=2)
        if t.metadata["entity"] == "From the Earth to the Moon" and t.metadata["relation"] == "author birth_city"
    ]
    return task_chain(task)


def said(shown: Demonstration) -> list[str]:
    """The queries and the answer of a dialogue."""
    actions = [parse(message) for message in shown.messages]
    return [
        str(a.tool_call.arguments and a.tool_call.arguments["query"]) if a.tool_call else str(a.answer) for a in actions
    ]


def test_a_skilful_two_hop_demonstration_searches_the_entity_then_the_bridge_and_reads_the_answer(
    chains: ChainSource,
) -> None:
    shown = demonstrator(chains, CLEAN).about(verne(), searches=True)
    assert said(shown) == ["From the Earth to the Moon", "Jules Verne", "Nantes"]
    assert "Jules Verne" in shown.replies[0]
    assert "Nantes" in shown.replies[1]


def test_every_thought_names_what_is_read_next(chains: ChainSource) -> None:
    shown = demonstrator(chains, CLEAN).about(verne(), searches=True)
    named = ["author", "author", "birth city"]
    for message, relation in zip(shown.messages, named, strict=True):
        assert relation in str(parse(message).reasoning)


def test_skilful_demonstrations_are_well_formed_and_read_only_what_is_in_view(chains: ChainSource) -> None:
    skilful = demonstrator(chains, SEARCH_SKILLS)
    for draw in (chains.real, chains.invented, lambda: single(chains.subjects.invented())) * 20:
        chain = draw()
        shown = skilful.about(chain, searches=True)
        assert len(shown.messages) == len(shown.replies) + 1
        assert all(re.fullmatch(WELL_FORMED, message) for message in shown.messages)
        seen = chain.question
        for k, value in enumerate(said(shown)):
            assert value in seen
            seen = "".join(shown.replies[: k + 1])


def test_a_two_hop_question_names_its_entity_and_not_its_bridge(chains: ChainSource) -> None:
    for draw in (chains.real, chains.invented) * 50:
        chain = draw()
        first, last = chain.hops
        assert first.answer == last.name
        assert first.name in chain.question
        assert parse(f"<answer>{last.answer}</answer>").answer == last.answer


def test_real_two_hop_questions_are_the_atlas_s_own(chains: ChainSource) -> None:
    asked = {task.question: task for task in atlas.tasks("train", hops=2, phrasing="all")}
    for _ in range(50):
        chain = chains.real()
        task = asked[chain.question]
        assert (chain.hops[-1].answer,) == task.answers
        assert [hop.name for hop in chain.hops] == [task.metadata["entity"], task.metadata["linked"]]


def test_no_held_out_entity_is_in_any_chain(chains: ChainSource) -> None:
    held_out = {e.name for e in atlas.entities().values() if e.split != "train"}
    real = [task_chain(task) for task in chains.tasks[::7]]
    for chain in [*real, *(chains.invented() for _ in range(200))]:
        for hop in chain.hops:
            assert not held_out & {hop.name, *hop.values.values()}


def test_who_does_not_go_on_answers_out_of_the_first_article_mostly_with_the_bridge(chains: ChainSource) -> None:
    stops = demonstrator(chains, dataclasses.replace(CLEAN, goes_on=0.0))
    answers = []
    for _ in range(60):
        query, answer = said(stops.about(verne(), searches=True))
        assert query == "From the Earth to the Moon"
        answers.append(answer)
    assert set(answers) <= set(atlas.entities()["From the Earth to the Moon"].values.values())
    assert 30 < answers.count("Jules Verne") < 60


def test_a_wrong_second_search_is_for_another_value_or_the_first_one_again(chains: ChainSource) -> None:
    wrong = demonstrator(chains, dataclasses.replace(CLEAN, bridges_right=0.0))
    others = set(atlas.entities()["From the Earth to the Moon"].values.values()) - {"Jules Verne"}
    assert all(said(wrong.about(verne(), searches=True))[1] in others for _ in range(20))
    again = demonstrator(chains, dataclasses.replace(CLEAN, repeats=1.0))
    assert said(again.about(verne(), searches=True))[:3] == [
        "From the Earth to the Moon",
        "From the Earth to the Moon",
        "Jules Verne",
    ]


def test_a_reader_who_reads_wrong_copies_another_value_of_the_second_article(chains: ChainSource) -> None:
    wrong = demonstrator(chains, dataclasses.replace(CLEAN, reads_right=0.0))
    answers = {said(wrong.about(verne(), searches=True))[-1] for _ in range(40)}
    values = set(atlas.entities()["Jules Verne"].values.values())
    assert len(answers) > 1
    assert answers <= values - {"Nantes"}


def test_only_the_last_article_is_followed_by_the_word_that_no_searches_are_left(chains: ChainSource) -> None:
    hurried = demonstrator(chains, dataclasses.replace(CLEAN, hurries=1.0))
    first, last = hurried.about(verne(), searches=True).replies
    assert re.fullmatch(ARTICLE, first)
    assert re.fullmatch(f"{ARTICLE}\n{NO_SEARCHES_LEFT}", last)


def test_every_malformed_search_is_an_error(chains: ChainSource) -> None:
    failing = demonstrator(chains, dataclasses.replace(CLEAN, malforms=1.0))
    for _ in range(100):
        shown = failing.about(verne(), searches=True)
        assert parse(shown.messages[0]).error
        assert "Error: " in shown.replies[0]
    rng = random.Random(0)
    assert len({malformed_search(verne(), rng) for _ in range(100)}) >= 6


def test_two_hops_are_never_known_by_heart(chains: ChainSource) -> None:
    guesses = [said(demonstrator(chains, CLEAN).about(verne(), searches=False))[0] for _ in range(60)]
    assert guesses.count("Nantes") < 5
    known = single(chains.subjects.real(chains.subjects.known[0]))
    assert said(demonstrator(chains, CLEAN).about(known, searches=False)) == [known.hops[0].answer]


def test_the_loss_is_on_the_policys_messages_alone(chains: ChainSource, chat: Chat) -> None:
    shown = demonstrator(chains, CLEAN).about(verne(), searches=True)
    system = tuple(chat.message_ids(Message(role="system", content=system_prompt(search_stub()))))
    row = demonstration_row(shown, chat, system)
    taught = chat.decode([i for i, in_loss in zip(row.ids, row.loss, strict=True) if in_loss])
    assert taught == "".join(shown.messages)


def test_the_search_warm_up_writes_the_same_checkpoint_twice_and_leaves_its_start_alone(tmp_path, chat: Chat) -> None:
    save_policy(tiny_policy(chat, seed=0, hidden=32, layers=1), tmp_path / "start")
    start = (tmp_path / "start" / "model.safetensors").read_bytes()
    made = []
    for name in ("a", "b"):
        config = SearchWarmupConfig(start=tmp_path / "start", out=tmp_path / name, skill_steps=1, habit_steps=1, rows=8)
        search_warm_up(config)
        made.append((tmp_path / name / "model.safetensors").read_bytes())
    assert made[0] == made[1] != start
    assert (tmp_path / "start" / "model.safetensors").read_bytes() == start
