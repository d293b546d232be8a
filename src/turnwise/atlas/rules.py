"""The rules that the tables of the embedded world must keep, checked."""

import re
from collections.abc import Iterator

from turnwise.atlas.world import (
    SPLITS,
    Entity,
    Kind,
    Mentions,
    Relation,
    World,
    slug,
    wording,
    world,
)
from turnwise.atlas.writing import articles, tasks
from turnwise.types import Task

MIN_SENTENCES = 4
MIN_QUESTIONS = 3

_NOT_IN_NAMES = set('"<>{}[]()\\/:;|')
_NOT_IN_VALUES = _NOT_IN_NAMES | set(",.")
_UNIQUE = (
    ("country", "capital"),
    ("state", "capital"),
    ("state", "abbreviation"),
    ("element", "symbol"),
    ("element", "atomic_number"),
)
"""Relations of which no two entities of the kind have the same value."""
_CITY_AND_COUNTRY = (("city", "country"), ("birth_city", "birth_country"))
"""Pairs of relations: where both are known, the city lies in the country."""
_INVERSE = (("planet", "largest_moon", "planet"),)
"""Kind, relation and the linked entity's relation that must name the entity itself."""
_DETERMINES = (("museum", "city"), ("museum", "country"), ("symbol", "atomic_number"))
"""Pairs of relations: entities that agree in the first agree in the second, over all kinds."""


def check(of: World | None = None) -> list[str]:
    """Every violation of the table rules, one line each: the package's own world unless given."""
    of = of or world()
    found = [*_names(of), *_values(of), *_wordings(of), *_links(of)]
    found += [*_unique(of), *_capitals(of), *_determined(of)]
    found += [*_inverses(of), *_years(of)]
    found += [*_answers(of), *_questions(of), *_splits(of), *_leaks(of)]
    return found


def _names(of: World) -> Iterator[str]:
    seen: dict[str, Entity] = {}
    for entity in of.entities:
        where = f"{entity.kind} {entity.name!r}"
        if not _is_clean(entity.name, 6, _NOT_IN_NAMES) or entity.name.endswith("."):
            yield f"{where}: a name is 1-6 words, begins uppercase, has no barred character"
        first = seen.setdefault(slug(entity.name), entity)
        if first is not entity:
            yield f"{where}: the name is also that of {first.kind} {first.name!r}"
        if not entity.values:
            yield f"{where}: no relation has a value"


def _values(of: World) -> Iterator[str]:
    for entity in of.entities:
        for name, value in entity.values.items():
            relation = of.kinds[entity.kind].relations[name]
            is_name = relation.link is not None and not relation.is_partial
            barred, most = (_NOT_IN_NAMES, 6) if is_name else (_NOT_IN_VALUES, 4)
            if not _is_clean(value, most, barred):
                yield (
                    f"{entity.kind} {entity.name!r}: {name} {value!r} is 1-{most} words, begins "
                    "with an uppercase letter or a digit and has no barred character"
                )


def _is_clean(text: str, most_words: int, barred: set[str]) -> bool:
    begins = bool(text) and (text[0].isupper() or text[0].isdigit())
    spaced = text == " ".join(text.split())
    return begins and spaced and len(text.split()) <= most_words and not set(text) & barred


def _wordings(of: World) -> Iterator[str]:
    for kind in of.kinds.values():
        if not 2 <= len(kind.intro) <= 3 or not all(_is_intro(text) for text in kind.intro):
            yield f"kind {kind.name}: 2-3 intro sentences with {{name}} once and without {{value}}"
        if not 3 <= len(kind.relations) <= 6:
            yield f"kind {kind.name}: 3-6 relations; got {len(kind.relations)}"
        for relation in kind.relations.values():
            yield from (f"{kind.name}.{relation.name}: {text}" for text in _wording(relation))
        yield from _repeated_wording(kind)


def _is_intro(text: str) -> bool:
    return text.count("{name}") == 1 and "{value}" not in text and text.endswith(".")


def _wording(relation: Relation) -> Iterator[str]:
    if len(relation.sentences) < MIN_SENTENCES:
        yield f"at least {MIN_SENTENCES} sentences; got {len(relation.sentences)}"
    if len(relation.questions) < MIN_QUESTIONS:
        yield f"at least {MIN_QUESTIONS} questions; got {len(relation.questions)}"
    for text in relation.sentences:
        if not re.fullmatch(r"[A-Z][^{}\"]+ \{value\}\.", text):
            yield f"a sentence ends with its only {{value}} and has no {{name}}: {text!r}"
    for text in relation.questions:
        if not re.fullmatch(r"[^{}\"]*\{name\}[^{}\"]*[?.]", text):
            yield f"a question has {{name}} once and ends with a mark: {text!r}"
    if not re.fullmatch(r"the [^{}\"]*\{name\}[^{}\"?.]*", relation.phrase):
        yield f"the phrase begins with 'the' and has {{name}} once: {relation.phrase!r}"


def _repeated_wording(kind: Kind) -> Iterator[str]:
    seen: set[str] = set()
    for text in wording(kind):
        if text in seen:
            yield f"kind {kind.name}: the wording {text!r} is there twice"
        seen.add(text)


def _links(of: World) -> Iterator[str]:
    by_name = of.by_name()
    for entity in of.entities:
        for name, value in entity.values.items():
            relation = of.kinds[entity.kind].relations[name]
            linked = by_name.get(value)
            is_plain = relation.link is None or (relation.is_partial and linked is None)
            if not is_plain and (linked is None or linked.kind != relation.link):
                yield f"{entity.kind} {entity.name!r}: {name} {value!r} is no {relation.link}"


def _unique(of: World) -> Iterator[str]:
    for kind, relation in _UNIQUE:
        seen: dict[str, str] = {}
        for entity in (e for e in of.entities if e.kind == kind and relation in e.values):
            first = seen.setdefault(entity.values[relation], entity.name)
            if first != entity.name:
                yield f"{kind} {entity.name!r}: {first!r} has the same {relation}"


def _capitals(of: World) -> Iterator[str]:
    """Facts that put the capital of one country into another."""
    capitals = {e.values["capital"]: e.name for e in of.entities if e.kind == "country" and "capital" in e.values}
    for entity in of.entities:
        for city, country in _CITY_AND_COUNTRY:
            place, land = entity.values.get(city), entity.values.get(country)
            if place in capitals and land is not None and land != capitals[place]:
                yield (
                    f"{entity.kind} {entity.name!r}: {city} {place!r} is the capital of "
                    f"{capitals[place]}, not of {land}"
                )


def _determined(of: World) -> Iterator[str]:
    """Facts that disagree with a fact of another entity."""
    pairs = (*_DETERMINES, *_CITY_AND_COUNTRY)
    seen: dict[tuple[str, str, str], tuple[str, str]] = {}
    for entity in of.entities:
        for one, other in pairs:
            if one in entity.values and other in entity.values:
                value = entity.values[other]
                key = (one.removeprefix("birth_"), entity.values[one], other.removeprefix("birth_"))
                first, name = seen.setdefault(key, (value, entity.name))
                if first != value:
                    yield (
                        f"{entity.kind} {entity.name!r}: {other} of {key[1]!r} is {value!r}, but {first!r} for {name!r}"
                    )


def _inverses(of: World) -> Iterator[str]:
    """Links whose other end does not lead back."""
    by_name = of.by_name()
    for kind, there, back in _INVERSE:
        for entity in (e for e in of.entities if e.kind == kind):
            linked = by_name.get(entity.values.get(there, ""))
            if linked is not None and linked.values.get(back) != entity.name:
                yield f"{kind} {entity.name!r}: {back} of {linked.name!r} is not this {kind}"


def _years(of: World) -> Iterator[str]:
    """Works older than who made them, and lives that end before they begin."""
    by_name = of.by_name()
    for entity in of.entities:
        birth, death = _year(entity, "birth_year"), _year(entity, "death_year")
        if birth is not None and death is not None and not birth < death < birth + 115:
            yield f"{entity.kind} {entity.name!r}: born {birth}, dead {death}"
        year = _year(entity, "year")
        for relation in of.kinds[entity.kind].relations.values():
            value = entity.values.get(relation.name, "")
            linked = by_name.get(value)
            if relation.link == "person" and linked is not None and year is not None:
                born = _year(linked, "birth_year")
                if born is not None and year < born + 5:
                    yield f"{entity.kind} {entity.name!r}: {year}, but {value} was born {born}"


def _year(entity: Entity, relation: str) -> int | None:
    value = entity.values.get(relation, "")
    return int(value) if value.isdigit() else None


def _answers(of: World) -> Iterator[str]:
    """Facts whose value their article does not state."""
    texts = {article.id: article.text for article in articles(of)}
    for split in SPLITS:
        for task in tasks(split, of=of):
            text = texts[task.metadata["articles"][-1]]
            if not re.search(rf"(?<!\w){re.escape(task.answers[0])}(?!\w)", text):
                yield f"{task.id}: the article does not state {task.answers[0]!r}"


def _questions(of: World) -> Iterator[str]:
    """Questions, over all splits and hops, that have two answers."""
    seen: dict[str, tuple[str, str]] = {}
    for task in _all_tasks(of):
        answer, first = seen.setdefault(task.question, (task.answers[0], task.id))
        if answer != task.answers[0]:
            yield f"{task.id}: {first} asks the same and has another answer"


def _all_tasks(of: World) -> Iterator[Task]:
    for split in SPLITS:
        yield from tasks(split, phrasing="all", of=of)
        yield from tasks(split, hops=2, phrasing="all", of=of)


def _splits(of: World) -> Iterator[str]:
    """Kinds without an entity in some split."""
    for kind in of.kinds:
        there = {e.split for e in of.entities if e.kind == kind}
        yield from (f"kind {kind}: no entity in {s}" for s in SPLITS if s not in there)


def _leaks(of: World) -> Iterator[str]:
    """Articles and questions that mention an entity of a later split."""
    split_of = {e.name: e.split for e in of.entities}
    for place, split in enumerate(SPLITS[:-1]):
        later = Mentions(n for n, s in split_of.items() if SPLITS.index(s) > place)
        texts = [(a.id, f"{a.title}. {a.text}") for a in articles(of) if split_of[a.title] == split]
        for hops in (1, 2):
            found = tasks(split, hops=hops, phrasing="all", of=of)
            texts += [(t.id, f"{t.question} {t.answers[0]}") for t in found]
        for name, text in texts:
            yield from (f"{name}: mentions {n!r}, held out of {split}" for n in later.find(text))
