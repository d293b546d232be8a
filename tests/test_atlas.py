import dataclasses
import os
import random
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from turnwise import atlas
from turnwise.atlas.world import Mentions, read_world, slug, with_splits, world
from turnwise.errors import ConfigError, InputError

TABLES = Path(atlas.__file__).parent / "tables"


def relation(name: str, words: str, *, link: str | None = None) -> atlas.Relation:
    ways = ("Its {} is", "The {} is", "As {} it has", "By {} it is")
    asks = (
        "What is the {} of {{name}}?",
        "Which {} does {{name}} have?",
        "Name the {} of {{name}}.",
    )
    return atlas.Relation(
        name=name,
        sentences=tuple(way.format(words) + " {value}." for way in ways),
        questions=tuple(ask.format(words) for ask in asks),
        phrase=f"the {words} of {{name}}",
        link=link,
    )


def kind(name: str, *relations: atlas.Relation) -> atlas.Kind:
    intro = (f"{{name}} is a {name}.", f"{{name}} is one {name}.")
    return atlas.Kind(name=name, noun=name, intro=intro, relations={r.name: r for r in relations})


KINDS = {
    "country": kind(
        "country",
        relation("capital", "capital"),
        relation("language", "language"),
        relation("continent", "continent"),
    ),
    "person": kind(
        "person",
        relation("birth_year", "birth year"),
        relation("death_year", "death year"),
        relation("birth_country", "land of birth", link="country"),
        relation("birth_city", "town of birth"),
    ),
    "painting": kind(
        "painting",
        relation("painter", "painter", link="person"),
        relation("year", "year"),
        relation("museum", "museum"),
        relation("city", "city"),
    ),
}


def entity(kind: str, name: str, split: atlas.Split, *values: str) -> atlas.Entity:
    pairs = zip(KINDS[kind].relations, values, strict=False)
    return atlas.Entity(name=name, kind=kind, values={r: v for r, v in pairs if v}, split=split)


SMALL = atlas.World(
    KINDS,
    (
        entity("country", "Kenya", "train", "Nairobi", "Swahili", "Africa"),
        entity("country", "Ghana", "validation", "Accra", "English", "Africa"),
        entity("country", "Peru", "test", "Lima", "Spanish", "South America"),
        entity("person", "Ann Oak", "train", "1850", "1910", "Kenya", "Nairobi"),
        entity("person", "Ben Ash", "validation", "1860", "1920", "Ghana", "Tema"),
        entity("person", "Cat Elm", "test", "1870", "1930", "Peru", "Lima"),
        entity("painting", "Red Hill", "train", "Ann Oak", "1880", "Old Hall", "Nairobi"),
        entity("painting", "Blue Lake", "validation", "Ben Ash", "1890", "Old Hall", "Nairobi"),
        entity("painting", "Green Sea", "test", "Cat Elm", "1900", "New Hall", "Tema"),
    ),
)


def with_value(name: str, relation: str, value: str) -> atlas.World:
    return with_entity(name, lambda e: {"values": {**e.values, relation: value}})


def with_entity(name: str, change: Callable[[atlas.Entity], dict]) -> atlas.World:
    entities = (dataclasses.replace(e, **change(e)) if e.name == name else e for e in SMALL.entities)
    return atlas.World(KINDS, tuple(entities))


def with_wording(**change: object) -> atlas.World:
    """The small world in which the relation of a country's language is changed."""
    country = KINDS["country"]
    language = dataclasses.replace(country.relations["language"], **change)
    relations = {**country.relations, "language": language}
    changed = dataclasses.replace(country, relations=relations)
    return atlas.World({**KINDS, "country": changed}, SMALL.entities)


def linked_language(value: str) -> atlas.World:
    """A language that is a person where it has a row; here Kenya's language is `value`."""
    kinds = with_wording(link="person", is_partial=True).kinds
    return atlas.World(kinds, with_value("Kenya", "language", value).entities)


def planet_world(planet_of_moon: str) -> atlas.World:
    """Two planets whose largest moons are Io and Rhea; the moon Io names the given planet."""
    planet = kind("planet", relation("largest_moon", "largest moon", link="moon"))
    moon = kind("moon", relation("planet", "planet", link="planet"))
    rows = (
        ("Jupiter", "planet", {"largest_moon": "Io"}),
        ("Saturn", "planet", {"largest_moon": "Rhea"}),
        ("Io", "moon", {"planet": planet_of_moon}),
        ("Rhea", "moon", {"planet": "Saturn"}),
    )
    entities = tuple(atlas.Entity(name=n, kind=k, values=v) for n, k, v in rows)
    return atlas.World({"planet": planet, "moon": moon}, entities)


def sentences(first: str) -> dict[str, tuple[str, ...]]:
    return {"sentences": (first, *KINDS["country"].relations["language"].sentences[1:])}


def without(*names: str) -> atlas.World:
    return atlas.World(KINDS, tuple(e for e in SMALL.entities if e.name not in names))


CAPITAL = KINDS["country"].relations["capital"]
PLANTED = {
    "barred character in a name": (
        with_entity("Red Hill", lambda e: {"name": "Red: Hill"}),
        "'Red: Hill': a name is",
    ),
    "lowercase name": (with_entity("Red Hill", lambda e: {"name": "red hill"}), "a name is 1-6"),
    "long name": (with_entity("Red Hill", lambda e: {"name": "A B C D E F G"}), "a name is 1-6"),
    "trailing period": (with_entity("Red Hill", lambda e: {"name": "Red H."}), "a name is 1-6"),
    "name twice over kinds": (
        with_entity("Red Hill", lambda e: {"name": "Peru"}),
        "the name is also that of country 'Peru'",
    ),
    "names alike but for accents": (
        with_entity("Red Hill", lambda e: {"name": "Pérú"}),
        "the name is also that of country 'Peru'",
    ),
    "entity without a fact": (with_entity("Red Hill", lambda e: {"values": {}}), "no relation has"),
    "list as a value": (with_value("Kenya", "language", "Swahili, English"), "is 1-4 words"),
    "lowercase value": (with_value("Kenya", "language", "swahili"), "is 1-4 words"),
    "long value": (with_value("Kenya", "language", "One Two Three Four Five"), "is 1-4 words"),
    "space around a value": (with_value("Kenya", "language", "Swahili "), "is 1-4 words"),
    "few sentences": (with_wording(sentences=CAPITAL.sentences[:3]), "at least 4 sentences; got 3"),
    "few questions": (with_wording(questions=CAPITAL.questions[:2]), "at least 3 questions; got 2"),
    "value inside a sentence": (with_wording(**sentences("{value} it is.")), "ends with its only"),
    "name in a sentence": (with_wording(**sentences("{name} has {value}.")), "ends with its only"),
    "question without the name": (
        with_wording(questions=("What?", "Which?", "Who?")),
        "a question has {name} once",
    ),
    "phrase without an article": (with_wording(phrase="language of {name}"), "begins with 'the'"),
    "sentence of two relations": (with_wording(sentences=CAPITAL.sentences), "is there twice"),
    "question of two relations": (with_wording(questions=CAPITAL.questions), "asks the same"),
    "sentence without the value": (
        with_wording(sentences=("It speaks.",) * 4),
        "the article does not state 'Swahili'",
    ),
    "link to nothing": (with_value("Ann Oak", "birth_country", "Atlantis"), "is no country"),
    "link to another kind": (with_value("Ann Oak", "birth_country", "Red Hill"), "is no country"),
    "partial link to another kind": (
        linked_language("Red Hill"),
        "language 'Red Hill' is no person",
    ),
    "largest moon of another planet": (
        planet_world("Saturn"),
        "planet 'Jupiter': planet of 'Io' is not this planet",
    ),
    "capital of two countries": (with_value("Peru", "capital", "Accra"), "has the same capital"),
    "capital of another country": (
        with_value("Ann Oak", "birth_city", "Accra"),
        "birth_city 'Accra' is the capital of Ghana, not of Kenya",
    ),
    "museum in two cities": (
        with_value("Blue Lake", "city", "Accra"),
        "city of 'Old Hall' is 'Accra', but 'Nairobi' for 'Red Hill'",
    ),
    "work older than its maker": (
        with_value("Red Hill", "year", "1850"),
        "1850, but Ann Oak was born 1850",
    ),
    "death before birth": (with_value("Ann Oak", "death_year", "1849"), "born 1850, dead 1849"),
    "kind without a test entity": (without("Green Sea"), "kind painting: no entity in test"),
    "held-out name in train": (
        with_value("Red Hill", "museum", "Peru Hall"),
        "mentions 'Peru', held out of train",
    ),
    "test name in validation": (
        with_value("Blue Lake", "museum", "Peru Hall"),
        "mentions 'Peru', held out of validation",
    ),
}


def test_the_tables_keep_every_rule():
    assert atlas.check() == []


def test_a_small_world_that_keeps_every_rule_passes():
    assert atlas.check(SMALL) == []


@pytest.mark.parametrize("what", PLANTED)
def test_check_finds(what: str):
    planted, message = PLANTED[what]
    assert [line for line in atlas.check(planted) if message in line]


def test_a_partial_link_may_be_plain_text_or_lead_on():
    assert atlas.check(linked_language("Gikuyu")) == []
    tasks = atlas.tasks("train", hops=2, of=linked_language("Ann Oak"))
    assert "Kenya" in {task.metadata["entity"] for task in tasks}


def test_a_largest_moon_of_its_own_planet_passes():
    found = atlas.check(planet_world("Jupiter"))
    assert not [line for line in found if "is not this" in line]


def test_every_table_has_its_wording_and_the_other_way_round():
    tsv = {path.stem for path in TABLES.glob("*.tsv")}
    assert tsv == {path.stem for path in TABLES.glob("*.toml")} == set(atlas.kinds())


def test_the_world_is_large_enough_and_split_about_72_8_20():
    entities = atlas.entities().values()
    share = {s: sum(e.split == s for e in entities) / len(entities) for s in atlas.SPLITS}
    assert len(entities) >= 1000
    assert 0.66 < share["train"] < 0.78
    assert 0.06 < share["validation"] < 0.12
    assert 0.15 < share["test"] < 0.25


def test_no_text_before_the_test_split_holds_a_test_name():
    # written without the package's own search: regular expressions over the raw texts
    split_of = {name: e.split for name, e in atlas.entities().items()}
    texts = [f"{a.title}. {a.text}" for a in atlas.articles() if split_of[a.title] != "test"]
    for split in ("train", "validation"):
        for hops in (1, 2):
            texts += [t.question for t in atlas.tasks(split, hops=hops, phrasing="all")]
    assert len(texts) > 5000
    joined = "\n".join(texts)
    test_names = [name for name, split in split_of.items() if split == "test" and name in joined]
    assert [n for n in test_names if re.search(rf"\b{re.escape(n)}\b", joined)] == []


def test_the_world_is_the_same_in_every_process():
    code = (
        "import hashlib; from turnwise import atlas; "
        "t = [t for s in atlas.SPLITS for h in (1, 2) for t in atlas.tasks(s, hops=h)]; "
        "print(hashlib.sha256(repr((t, atlas.articles())).encode()).hexdigest())"
    )
    printed = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(printed) == 1


def test_one_hop_asks_for_every_fact_once_or_in_every_wording():
    # train: Kenya has 3 facts, Ann Oak 4, Red Hill 4; each has 3 wordings
    once, all_ = (atlas.tasks("train", phrasing=p, of=SMALL) for p in ("one", "all"))
    assert len(once) == 11
    assert len({task.id for task in all_}) == 33
    assert {task.id for task in once} <= {task.id for task in all_}
    task = all_[0]
    assert task.id == "atlas-country-kenya-capital-1"
    assert task.question == "What is the capital of Kenya?"
    assert task.answers == ("Nairobi",)
    assert task.kind == "country"
    assert task.metadata["articles"] == ["atlas-country-kenya"]


def test_two_hops_ask_about_the_linked_entity_by_its_phrase():
    # Ann Oak -> Kenya: 3 facts; Red Hill -> Ann Oak: 4 facts
    tasks = {t.id: t for t in atlas.tasks("train", hops=2, phrasing="all", of=SMALL)}
    assert len(tasks) == (3 + 4) * 3
    task = tasks["atlas-person-ann-oak-birth-country-capital-2"]
    assert task.question == "Which capital does the land of birth of Ann Oak have?"
    assert task.answers == ("Nairobi",)
    assert task.kind == "two-hop"
    assert task.metadata == {
        "entity": "Ann Oak",
        "relation": "birth_country capital",
        "linked": "Kenya",
        "articles": ["atlas-person-ann-oak", "atlas-country-kenya"],
        "hops": 2,
    }


def test_two_hops_that_lead_back_to_the_question_are_left_out():
    # Galatea's planet is Neptune, whose largest moon is Galatea here: asking for it says the answer
    planet = kind("planet", relation("moon", "moon", link="moon"), relation("type", "type"))
    moon = kind("moon", relation("planet", "planet", link="planet"))
    entities = (
        atlas.Entity(name="Neptune", kind="planet", values={"moon": "Galatea", "type": "Icy"}),
        atlas.Entity(name="Galatea", kind="moon", values={"planet": "Neptune"}),
    )
    of = atlas.World({"planet": planet, "moon": moon}, entities)
    assert [t.metadata["relation"] for t in atlas.tasks("train", hops=2, of=of)] == ["planet type"]


def test_two_hops_whose_question_names_the_entity_between_them_are_left_out():
    mountain = kind("mountain", relation("country", "country", link="country"))
    values = {"capital": "Nairobi", "continent": "Africa"}
    peaks = [
        atlas.Entity(name=name, kind="mountain", values={"country": "Kenya"}) for name in ("Mount Kenya", "Batian")
    ]
    entities = (atlas.Entity(name="Kenya", kind="country", values=values), *peaks)
    of = atlas.World({"country": KINDS["country"], "mountain": mountain}, entities)
    assert {t.metadata["entity"] for t in atlas.tasks("train", hops=2, of=of)} == {"Batian"}


def test_an_article_of_an_invented_entity_states_every_value_once():
    values = {"capital": "Zib", "language": "", "continent": "Oria"}
    text = atlas.article_text(KINDS["country"], "Zorland", values, random.Random(3))
    assert text.startswith("Zorland is ")
    assert text.count("Zib.") == text.count("Oria.") == 1
    assert text.count(".") == 3
    assert text == atlas.article_text(KINDS["country"], "Zorland", values, random.Random(3))


def test_a_held_out_entity_takes_along_what_mentions_it_and_popular_ones_stay():
    # every person mentions a country: Kenya is mentioned by 5 others, each other country by one
    countries = [entity("country", f"Land{i}", "train", f"Town{i}") for i in range(20)]
    people = [entity("person", f"Person{i}", "train", "", "", f"Land{i}") for i in range(20)]
    fans = [entity("person", f"Fan{i}", "train", "", "", "Kenya") for i in range(5)]
    kenya = entity("country", "Kenya", "train", "Nairobi")
    found = with_splits(atlas.World(KINDS, (kenya, *countries, *people, *fans))).by_name()
    assert found["Kenya"].split == "train"
    order = {split: place for place, split in enumerate(atlas.SPLITS)}
    for i in range(20):
        assert order[found[f"Person{i}"].split] >= order[found[f"Land{i}"].split]
    # 20 % of 21 countries is 4, 8 % is 2
    splits = [e.split for e in found.values() if e.kind == "country"]
    assert (splits.count("test"), splits.count("validation")) == (4, 2)


def test_what_the_wording_mentions_stays_in_train():
    # every name is a word of a template such as "As capital it has {value}."
    def splits(*names: str) -> set[str]:
        rows = tuple(entity("country", name, "train", "Town") for name in names)
        return {e.split for e in with_splits(atlas.World(KINDS, rows)).entities}

    assert splits("Its", "The", "As", "By", "What", "Which") == {"train"}
    assert splits("Ada", "Bea", "Cid", "Dan", "Eva", "Fay") == set(atlas.SPLITS)


def test_names_are_found_as_whole_phrases_in_their_own_case():
    find = Mentions(["Niger", "New York", "York", "Kenya"]).find
    assert find("Nigeria and kenya") == set()
    assert find("In New York, Kenya's guest") == {"New York", "York", "Kenya"}


def test_ids_are_plain_ascii():
    assert slug("Côte d'Ivoire") == "cote-divoire"
    assert all(re.fullmatch(r"[a-z0-9-]+", article.id) for article in atlas.articles())


def test_article_ids_and_task_ids_are_unique_and_tasks_name_articles():
    ids = {article.id for article in atlas.articles()}
    assert len(ids) == len(atlas.articles()) == len(atlas.entities())
    tasks = [t for s in atlas.SPLITS for h in (1, 2) for t in atlas.tasks(s, hops=h, phrasing="all")]
    assert len({t.id for t in tasks}) == len(tasks)
    assert {a for t in tasks for a in t.metadata["articles"]} <= ids


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("name\tsymbol\nIron\tFe\n", "must have the columns of metal.toml .name, sign."),
        ("name\tsign\nIron\tFe\tmore\n", "line 2, must have 2 cells; got 3"),
        ("", "got none"),
    ],
)
def test_a_table_that_does_not_fit_its_wording_is_an_error(tmp_path: Path, table: str, message: str):
    wording = '[relations.sign]\nsentences = []\nquestions = []\nphrase = ""\n'
    head = 'kind = "metal"\nnoun = "metal"\nintro = []\n'
    (tmp_path / "metal.toml").write_text(head + wording)
    (tmp_path / "metal.tsv").write_text(table)
    with pytest.raises(InputError, match=message):
        read_world(tmp_path)


@pytest.mark.parametrize("wording", ["kind = ", 'kind = "metal"\n', 'kind = "wood"\n'])
def test_wording_that_cannot_be_read_is_an_error(tmp_path: Path, wording: str):
    (tmp_path / "metal.toml").write_text(wording)
    (tmp_path / "metal.tsv").write_text("name\nIron\n")
    with pytest.raises(InputError, match=re.escape("metal.toml")):
        read_world(tmp_path)


def test_a_misspelt_split_is_an_error():
    with pytest.raises(ConfigError, match="did you mean test"):
        atlas.tasks("tests")  # type: ignore[arg-type]


def test_the_packages_world_is_the_one_in_its_tables():
    assert read_world(TABLES) == world()
