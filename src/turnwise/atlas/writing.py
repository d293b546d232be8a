"""Articles and questions: the embedded world put into words."""

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from turnwise.atlas.world import (
    Entity,
    Kind,
    Mentions,
    Relation,
    Split,
    World,
    check_split,
    hash_rank,
    slug,
    world,
)
from turnwise.types import Task

Phrasing = Literal["one", "all"]


@dataclass(frozen=True, kw_only=True)
class Article:
    """One document of the search corpus."""

    id: str
    title: str
    text: str


def article_text(kind: Kind, name: str, values: Mapping[str, str], rng: random.Random) -> str:
    """An intro sentence and one sentence per relation that has a value, in shuffled order.

    `rng` draws the order and the wording. The entity may be invented.
    """
    relations = [kind.relations[r] for r, value in values.items() if value]
    rng.shuffle(relations)
    sentences = [rng.choice(kind.intro).replace("{name}", name)]
    for relation in relations:
        sentences.append(rng.choice(relation.sentences).replace("{value}", values[relation.name]))
    return " ".join(sentences)


def article_id(entity: Entity) -> str:
    """The id of an entity's article: "atlas-country-kenya"."""
    return f"atlas-{entity.kind}-{slug(entity.name)}"


def articles(of: World | None = None) -> list[Article]:
    """The search corpus: one article per entity, each worded by a generator seeded from its name.

    `of` is the package's own world unless given.
    """
    of = of or world()
    return [
        Article(
            id=article_id(e),
            title=e.name,
            text=article_text(of.kinds[e.kind], e.name, e.values, random.Random(f"atlas {e.name}")),
        )
        for e in of.entities
    ]


def tasks(split: Split, *, hops: Literal[1, 2] = 1, phrasing: Phrasing = "one", of: World | None = None) -> list[Task]:
    """The questions about a split's entities, in table order.

    One hop asks for a value of the entity; two hops ask for a value of the entity that a value of
    the first names ("Where was the author of Hamlet born?"), which may be of an earlier split.
    `phrasing` "one" asks for each fact in one wording, chosen by a hash; "all" in every wording. A
    task's metadata: `entity`, `relation` (two hops: both, with a space between), `linked` (the
    entity between the hops, or None), `articles` (ids of the articles that hold the facts, in the
    order of the hops), `hops`. Two hops are left out where the question names the entity between them
    ("the country of Mount Kenya") or its answer.
    """
    check_split(split)
    of = of or world()
    by_name = of.by_name()
    found: list[Task] = []
    for entity in of.entities:
        if entity.split == split:
            make = _one_hop(of, entity) if hops == 1 else _two_hop(of, entity, by_name)
            for wordings in make:
                found += wordings if phrasing == "all" else [_one_of(wordings)]
    return found


def _one_of(wordings: list[Task]) -> Task:
    return wordings[hash_rank("phrasing", wordings[0].id) % len(wordings)]


def _one_hop(of: World, entity: Entity) -> Iterator[list[Task]]:
    """For each fact of the entity, the task in all its wordings."""
    for name in entity.values:
        relation = of.kinds[entity.kind].relations[name]
        yield _wordings(entity, (relation,), entity.name, entity)


def _two_hop(of: World, entity: Entity, by_name: Mapping[str, Entity]) -> Iterator[list[Task]]:
    for name, value in entity.values.items():
        inner = of.kinds[entity.kind].relations[name]
        linked = by_name.get(value)
        if inner.link is None or linked is None or linked.kind != inner.link:
            continue
        phrase = inner.phrase.replace("{name}", entity.name)
        if linked.name.lower() in phrase.lower():  # "the country of Mount Kenya" needs no first search
            continue
        for outer, answer in linked.values.items():
            if Mentions([answer]).find(phrase):
                continue
            relations = (inner, of.kinds[linked.kind].relations[outer])
            yield _wordings(entity, relations, phrase, linked)


def _wordings(entity: Entity, relations: tuple[Relation, ...], subject: str, holder: Entity) -> list[Task]:
    """The task in every wording of the last relation: asks about `subject`, `holder` answers."""
    names = [relation.name for relation in relations]
    hops = len(relations)
    metadata = {
        "entity": entity.name,
        "relation": " ".join(names),
        "linked": holder.name if hops == 2 else None,
        "articles": [article_id(e) for e in ((entity,) if hops == 1 else (entity, holder))],
        "hops": hops,
    }
    return [
        Task(
            id=f"{article_id(entity)}-{'-'.join(names).replace('_', '-')}-{number}",
            question=_question(template, subject),
            answers=(holder.values[names[-1]],),
            kind=entity.kind if hops == 1 else "two-hop",
            metadata=metadata,
        )
        for number, template in enumerate(relations[-1].questions, start=1)
    ]


def _question(template: str, subject: str) -> str:
    question = template.replace("{name}", subject)
    return question[:1].upper() + question[1:]
