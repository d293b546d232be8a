"""The embedded world: kinds, entities and their splits, read from the tables beside this module.

Each kind is a pair of files in `tables/`: `<kind>.tsv` holds one entity a row and one relation a
column, `<kind>.toml` holds the wording. Same files, same world, same splits.
"""

import functools
import hashlib
import re
import tomllib
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from importlib.resources.abc import Traversable
from typing import Any, Literal, NamedTuple

from turnwise.errors import InputError, unknown_name

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
"""From the earliest to the latest: an entity mentions none of a later split than its own."""

_HELD_OUT: tuple[tuple[Split, float], ...] = (("test", 0.20), ("validation", 0.08))
"""The share of each kind's entities that a split takes, in the order in which the splits choose."""
_MOST_MENTIONS = 4
"""An entity that more others mention stays in train: holding it out would take them all along."""


@dataclass(frozen=True, kw_only=True)
class Relation:
    """The wording of one relation of a kind."""

    name: str
    sentences: tuple[str, ...]
    """Templates with `{value}` as the last word and without the entity's name."""
    questions: tuple[str, ...]
    """Templates with `{name}`, which a noun phrase may replace."""
    phrase: str
    """The noun phrase for the value, with `{name}`: the inner part of a two-hop question."""
    link: str | None = None
    """The kind whose names the values of this relation are; None where values are plain text."""
    is_partial: bool = False
    """Whether a link's values may also be plain text, namely what has no table row."""


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A kind of entity: what it is called and how its articles and questions are worded."""

    name: str
    noun: str
    intro: tuple[str, ...]
    relations: Mapping[str, Relation]


@dataclass(frozen=True, kw_only=True)
class Entity:
    """One entity: `values` holds the relations whose value is known, in the table's order."""

    name: str
    kind: str
    values: Mapping[str, str]
    split: Split = "train"


class World(NamedTuple):
    """All kinds by name, and all entities in table order: a name that is there twice stays so."""

    kinds: Mapping[str, Kind]
    entities: tuple[Entity, ...]

    def by_name(self) -> dict[str, Entity]:
        return {entity.name: entity for entity in self.entities}


@functools.cache
def world() -> World:
    """The world of the package's own tables."""
    return read_world(resources.files("turnwise.atlas") / "tables")


@functools.cache
def kinds() -> dict[str, Kind]:
    """The kinds of the embedded world, by name. Cached: do not change it."""
    return dict(world().kinds)


@functools.cache
def entities() -> dict[str, Entity]:
    """The entities of the embedded world, by name. Cached: do not change it."""
    return world().by_name()


def read_world(tables: Traversable) -> World:
    """The world in a folder of tables: every kind that has both a `.tsv` and a `.toml` file.

    Raises InputError where a file does not hold what it must.
    """
    names = {entry.name for entry in tables.iterdir()}
    stems = sorted(n[:-5] for n in names if n.endswith(".toml") and n[:-5] + ".tsv" in names)
    kinds_ = {stem: _read_kind(stem, tables / f"{stem}.toml") for stem in stems}
    rows = [e for stem in stems for e in _read_entities(kinds_[stem], tables / f"{stem}.tsv")]
    return with_splits(World(kinds_, tuple(rows)))


def words(text: str) -> tuple[str, ...]:
    """The words of a text, without punctuation, in their own case: "Guinea-Bissau's" has three."""
    return tuple(re.findall(r"\w+", text))


def slug(text: str) -> str:
    """A name as it stands in ids: lowercase letters a-z, digits and hyphens."""
    plain = unicodedata.normalize("NFKD", text.replace("'", "")).encode("ascii", "ignore").decode()
    return re.sub(r"[^a-z0-9]+", "-", plain.lower()).strip("-")


def hash_rank(*parts: str) -> int:
    """A whole number in [0, 2**64) that depends on the texts alone, evenly spread."""
    return int.from_bytes(hashlib.sha256("\0".join(parts).encode()).digest()[:8], "big")


class Mentions:
    """Finds which of a set of names occur in a text, as whole phrases and case-sensitively."""

    def __init__(self, names: Iterable[str]):
        self._by_first: dict[str, list[tuple[tuple[str, ...], str]]] = {}
        for name in names:
            key = words(name)
            if key:
                self._by_first.setdefault(key[0], []).append((key, name))

    def find(self, text: str) -> set[str]:
        """The names that occur in `text`."""
        tokens = words(text)
        return set(self._find(tokens))

    def _find(self, tokens: Sequence[str]) -> Iterator[str]:
        for i, token in enumerate(tokens):
            for key, name in self._by_first.get(token, ()):
                if tuple(tokens[i : i + len(key)]) == key:
                    yield name


def with_splits(world: World) -> World:
    """The same world with every entity's split chosen.

    Entities are held out in the order of a hash of their names, those that others mention first,
    while every kind has room in its share. An entity takes along everything that mentions it,
    directly or through others, so that no earlier split ever reads a held-out name. What many
    entities mention, what those mention in turn, and what the wording itself mentions stays in
    train.
    """
    mentions = _mention_graph(world)
    mentioned_by: dict[str, set[str]] = {name: set() for name in mentions}
    for name, found in mentions.items():
        for other in found:
            mentioned_by[other].add(name)
    popular = {name for name, by in mentioned_by.items() if len(by) > _MOST_MENTIONS}
    pinned = _reachable(popular | _mentioned_in_wording(world), mentions)
    splits: dict[str, Split] = dict.fromkeys(pinned, "train")
    for split, share in _HELD_OUT:
        splits |= dict.fromkeys(_held_out(world, share, splits, mentioned_by), split)
    chosen = tuple(
        Entity(name=e.name, kind=e.kind, values=e.values, split=splits.get(e.name, "train")) for e in world.entities
    )
    return World(world.kinds, chosen)


def check_split(split: str) -> None:
    """Raises ConfigError unless `split` is one of SPLITS."""
    if split not in SPLITS:
        raise unknown_name("split", split, SPLITS)


def _held_out(world: World, share: float, taken: Mapping[str, Split], mentioned_by: Mapping[str, set[str]]) -> set[str]:
    """The names that fill `share` of every kind, each with all that mention it and are not taken.

    What mentions a free name is never pinned to train: what a pinned one mentions is pinned too.
    """
    kind_of = {e.name: e.kind for e in world.entities}
    room = {k: max(1, round(share * n)) for k, n in Counter(kind_of.values()).items()}
    held_out: set[str] = set()
    for name in sorted(kind_of, key=lambda n: (not mentioned_by[n], hash_rank("split", n))):
        if name in taken or name in held_out:
            continue
        group = _reachable({name}, mentioned_by) - held_out - set(taken)
        needed = Counter(kind_of[n] for n in group)
        if all(needed[kind] <= room[kind] for kind in needed):
            held_out |= group
            room = {kind: room[kind] - needed[kind] for kind in room}
    return held_out


def _mention_graph(world: World) -> dict[str, set[str]]:
    """The other entities that each entity's name and values mention."""
    finder = Mentions(e.name for e in world.entities)
    graph: dict[str, set[str]] = {}
    for entity in world.entities:
        found = set().union(*(finder.find(t) for t in (entity.name, *entity.values.values())))
        graph.setdefault(entity.name, set()).update(found - {entity.name})
    return graph


def _mentioned_in_wording(world: World) -> set[str]:
    finder = Mentions(e.name for e in world.entities)
    return set().union(*(finder.find(text) for kind in world.kinds.values() for text in wording(kind)))


def wording(kind: Kind) -> list[str]:
    """Every template of a kind."""
    texts = list(kind.intro)
    for relation in kind.relations.values():
        texts += [*relation.sentences, *relation.questions, relation.phrase]
    return texts


def _reachable(start: Iterable[str], edges: Mapping[str, set[str]]) -> set[str]:
    """`start` and everything that a path of edges leads to from it."""
    seen = set(start)
    front = list(seen)
    while front:
        new = edges[front.pop()] - seen
        seen |= new
        front += new
    return seen


def _read_kind(stem: str, file: Traversable) -> Kind:
    try:
        data = tomllib.loads(file.read_text(encoding="utf-8"))
        relations = {name: _relation(name, r) for name, r in data["relations"].items()}
        kind = Kind(
            name=data["kind"],
            noun=data["noun"],
            intro=tuple(data["intro"]),
            relations=relations,
        )
    except (tomllib.TOMLDecodeError, KeyError, TypeError, AttributeError) as error:
        what = f"got {type(error).__name__}: {error}; correct the file"
        raise InputError(f"{file.name} must hold a kind's wording; {what}") from error
    if kind.name != stem:
        what = f'kind = "{stem}"; got {kind.name!r}; rename one of them'
        raise InputError(f"{file.name} must hold {what}")
    return kind


def _relation(name: str, data: Mapping[str, Any]) -> Relation:
    return Relation(
        name=name,
        sentences=tuple(data["sentences"]),
        questions=tuple(data["questions"]),
        phrase=data["phrase"],
        link=data.get("link"),
        is_partial=data.get("partial", False),
    )


def _read_entities(kind: Kind, file: Traversable) -> Iterator[Entity]:
    """The rows of a kind's table; a column must have its relation, a row its columns."""
    lines = file.read_text(encoding="utf-8").splitlines()
    header = lines[0].split("\t") if lines else []
    if header[:1] != ["name"] or sorted(header[1:]) != sorted(kind.relations):
        want = ", ".join(["name", *kind.relations])
        raise InputError(
            f"{file.name} must have the columns of {kind.name}.toml ({want}); got "
            f"{', '.join(header) or 'none'}; make the two files agree"
        )
    for number, line in enumerate(lines[1:], start=2):
        cells = line.split("\t")
        if len(cells) != len(header):
            raise InputError(
                f"{file.name}, line {number}, must have {len(header)} cells; got {len(cells)}; "
                "separate cells with tabs and leave unknown ones empty"
            )
        values = {r: v for r, v in zip(header[1:], cells[1:], strict=True) if v}
        yield Entity(name=cells[0], kind=kind.name, values=values)
