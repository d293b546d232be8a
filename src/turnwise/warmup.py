"""The starting checkpoint: a tiny policy taught from demonstrations to behave like a base model.

Three phases on the atlas's training entities and on invented ones. *Copy*: mostly repeated random tokens. *Skills*:
writing a call for the entity asked about, or for an unfamiliar question as it stands; reading the asked value out of
an article; answering about a known share of the training entities by heart. *Habits*: the same dialogues with a base
model's faults mixed in at fixed rates, so that reinforcement has something to select among. Held-out entities appear
in no phase, nor in the tokenizer's text.
"""

import dataclasses
import functools
import json
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from turnwise import atlas
from turnwise.batch import Row, micro_batches
from turnwise.chat import SPECIALS, BPETokenizer, Chat
from turnwise.policy import Policy, save_policy, tiny_policy, token_logprobs
from turnwise.search import open_index, search_tool
from turnwise.setting import training_rank
from turnwise.tags import parse, result_text, system_prompt
from turnwise.tools import Tool, call_tool, error_result
from turnwise.types import Message

VOCAB_SIZE = 2048
REPEATED_PIECES = 160
"""How many vocabulary entries the easier repetitions draw from."""
REPEATED_LENGTH = 64

CALL_THOUGHTS = ("I need to look this up.", "I will search for it.", "Let me search first.")
DIRECT_THOUGHTS = ("I know this.", "I remember it.", "This is known to me.")
READ_THOUGHTS = ("The result says it.", "I found it.", "It is in the result.")
OPENINGS = ("What", "Which", "Who", "In which", "Where", "When", "How many", "The", "Name the", "Of what")
SMALL_WORDS = ("the", "of", "in", "was", "is", "a", "and", "for", "by", "to", "which", "first", "name", "on", "did")
QUOTATIONS = (('"', '"'), ("'", "'"), ("‘", "’"), ("“", "”"), ("(", ")"))
FAILED_THOUGHTS = ("The search failed.", "No result, so I guess.")


@dataclass(frozen=True, kw_only=True)
class Habits:
    """How often the starting policy does what, as probabilities."""

    calls: float = 0.42
    """Calls the tool (well or badly) rather than answering at once."""
    malforms: float = 0.4
    """Of calls: malformed, so that the tool is not executed."""
    strays: float = 0.15
    """Of well-formed calls: the query is about something else."""
    asks_whole: float = 0.15
    """Of well-formed calls: the query is the question itself."""
    reads_right: float = 0.4
    """Of answers from the right article: the value asked for, rather than another one."""
    recalls_right: float = 0.88
    """Of answers by heart about known entities: the right value."""
    untidy: float = 0.12
    """Of messages: a tag left out or left open."""
    follow_ups: int = 0
    """Most further questions about the article in view, after the answer: more reading from one article."""


SKILLS = Habits(
    calls=0.85,
    malforms=0.0,
    strays=0.0,
    asks_whole=0.12,
    reads_right=1.0,
    recalls_right=1.0,
    untidy=0.0,
    follow_ups=3,
)
"""The first phase: everything done well."""


def train_tokenizer(texts: Iterable[str], *, vocab_size: int = VOCAB_SIZE) -> BPETokenizer:
    """A byte-level BPE tokenizer: any text can be encoded, and decodes to itself.

    Capitalised words never take the space before them, so that a name has the same tokens after a space,
    after a quote and at the start of a line, and can be copied. Protocol tags and JSON scaffolding are one
    piece each; digits go in pairs.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    pieces = Regex(
        r"</?[a-z]+>\n?"  # a tag, with its line's end
        r'|\{"name": "|"args": \{|"query": "'  # scaffolding of a call
        r"| ?\p{Ll}+|\p{Lu}\p{Ll}*|\p{L}+|\p{N}{1,2}|[^\s\p{L}\p{N}]+\n?|\n|\s+?"
    )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pieces, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return BPETokenizer(tokenizer)


# --- what the demonstrations are about --------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Subject:
    """One question about one entity, with everything a demonstration may need to say."""

    question: str
    name: str
    kind: atlas.Kind
    relation: str
    values: dict[str, str]
    known: bool
    """Whether the policy is taught the answer by heart."""

    @property
    def answer(self) -> str:
        return self.values[self.relation]


KNOWN_SHARE = 0.05
"""The share of training entities whose facts are learned by heart: a fifth of those that training asks about."""


def is_known(entity: atlas.Entity) -> bool:
    """Whether the starting policy is taught the entity's facts."""
    return entity.split == "train" and training_rank(entity.name) < KNOWN_SHARE


@dataclass
class SubjectSource:
    """Draws subjects: known and unknown training entities, and invented ones."""

    rng: random.Random
    known: list[atlas.Entity] = field(default_factory=list)
    unknown: list[atlas.Entity] = field(default_factory=list)
    pools: dict[tuple[str, str], list[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for entity in atlas.entities().values():
            if entity.split == "train" and entity.values:
                (self.known if is_known(entity) else self.unknown).append(entity)
                for relation, value in entity.values.items():
                    self.pools.setdefault((entity.kind, relation), []).append(value)

    def real(self, entity: atlas.Entity) -> Subject:
        kind = atlas.kinds()[entity.kind]
        return self._ask(kind, entity.name, dict(entity.values), is_known(entity))

    def invented(self) -> Subject:
        kind = self.rng.choice([k for k in atlas.kinds().values() if self._pooled(k)])
        values = self.invented_values(kind)
        return self._ask(kind, invented_name(self.rng), values, False)

    def invented_values(self, kind: atlas.Kind, needed: str | None = None) -> dict[str, str]:
        """Values of some relations of a kind, as an entity might have; always one of the relation `needed`."""
        relations = self._pooled(kind)
        self.rng.shuffle(relations)
        kept = relations[: self.rng.randint(min(3, len(relations)), len(relations))]
        if needed and needed not in kept:
            kept.append(needed)
        return {r: self.value(kind.name, r) for r in kept}

    def value(self, kind: str, relation: str) -> str:
        """A plausible value: some entity's, or an invented one of its form."""
        example = self.rng.choice(self.pools[kind, relation])
        if self.rng.random() < 0.4:
            return example
        if example.isdigit():
            return str(self.rng.randint(10 ** (len(example) - 1), 10 ** len(example) - 1))
        return invented_name(self.rng, words=len(example.split()))

    def guess(self, subject: Subject) -> str:
        """What somebody who does not know would answer: some other entity's value."""
        return self.rng.choice(self.pools[subject.kind.name, subject.relation])

    def question(self, kind: atlas.Kind, name: str, relation: str) -> str:
        """A question for the relation of something, in one of its wordings."""
        question = self.rng.choice(kind.relations[relation].questions).replace("{name}", name)
        return question[:1].upper() + question[1:]

    def _pooled(self, kind: atlas.Kind) -> list[str]:
        return [r for r in kind.relations if (kind.name, r) in self.pools]

    def _ask(self, kind: atlas.Kind, name: str, values: dict[str, str], known: bool) -> Subject:
        relation = self.rng.choice(list(values))
        return Subject(
            question=self.question(kind, name, relation),
            name=name,
            kind=kind,
            relation=relation,
            values=values,
            known=known,
        )


def invented_name(rng: random.Random, *, words: int | None = None) -> str:
    """A name nobody has, of 1 to 4 words, now and then with an initial or a small word among them."""
    count = words or rng.choice((1, 1, 2, 2, 2, 3, 3, 4))
    parts = [_invented_word(rng) for _ in range(count)]
    for i in range(count):
        if count > 1 and rng.random() < 0.08:
            parts[i] = parts[i][0]
        elif 0 < i < count - 1 and rng.random() < 0.3:
            parts[i] = rng.choice(("of", "the", "and", "in", "de", "for"))
    return " ".join(parts)


def unfamiliar_question(rng: random.Random) -> str:
    """A question in words that nobody knows, as a question about another world looks to a small policy.

    Of 4 to 26 words, with the marks that people's questions have: quotations, brackets, dashes, an end without a mark.
    """
    words = [rng.choice(OPENINGS)]
    while len(words) < 4 or (len(words) < 26 and rng.random() < 0.87):
        draw = rng.random()
        if draw < 0.38:
            words.append(_invented_word(rng, syllables=rng.choice((1, 1, 2, 2, 3))).lower())
        elif draw < 0.72:
            words.append(rng.choice(SMALL_WORDS))
        elif draw < 0.92:
            words.append(invented_name(rng, words=rng.choice((1, 1, 2, 2, 3))))
        else:
            words.append(str(rng.randint(1, 2020)))
        if rng.random() < 0.1:
            words[-1] += rng.choice((",", "'s", "’s", ";", ".", "-" + _invented_word(rng, syllables=1).lower()))
        elif rng.random() < 0.06:
            before, after = rng.choice(QUOTATIONS)
            words[-1] = before + words[-1] + after
    return " ".join(words) + rng.choice(("?", "?", "?", "?", "?", "?", "", " ?", "."))


def _invented_word(rng: random.Random, *, syllables: int | None = None) -> str:
    onsets = (
        "",
        "b",
        "br",
        "c",
        "ch",
        "d",
        "f",
        "g",
        "gr",
        "h",
        "j",
        "k",
        "l",
        "m",
        "n",
        "p",
        "qu",
        "r",
        "s",
    )
    onsets += ("sh", "st", "t", "th", "tr", "v", "w", "x", "y", "z")
    nuclei = ("a", "e", "i", "o", "u", "ai", "ea", "ia", "io", "ou", "y")
    codas = ("", "", "", "l", "m", "n", "nd", "r", "rk", "s", "st", "t", "x", "ck")
    count = syllables or rng.choice((1, 2, 2, 3, 3))
    parts = [rng.choice(onsets) + rng.choice(nuclei) + rng.choice(codas) for _ in range(count)]
    return "".join(parts).capitalize()


# --- demonstrations ---------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Demonstration:
    """A question and the dialogue about it: the policy's messages, with the replies between them."""

    question: str
    messages: tuple[str, ...]
    replies: tuple[str, ...] = ()
    """One fewer than the messages."""


class Demonstrator:
    """Writes demonstrations about subjects under given habits."""

    def __init__(self, source: SubjectSource, habits: Habits) -> None:
        self.source = source
        self.rng = source.rng
        self.habits = habits

    def about(self, subject: Subject, *, calls: bool) -> Demonstration:
        """One dialogue: a call and then an answer, or an answer at once."""
        if not calls:
            message = self._answer(self.rng.choice(DIRECT_THOUGHTS), self._recalled(subject))
            return Demonstration(question=subject.question, messages=(message,))
        if self._happens(self.habits.malforms):
            return self._failed(subject)
        return self._called(subject)

    def about_nothing_known(self) -> Demonstration:
        """A question in words of another world, which is asked as it stands."""
        question = unfamiliar_question(self.rng)
        call = {"name": "search", "args": {"query": question}}
        return Demonstration(question=question, messages=(self._call(json.dumps(call, ensure_ascii=False)),))

    def _happens(self, probability: float) -> bool:
        return self.rng.random() < probability

    def _called(self, subject: Subject) -> Demonstration:
        query, about = subject.name, subject
        if self._happens(self.habits.strays):
            about = self.source.real(self.rng.choice(self.source.unknown))
            query = self.rng.choice((about.name, subject.relation.replace("_", " ")))
        elif self._happens(self.habits.asks_whole):
            query = subject.question
        call = {"name": "search", "args": {"query": query}}
        text = atlas.article_text(about.kind, about.name, about.values, self.rng)
        value = self._read(subject, about)
        message = self._call(json.dumps(call, ensure_ascii=False))
        later = self._follow_ups(about)
        return Demonstration(
            question=subject.question,
            messages=(message, self._answer(self.rng.choice(READ_THOUGHTS), value), *later.values()),
            replies=(reply_to(message, search_stub(f"{about.name}\n{text}")), *later),
        )

    def _follow_ups(self, about: Subject) -> dict[str, str]:
        """Further questions about the article in view, with the messages that answer them."""
        count = min(self.rng.randint(0, self.habits.follow_ups), len(about.values))
        return {
            self.source.question(about.kind, about.name, relation): self._answer(
                self.rng.choice(READ_THOUGHTS), about.values[relation]
            )
            for relation in self.rng.sample(list(about.values), count)
        }

    def _read(self, subject: Subject, about: Subject) -> str:
        others = [v for r, v in about.values.items() if about is not subject or r != subject.relation]
        if about is subject and (not others or self._happens(self.habits.reads_right)):
            return subject.answer
        return self.rng.choice(others)

    def _failed(self, subject: Subject) -> Demonstration:
        broken = self._call(malformed_call(subject, self.rng))
        answer = self._answer(self.rng.choice(FAILED_THOUGHTS), self._recalled(subject))
        return Demonstration(
            question=subject.question,
            messages=(broken, answer),
            replies=(reply_to(broken, search_stub()),),
        )

    def _recalled(self, subject: Subject) -> str:
        if subject.known and self._happens(self.habits.recalls_right):
            return subject.answer
        return self.source.guess(subject)

    def _call(self, call: str) -> str:
        thought = f"<reasoning>\n{self.rng.choice(CALL_THOUGHTS)}\n</reasoning>\n"
        if self._happens(self.habits.untidy):
            thought = self.rng.choice(("", thought.replace("</reasoning>\n", "")))
        return f"{thought}<tool>\n{call}\n</tool>"

    def _answer(self, thought: str, value: str) -> str:
        before, after = f"<reasoning>\n{thought}\n</reasoning>\n", "\n</answer>"
        if self._happens(self.habits.untidy):
            before, after = self.rng.choice((("", after), (before, ""), (before, "\n</reasoning>")))
        return f"{before}<answer>\n{value}{after}"


def malformed_call(subject: Subject, rng: random.Random) -> str:
    """The JSON of a tool call with a beginner's mistake in it."""
    good = json.dumps({"name": "search", "args": {"query": subject.name}}, ensure_ascii=False)
    name = rng.choice(("lookup", "wiki", "find", subject.kind.name))
    mistakes = (
        good[:-1],
        good[:-2],
        good.replace("search", name),
        good.replace('"query"', '"q"'),
        good.replace('"args": ', '"args", '),
        good.replace('{"query": ', "").replace("}}", "}"),
        f"search({subject.name})",
    )
    return rng.choice(mistakes)


def reply_to(message: str, tools: Mapping[str, Tool]) -> str:
    """The environment's reply to a message that calls a tool."""
    action = parse(message)
    if action.error or action.tool_call is None:
        return result_text(error_result("parse", action.error or "no tool call"))
    running = call_tool(tools, action.tool_call)
    try:
        running.send(None)
    except StopIteration as done:
        return result_text(done.value)
    raise AssertionError("a demonstration's tool must not wait")


@functools.cache
def _search() -> Tool:
    return search_tool(open_index("atlas"))


def search_stub(article: str = "No results.") -> dict[str, Tool]:
    """The search tool as the policy is told of it; it finds `article` whatever is asked."""
    return {"search": dataclasses.replace(_search(), function=lambda query: article)}


# --- from demonstrations to rows --------------------------------------------------------------------


def demonstration_row(demonstration: Demonstration, chat: Chat, system: tuple[int, ...]) -> Row:
    """A demonstration in the policy's tokens; the loss is on the policy's messages alone.

    The prompt is the system message, which all demonstrations share.
    """
    question = Message(role="user", content=demonstration.question)
    opening = chat.prompt_ids([question])
    ids, action = list(opening), [False] * len(opening)
    for k, message in enumerate(demonstration.messages):
        said = [*chat.encode_text(message), chat.end_id]
        ids += said
        action += [True] * len(said)
        if k < len(demonstration.replies):
            reply = chat.reply_ids([Message(role="user", content=demonstration.replies[k])])
            ids += reply
            action += [False] * len(reply)
    return _taught(system, ids, action)


def repetition_row(chat: Chat, system: tuple[int, ...], rng: random.Random) -> Row:
    """A span, again and again; the loss is on all but the first time. What teaches a small model to copy.

    The span is random tokens, of the whole vocabulary or of a small part of it, where copying is learned first, or
    a list of invented names.
    """
    vocabulary = rng.choice((REPEATED_PIECES, chat.tokenizer.vocab_size, 0))
    if vocabulary:
        span = [rng.randrange(len(SPECIALS), vocabulary) for _ in range(rng.randint(4, 20))]
    else:
        names = [invented_name(rng) for _ in range(rng.randint(1, 4))]
        span = chat.encode_text(", ".join(names) + "\n")
    ids = (span * (1 + REPEATED_LENGTH // len(span)))[: max(REPEATED_LENGTH, 2 * len(span))]
    return _taught(system, ids, [i > len(span) for i in range(len(ids))])


def _taught(system: tuple[int, ...], ids: list[int], action: list[bool]) -> Row:
    mask = np.array(action, dtype=bool)
    return Row(
        prompt_ids=system,
        ids=tuple(ids),
        action=mask,
        loss=mask,
        sampling_logprobs=np.zeros(len(ids), dtype=np.float32),
        advantages=mask.astype(np.float32),
    )


# --- training ---------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class WarmupConfig:
    """What makes the embedded checkpoint."""

    out: Path = Path("runs/warmup")
    """Folder of the checkpoint to make."""
    protocol: Literal["tools"] = "tools"
    """What is taught: JSON calls, in the tags of `turnwise.tags`. With "search", see its own options."""
    seed: int = 0
    """Equal seeds make equal checkpoints on one machine."""
    copy_steps: int = 400
    """Steps of the first phase: mostly copying."""
    skill_steps: int = 2600
    """Steps of the second phase: everything done well."""
    habit_steps: int = 300
    """Steps of the third phase: a base model's faults."""
    rows: int = 32
    """Sequences in a step."""
    learning_rate: float = 3e-3
    """Peak learning rate; it falls within the second and the third phase."""
    hidden: int = 128
    """Width of the model."""
    layers: int = 3
    """Depth of the model."""

    @property
    def steps(self) -> int:
        """Steps of all phases."""
        return self.copy_steps + self.skill_steps + self.habit_steps


@dataclass(frozen=True)
class Mixture:
    """What one phase's batches are made of, as shares of a batch; the rest is about invented subjects."""

    repetitions: float
    known: float
    unknown: float
    known_calls: float
    """Probability of a call about a known entity; others follow the phase's habits."""
    unfamiliar: float
    """Share of questions in words of another world."""


@dataclass(frozen=True)
class Phase:
    """A stretch of a warm-up."""

    name: str
    steps: int
    rows: Callable[[], list[Row]]
    """Makes one step's sequences."""
    rates: tuple[float, float]
    """Learning rate at its beginning and its end, as shares of the peak; a straight line in between."""


def phases(config: WarmupConfig, source: SubjectSource, chat: Chat) -> tuple[Phase, ...]:
    """The phases in order."""
    system = tuple(chat.message_ids(Message(role="system", content=system_prompt(search_stub()))))

    def phase(name: str, steps: int, habits: Habits, mixture: Mixture, rates: tuple[float, float]) -> Phase:
        demonstrator = Demonstrator(source, habits)
        return Phase(name, steps, lambda: warmup_rows(demonstrator, mixture, chat, system, config.rows), rates)

    return (
        phase("copy", config.copy_steps, SKILLS, Mixture(0.7, 0.12, 0.03, 0.15, 0.0), (1.0, 1.0)),
        phase("skills", config.skill_steps, SKILLS, Mixture(0.11, 0.15, 0.2, 0.15, 0.24), (1.0, 0.05)),
        phase("habits", config.habit_steps, Habits(), Mixture(0.04, 0.24, 0.36, Habits.calls, 0.09), (0.3, 0.02)),
    )


def warmup_rows(
    demonstrator: Demonstrator, mixture: Mixture, chat: Chat, system: tuple[int, ...], count: int
) -> list[Row]:
    """One step's sequences."""
    rng, source = demonstrator.rng, demonstrator.source
    rows = []
    for _ in range(count):
        draw = rng.random() - mixture.repetitions
        if draw < 0:
            rows.append(repetition_row(chat, system, rng))
            continue
        if draw < mixture.unfamiliar:
            rows.append(demonstration_row(demonstrator.about_nothing_known(), chat, system))
            continue
        draw -= mixture.unfamiliar
        calls = demonstrator.habits.calls
        if draw < mixture.known:
            subject, calls = source.real(rng.choice(source.known)), mixture.known_calls
        elif draw < mixture.known + mixture.unknown:
            subject = source.real(rng.choice(source.unknown))
        else:
            subject = source.invented()
        demonstration = demonstrator.about(subject, calls=rng.random() < calls)
        rows.append(demonstration_row(demonstration, chat, system))
    return rows


def tokenizer_texts(source: SubjectSource, count: int = 12_000) -> Iterator[str]:
    """What the tokenizer is trained on: demonstrations about training and invented entities."""
    demonstrator = Demonstrator(source, Habits())
    prompt = system_prompt(search_stub())
    for i in range(count):
        real = source.rng.random() < 0.5
        entity = source.rng.choice(source.known + source.unknown)
        subject = source.real(entity) if real else source.invented()
        demonstration = demonstrator.about(subject, calls=i % 2 == 0)
        yield f"user\n{demonstration.question}"
        yield from (f"assistant\n{message}" for message in demonstration.messages)
        yield from (f"user\n{reply}" for reply in demonstration.replies)
        if i % 20 == 0:
            yield f"system\n{prompt}"


Watch = Callable[[Policy, str, int, float], None]
"""Called after every step with the policy, the phase's name, the step and the loss in nats per token."""


def warm_up(config: WarmupConfig, watch: Watch | None = None) -> Policy:
    """The starting policy, trained from nothing and written to `config.out`.

    Takes about half an hour on one quiet core by default; equal bytes need equal numbers of threads.
    """
    source = SubjectSource(random.Random(config.seed))
    chat = Chat(train_tokenizer(tokenizer_texts(source)))
    policy = tiny_policy(chat, seed=config.seed, hidden=config.hidden, layers=config.layers)
    teach(policy, phases(config, source, chat), config.learning_rate, watch)
    save_policy(policy, config.out)
    return policy


def teach(policy: Policy, phases: Iterable[Phase], learning_rate: float, watch: Watch | None = None) -> None:
    """Trains the policy through the phases in order; the rate rises to its peak within the first 100 steps."""
    optimizer = torch.optim.AdamW(policy.model.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
    step = 0
    for phase in phases:
        for number in range(phase.steps):
            share = np.interp(number, (0, phase.steps), phase.rates) * min(1.0, (step + 1) / 100)
            loss = teach_rows(policy, optimizer, phase.rows(), learning_rate * float(share))
            step += 1
            if watch:
                watch(policy, phase.name, step, loss)


def teach_rows(policy: Policy, optimizer: torch.optim.Optimizer, rows: Sequence[Row], rate: float) -> float:
    """One step of maximum likelihood on the rows' taught tokens; the loss, nats per token."""
    tokens = sum(int(row.loss.sum()) for row in rows)
    total = 0.0
    for batch in micro_batches(rows, max_tokens=2048, pad_id=policy.chat.pad_id):
        batch = batch.to(policy.model.device)
        logprobs, _ = token_logprobs(policy.model, batch, batch.loss)
        loss = -logprobs.sum() / tokens
        loss.backward()
        total += float(loss.detach())
    torch.nn.utils.clip_grad_norm_(policy.model.parameters(), 1.0)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return total
