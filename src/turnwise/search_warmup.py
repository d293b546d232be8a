"""The second starting checkpoint: a policy that can copy and read, taught to search several times.

It speaks the protocol of `turnwise.search_tags` (Search-R1's, arXiv 2503.09516) about questions of one hop and of two:
search the entity that the question names, read the bridge out of its article, search the bridge, read the answer.
Every thought names what is to be read next, so that reading from the first article and from the second one is the same
skill. Two phases, as in `turnwise.warmup`: *skills*, everything done well, and *habits*, a base model's faults.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from turnwise import atlas
from turnwise.batch import Row
from turnwise.chat import Chat
from turnwise.policy import Policy, load_policy, save_policy
from turnwise.search_tags import NO_SEARCHES_LEFT, parse, result_text, system_prompt
from turnwise.tools import error_result
from turnwise.types import Message, Task, ToolResult
from turnwise.warmup import (
    DIRECT_THOUGHTS,
    FAILED_THOUGHTS,
    Demonstration,
    Phase,
    Subject,
    SubjectSource,
    Watch,
    demonstration_row,
    invented_name,
    repetition_row,
    search_stub,
    teach,
    unfamiliar_question,
)

FIRST_THOUGHTS = ("First I need the {relation}.", "Let me find the {relation} first.", "I start with the {relation}.")
ONLY_THOUGHTS = ("I need the {relation}.", "Let me look up the {relation}.", "I will search for the {relation}.")
BRIDGE_THOUGHTS = ("Now I look up the {relation}.", "I go on with the {relation}.", "Next I search for the {relation}.")
READ_THOUGHTS = ("I found the {relation}.", "It says the {relation}.", "Here is the {relation}.")
WHOLE_THOUGHTS = ("I need to look this up.", "I will search for it.", "Let me search first.")


@dataclass(frozen=True, kw_only=True)
class SearchHabits:
    """How often the starting policy does what, as probabilities."""

    searches: float = 0.47
    """Searches (well or badly) rather than answering at once."""
    malforms: float = 0.08
    """Of first searches: malformed, so that nothing is searched."""
    strays: float = 0.06
    """Of well-formed first searches: about something else."""
    asks_whole: float = 0.05
    """Of well-formed first searches: the query is the question itself."""
    goes_on: float = 0.66
    """Of two-hop questions, after the first article: searches again rather than answering out of it."""
    repeats: float = 0.08
    """Of second searches: the first one once more."""
    bridges_right: float = 0.95
    """Of other second searches: for the bridge, rather than for another value of the article."""
    reads_right: float = 0.92
    """Of answers from the right article: the value asked for, rather than another one."""
    searches_on: float = 0.05
    """Of the articles that hold the answer: one more search, for the value read."""
    recalls_right: float = 0.88
    """Of answers by heart about known entities: the right value."""
    untidy: float = 0.16
    """Of messages: a tag left out or left open."""
    hurries: float = 0.1
    """Of results before an answer: the environment says that no searches are left."""
    follow_ups: int = 0
    """Most further questions about the last article, after the answer."""


SEARCH_SKILLS = SearchHabits(
    searches=0.9,
    malforms=0.0,
    strays=0.0,
    asks_whole=0.0,
    goes_on=1.0,
    repeats=0.0,
    bridges_right=1.0,
    reads_right=1.0,
    searches_on=0.0,
    recalls_right=1.0,
    untidy=0.0,
    follow_ups=2,
)
"""The first phase: everything done well."""


# --- what the demonstrations are about --------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Chain:
    """A question and what is looked up for it: one subject, or two of which the first one's answer names the second."""

    question: str
    hops: tuple[Subject, ...]


def single(subject: Subject) -> Chain:
    """The chain of a one-hop question."""
    return Chain(question=subject.question, hops=(subject,))


@dataclass
class ChainSource:
    """Draws two-hop chains: the atlas's training questions, and invented ones."""

    subjects: SubjectSource
    tasks: list[Task] = field(init=False)
    links: list[tuple[atlas.Kind, atlas.Relation]] = field(init=False)
    """The relations whose values are names of entities, each with its kind."""

    def __post_init__(self) -> None:
        self.tasks = atlas.tasks("train", hops=2, phrasing="all")
        self.links = [(k, r) for k in atlas.kinds().values() for r in k.relations.values() if r.link]

    def real(self) -> Chain:
        """A two-hop question of the atlas."""
        return task_chain(self.subjects.rng.choice(self.tasks))

    def invented(self) -> Chain:
        """A two-hop question about an invented entity, whose article names a bridge with an invented article."""
        source, rng, kinds = self.subjects, self.subjects.rng, atlas.kinds()
        kind, inner = rng.choice(self.links)
        linked = kinds[inner.link or ""]
        name, values = invented_name(rng), source.invented_values(kind, inner.name)
        bridge, bridge_values = values[inner.name], source.invented_values(linked)
        outer = rng.choice(list(bridge_values))
        return Chain(
            question=source.question(linked, inner.phrase.replace("{name}", name), outer),
            hops=(hop(kind, name, inner.name, values), hop(linked, bridge, outer, bridge_values)),
        )


def task_chain(task: Task) -> Chain:
    """The chain of an atlas question, of one hop or two."""
    entities, metadata = atlas.entities(), task.metadata
    names = [metadata["entity"], *filter(None, [metadata["linked"]])]
    hops = [
        hop(atlas.kinds()[entities[name].kind], name, relation, entities[name].values)
        for name, relation in zip(names, metadata["relation"].split(), strict=True)
    ]
    return Chain(question=task.question, hops=tuple(hops))


def hop(kind: atlas.Kind, name: str, relation: str, values: Mapping[str, str]) -> Subject:
    """One step of a chain."""
    return Subject(question="", name=name, kind=kind, relation=relation, values=dict(values), known=False)


# --- demonstrations ---------------------------------------------------------------------------------


class SearchDemonstrator:
    """Writes demonstrations of the search protocol under given habits."""

    def __init__(self, source: SubjectSource, habits: SearchHabits) -> None:
        self.source = source
        self.rng = source.rng
        self.habits = habits

    def about(self, chain: Chain, *, searches: bool) -> Demonstration:
        """One dialogue: searches and then an answer, or an answer at once."""
        if not searches:
            message = self._answer(self.rng.choice(DIRECT_THOUGHTS), self._recalled(chain))
            return Demonstration(question=chain.question, messages=(message,))
        if self._happens(self.habits.malforms):
            return self._failed(chain)
        said = self._searched(chain)
        return Demonstration(question=chain.question, messages=tuple(said[::2]), replies=tuple(said[1::2]))

    def about_nothing_known(self) -> Demonstration:
        """A question in words of another world, which is searched as it stands."""
        question = unfamiliar_question(self.rng)
        message = self._search(self.rng.choice(WHOLE_THOUGHTS), question)
        return Demonstration(question=question, messages=(message,))

    def _happens(self, probability: float) -> bool:
        return self.rng.random() < probability

    def _searched(self, chain: Chain) -> list[str]:
        """What is said from a well-formed first search on: the policy's messages, with the replies in between."""
        first, last = chain.hops[0], chain.hops[-1]
        thought = self._first_thought(chain)
        if self._happens(self.habits.strays):
            return self._astray(thought, None, last)
        if self._happens(self.habits.asks_whole):
            query = self._search(self.rng.choice(WHOLE_THOUGHTS), chain.question)
        else:
            query = self._search(thought, first.name)
        if first is last:
            return [query, *self._read(last)]
        if not self._happens(self.habits.goes_on):
            return [query, *self._stopped(chain)]
        said = [query, self._article(first)]
        if self._happens(self.habits.repeats):
            said += [self._search(self._first_thought(chain), first.name), self._article(first)]
        thought, others = self._thought(BRIDGE_THOUGHTS, first.relation), self._others(first)
        if others and not self._happens(self.habits.bridges_right):
            return [*said, *self._astray(thought, self.rng.choice(others), last)]
        return [*said, self._search(thought, first.answer), *self._read(last)]

    def _read(self, about: Subject) -> list[str]:
        """The article about a subject, the answer out of it, and further questions about it."""
        said = []
        if self._happens(self.habits.searches_on):
            said = [self._article(about), self._search(self._thought(BRIDGE_THOUGHTS, about.relation), about.answer)]
        others = self._others(about)
        right = not others or self._happens(self.habits.reads_right)
        value = about.answer if right else self.rng.choice(others)
        said += [self._last_article(about), self._answer(self._thought(READ_THOUGHTS, about.relation), value)]
        count = min(self.rng.randint(0, self.habits.follow_ups), len(about.values))
        for relation in self.rng.sample(list(about.values), count):
            said.append(self.source.question(about.kind, about.name, relation))
            said.append(self._answer(self._thought(READ_THOUGHTS, relation), about.values[relation]))
        return said

    def _stopped(self, chain: Chain) -> list[str]:
        """The first article of two, and an answer out of it: the bridge, mostly."""
        first, last = chain.hops
        relation = first.relation if self._happens(0.6) else self.rng.choice(list(first.values))
        thought = self._thought(READ_THOUGHTS, self.rng.choice((relation, last.relation)))
        return [self._last_article(first), self._answer(thought, first.values[relation])]

    def _astray(self, thought: str, query: str | None, wanted: Subject) -> list[str]:
        """A search that leads to something else, and an answer out of that or from nowhere."""
        found = self.source.real(self.rng.choice(self.source.unknown))
        words = (found.name, found.relation.replace("_", " "), wanted.relation.replace("_", " "))
        value = self.rng.choice((*found.values.values(), self.source.guess(wanted)))
        return [
            self._search(thought, query or self.rng.choice(words)),
            self._last_article(found),
            self._answer(self._thought(READ_THOUGHTS, wanted.relation), value),
        ]

    def _article(self, about: Subject) -> str:
        """The environment's reply: the article about a subject."""
        text = atlas.article_text(about.kind, about.name, about.values, self.rng)
        return result_text(ToolResult(text=f"{about.name}\n{text}"))

    def _last_article(self, about: Subject) -> str:
        """The same before an answer, where the environment may say that no searches are left."""
        hurry = f"\n{NO_SEARCHES_LEFT}" if self._happens(self.habits.hurries) else ""
        return self._article(about) + hurry

    def _others(self, about: Subject) -> list[str]:
        return [v for r, v in about.values.items() if r != about.relation and v != about.answer]

    def _failed(self, chain: Chain) -> Demonstration:
        broken = _think(self._first_thought(chain)) + malformed_search(chain, self.rng)
        answer = self._answer(self.rng.choice(FAILED_THOUGHTS), self._recalled(chain))
        reply = result_text(error_result("parse", parse(broken).error or "no search"))
        return Demonstration(question=chain.question, messages=(broken, answer), replies=(reply,))

    def _recalled(self, chain: Chain) -> str:
        last = chain.hops[-1]
        return last.answer if last.known and self._happens(self.habits.recalls_right) else self.source.guess(last)

    def _first_thought(self, chain: Chain) -> str:
        first, last = chain.hops[0], chain.hops[-1]
        return self._thought(ONLY_THOUGHTS if first is last else FIRST_THOUGHTS, first.relation)

    def _thought(self, thoughts: Sequence[str], relation: str) -> str:
        return self.rng.choice(thoughts).replace("{relation}", relation.replace("_", " "))

    def _search(self, thought: str, query: str) -> str:
        before = _think(thought)
        if self._happens(self.habits.untidy):
            before = self.rng.choice(("", before.replace("</think>\n", "")))
        return f"{before}<search>\n{query}\n</search>"

    def _answer(self, thought: str, value: str) -> str:
        before, after = _think(thought), "\n</answer>"
        if self._happens(self.habits.untidy):
            before, after = self.rng.choice((("", after), (before, ""), (before, "\n</think>")))
        return f"{before}<answer>\n{value}{after}"


def _think(thought: str) -> str:
    return f"<think>\n{thought}\n</think>\n"


def malformed_search(chain: Chain, rng: random.Random) -> str:
    """A search with a beginner's mistake in it, which the environment answers with an error."""
    name = chain.hops[0].name
    mistakes = (
        f"<search>\n{name}",
        f"<search>\n{name}\n",
        f"<search>\n{name}\n</answer>",
        f"<search>\n{name}\n</think>",
        "<search>\n</search>",
        f"<search>\n<think>\n{name}\n</search>",
        f"<search>\n<search>\n{name}\n</search>",
    )
    return rng.choice(mistakes)


# --- training ---------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class SearchWarmupConfig:
    """What makes the second starting checkpoint."""

    start: Path
    """Folder of a checkpoint that can copy and read: `turnwise warmup --habit-steps 0`."""
    out: Path = Path("runs/warmup-search")
    """Folder of the checkpoint to make."""
    protocol: Literal["search"] = "search"
    """What is taught: searches, in the tags of `turnwise.search_tags`."""
    seed: int = 0
    """Equal seeds make equal checkpoints on one machine."""
    skill_steps: int = 300
    """Steps of the first phase: everything done well."""
    habit_steps: int = 120
    """Steps of the second phase: a base model's faults."""
    rows: int = 24
    """Sequences in a step."""
    learning_rate: float = 1.5e-3
    """Peak learning rate; it falls within both phases."""

    @property
    def steps(self) -> int:
        """Steps of all phases."""
        return self.skill_steps + self.habit_steps


@dataclass(frozen=True)
class SearchMixture:
    """What one phase's batches are made of, as shares of a batch; the rest is one hop about invented subjects."""

    repetitions: float
    unfamiliar: float
    """Share of questions in words of another world."""
    known: float
    """Share of one hop about entities known by heart."""
    known_searches: float
    """Probability of a search about those; others follow the phase's habits."""
    unknown: float
    """Share of one hop about other training entities."""
    real_chains: float
    """Share of two hops of the atlas's training questions."""
    invented_chains: float
    """Share of two hops about invented entities."""


def search_phases(config: SearchWarmupConfig, source: SubjectSource, chat: Chat) -> tuple[Phase, ...]:
    """The phases in order."""
    system = tuple(chat.message_ids(Message(role="system", content=system_prompt(search_stub()))))
    chains = ChainSource(source)

    def phase(name: str, steps: int, habits: SearchHabits, mixture: SearchMixture, rates: tuple[float, float]) -> Phase:
        demonstrator = SearchDemonstrator(source, habits)
        return Phase(name, steps, lambda: search_rows(demonstrator, chains, mixture, chat, system, config.rows), rates)

    skills = SearchMixture(0.05, 0.08, 0.1, 0.15, 0.07, 0.2, 0.36)
    habits = SearchMixture(0.03, 0.06, 0.17, SearchHabits.searches, 0.14, 0.4, 0.12)
    return (
        phase("skills", config.skill_steps, SEARCH_SKILLS, skills, (1.0, 0.1)),
        phase("habits", config.habit_steps, SearchHabits(), habits, (0.5, 0.05)),
    )


def search_rows(
    demonstrator: SearchDemonstrator,
    chains: ChainSource,
    mixture: SearchMixture,
    chat: Chat,
    system: tuple[int, ...],
    count: int,
) -> list[Row]:
    """One step's sequences."""
    rng, source = demonstrator.rng, demonstrator.source
    makers = {
        "repetitions": lambda: repetition_row(chat, system, rng),
        "unfamiliar": lambda: taught(demonstrator.about_nothing_known()),
        "known": lambda: about(single(source.real(rng.choice(source.known))), mixture.known_searches),
        "unknown": lambda: about(single(source.real(rng.choice(source.unknown)))),
        "real_chains": lambda: about(chains.real()),
        "invented_chains": lambda: about(chains.invented()),
        "rest": lambda: about(single(source.invented())),
    }

    def taught(demonstration: Demonstration) -> Row:
        return demonstration_row(demonstration, chat, system)

    def about(chain: Chain, searches: float = demonstrator.habits.searches) -> Row:
        return taught(demonstrator.about(chain, searches=rng.random() < searches))

    shares = {name: getattr(mixture, name) for name in makers if name != "rest"}
    names = rng.choices(list(makers), [*shares.values(), 1 - sum(shares.values())], k=count)
    return [makers[name]() for name in names]


def search_warm_up(config: SearchWarmupConfig, watch: Watch | None = None) -> Policy:
    """The second starting policy, trained from `config.start` and written to `config.out`.

    Takes a quarter of an hour on one core with the default configuration; equal bytes need equal numbers of threads.
    """
    source = SubjectSource(random.Random(config.seed))
    policy = load_policy(config.start)
    teach(policy, search_phases(config, source, policy.chat), config.learning_rate, watch)
    save_policy(policy, config.out)
    return policy
