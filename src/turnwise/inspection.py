"""A look before training: the tasks as the policy will see them, and what about them does not fit.

It takes a configuration of training and trains nothing: prompts are rendered, counted and held against the policy's
context, answers against a turn's tokens, questions against each other and against what the search tool finds.
"""

import asyncio
import dataclasses
import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from turnwise.chat import SPECIALS, Chat
from turnwise.config import ATLAS, ATLAS_HOPS, TrainConfig, without_judge
from turnwise.envs import Source
from turnwise.evaluation import opening, rollout_limits, spread
from turnwise.policy import load_policy
from turnwise.protocols import protocol_named
from turnwise.report.text import one_line, visible
from turnwise.rewards import load_rewards
from turnwise.rollout import awaited
from turnwise.search import load_corpus
from turnwise.setting import (
    Setting,
    environment_source,
    environment_tasks,
    held_out,
    make_tools,
    named_tasks,
    played_protocol,
)
from turnwise.tasks import TaskSource, answered_in, read_tasks
from turnwise.toolbox.sources import source_names
from turnwise.tools import call_tool
from turnwise.types import Task, ToolCall, ToolResult

Found = dict[str, Any]
SHOWN = 5
"""Tasks that are shown whole."""
SEARCHED = 2000
"""Most questions that are searched for."""
NAMED = 5
"""Most faults, duplicates and kinds that are named."""


def inspect_tasks(config: TrainConfig) -> Found:
    """What training on a configuration would meet, in JSON's types; docs/data.md says what each number is.

    `problems` are what would keep training from starting, `notes` what makes it teach less than it could. Raises
    InputError, ConfigError or RunError where policy, corpus, tools or rewards cannot be read at all.
    """
    config = without_judge(config)
    config = dataclasses.replace(config, protocol=played_protocol(config))
    elsewhere = environment_source(config)
    sources = _sources(config, elsewhere)
    train, validation = (source.tasks for source in sources.values())
    policy = load_policy(config.start)
    limits = rollout_limits(config, policy)
    setting = Setting(
        config=config,
        train=train,
        validation=validation,
        tools={} if elsewhere else make_tools(config, ()),
        rewards=load_rewards(config.rewards) if config.rewards else {},
        source=elsewhere,
    )
    tasks = [*train, *validation]
    begun = spread(tasks, SHOWN) if elsewhere else tasks  # starting an environment may take long
    prompts = [_prompt(task, setting, policy.chat) for task in begun]
    replies = (limits.max_turns - 1) * policy.chat.empty_reply_length
    found: Found = {
        "sources": {name: _source_facts(source) for name, source in sources.items()},
        "faults": [fault for source in sources.values() for fault in source.faults],
        "duplicates": None if elsewhere else _duplicates(train, validation),
        "tokens": {
            "context": limits.context,
            "max_turns": limits.max_turns,
            "max_turn_tokens": limits.max_turn_tokens,
            "prompts": _spread_of([len(ids) for ids in prompts]),
            "left_for_results": _spread_of([_room(len(ids), limits, replies) for ids in prompts]),
            "too_long": [t.id for t, ids in zip(begun, prompts, strict=True) if _room(len(ids), limits, replies) < 0],
        },
        "answers": _answer_facts(tasks, policy.chat, config),
        "search": _search_facts(tasks, setting, policy.chat) if _searches(config) else None,
        "tools": list(setting.tools),
        "examples": [_example(task, setting, policy.chat) for task in spread(train, SHOWN)],
    }
    return {**found, "problems": _problems(found), "notes": _notes(found)}


def _searches(config: TrainConfig) -> bool:
    """Whether the search tool over the configured corpus is among the tools."""
    return config.environment is None and "search" in source_names(config.tools)


def _sources(config: TrainConfig, elsewhere: Source | None) -> dict[str, TaskSource]:
    """Questions to train and to validate on, as training takes them, with the faults of those that it would refuse."""

    def read(name: str, split: Any) -> TaskSource:
        if elsewhere:
            found = environment_tasks(elsewhere, name, split, config.column_names)
            return TaskSource(tasks=list(found), format=elsewhere.name, skipped=0, faults=[])
        if name in ATLAS_HOPS:
            return TaskSource(tasks=list(named_tasks(name, split)), format=ATLAS, skipped=0, faults=[])
        return read_tasks(name, columns=config.column_names, split=split, tolerant=True)

    train = read(config.tasks, "train")
    if config.validation_tasks or config.tasks in ATLAS_HOPS:
        return {"train": train, "validation": read(config.validation_tasks or config.tasks, "validation")}
    kept, held = held_out(train.tasks)
    return {
        "train": dataclasses.replace(train, tasks=kept),
        "validation": TaskSource(tasks=held, format=train.format, skipped=0, faults=[]),
    }


# -------------------------------------------------------------------------------- each part


def _source_facts(source: TaskSource) -> Found:
    kinds = Counter(task.kind for task in source.tasks)
    return {
        "tasks": len(source.tasks),
        "format": source.format,
        "marked_unanswerable": source.skipped,
        "kinds": dict(kinds.most_common()) if any(kinds) else {},
    }


def _spread_of(values: Sequence[int]) -> dict[str, float]:
    """Least, middle, 95th percentile and most; empty of nothing."""
    if not values:
        return {}
    middle, high = np.percentile(values, [50, 95])
    return {"min": min(values), "median": float(middle), "p95": float(high), "max": max(values)}


def _room(prompt: int, limits: Any, replies: int) -> int:
    """Tokens that a context has left for the texts of results, once every turn has its own."""
    return limits.context - prompt - limits.max_turns * limits.max_turn_tokens - replies


def _duplicates(train: Sequence[Task], validation: Sequence[Task]) -> Found:
    """Questions that come twice, by their words, and those that training and validation share."""
    asked, held = (Counter(_wording(task) for task in tasks) for tasks in (train, validation))
    shared = [question for question in asked if question in held]
    repeated = [question for question, count in asked.items() if count > 1]
    return {
        "train": sum(asked[question] - 1 for question in repeated),
        "validation": sum(count - 1 for count in held.values()),
        "shared": sum(held[question] for question in shared),
        "examples": [*shared[:NAMED], *repeated[:NAMED]][:NAMED],
    }


def _wording(task: Task) -> str:
    return " ".join(task.question.lower().split())


def _answer_facts(tasks: Sequence[Task], chat: Chat, config: TrainConfig) -> Found:
    """Tokens of each task's shortest accepted answer, alone and in its tags, against those of a turn."""
    shortest = [min(len(chat.encode_text(answer)) for answer in t.answers) for t in tasks if t.answers]
    tag = protocol_named(config.tag_protocol).answering if config.tag_protocol else None
    tags = len(chat.encode_text(f"<{tag}>\n\n</{tag}>")) if tag else 0
    return {
        "without": sum(not task.answers for task in tasks),
        "accepted": _spread_of([len(task.answers) for task in tasks]),
        "tokens": _spread_of(shortest),
        "tag_tokens": tags,
        "too_long": sum(length + tags > config.max_turn_tokens for length in shortest),
    }


def _search_facts(tasks: Sequence[Task], setting: Setting, chat: Chat) -> Found:
    """What the search tool finds when it is asked the bare questions, and what stands anywhere in the corpus."""
    asked = spread([task for task in tasks if task.answers], SEARCHED)
    results = asyncio.run(_searched(asked, setting))
    hits = sum(bool(answered_in([task], [result.text])) for task, result in zip(asked, results, strict=True))
    texts = (article.text for article in load_corpus(setting.config.corpus))
    counted = [task for task in tasks if task.answers]
    return {
        "corpus": setting.config.corpus,
        "articles_per_search": setting.config.search_results,
        "asked": len(asked),
        "answer_in_results": hits / len(asked) if asked else 0.0,
        "answer_in_corpus": len(answered_in(counted, texts)) / len(counted) if counted else 0.0,
        "result_tokens": _spread_of([len(chat.encode_text(result.text)) for result in spread_results(results)]),
    }


def spread_results(results: Sequence[ToolResult], count: int = 200) -> list[ToolResult]:
    """At most `count` of the results, evenly spaced."""
    return [results[i * len(results) // count] for i in range(count)] if len(results) > count else list(results)


async def _searched(tasks: Sequence[Task], setting: Setting) -> list[ToolResult]:
    return [
        await call_tool(setting.tools, ToolCall(name="search", arguments={"query": task.question})) for task in tasks
    ]


def _example(task: Task, setting: Setting, chat: Chat) -> Found:
    ids = _prompt(task, setting, chat)
    return {
        "id": task.id,
        "answers": list(task.answers),
        "kind": task.kind,
        "tokens": len(ids),
        "prompt": rendered(chat, ids),
    }


def _prompt(task: Task, setting: Setting, chat: Chat) -> list[int]:
    return chat.prompt_ids(awaited(opening(setting, task)))


def rendered(chat: Chat, ids: Sequence[int]) -> str:
    """The text of token ids, special tokens written out."""
    backend = getattr(chat.tokenizer, "backend", None)
    if backend is not None:
        return backend.decode(list(ids), skip_special_tokens=False)
    names = {chat.tokenizer.special_id(name): name for name in SPECIALS}
    parts = itertools.groupby(ids, key=lambda i: names.get(i, ""))
    return "".join(name * len([*run]) if name else chat.decode([*run]) for name, run in parts)


# --------------------------------------------------------------------------------- verdicts


def _problems(found: Found) -> list[str]:
    """What keeps training from starting."""
    said = []
    sources, faults, long = found["sources"], found["faults"], found["tokens"]["too_long"]
    if faults:
        said.append(f"{len(faults)} records are no tasks; the first: {faults[0]}")
    said += [f"there is no question in {name}" for name, source in sources.items() if not source["tasks"]]
    if long:
        said.append(
            f"{len(long)} prompts leave no room for {found['tokens']['max_turns']} turns of "
            f"{found['tokens']['max_turn_tokens']} tokens in a context of {found['tokens']['context']}; the first is "
            f"of task {long[0]!r}"
        )
    if found["search"] and found["search"]["asked"] and not found["search"]["answer_in_corpus"]:
        said.append(f"the corpus {found['search']['corpus']!r} holds no answer of any task")
    return said


def _notes(found: Found) -> list[str]:
    """What makes training teach less than it could."""
    double, answers, search = found["duplicates"], found["answers"], found["search"]
    said = []
    if double and double["shared"]:
        said.append(f"{double['shared']} validation questions are asked in training too, in the same words")
    if double and (double["train"] or double["validation"]):
        said.append(f"{double['train'] + double['validation']} questions come again in their own part")
    if answers["too_long"]:
        tags = " in its tags" if answers["tag_tokens"] else ""
        said.append(f"{answers['too_long']} tasks have no answer that fits a turn{tags}; raise --max-turn-tokens")
    if search and 0 < search["answer_in_corpus"] < 1:
        said.append(f"{1 - search['answer_in_corpus']:.1%} of the tasks have no answer in the corpus")
    room = found["tokens"]["left_for_results"]
    if search and search["result_tokens"] and room:
        longest = (found["tokens"]["max_turns"] - 1) * search["result_tokens"]["max"]
        if longest > room["min"] >= 0:
            said.append(
                f"search results of up to {longest} tokens a rollout are cut: the longest prompt leaves {room['min']}"
            )
    return said


# ------------------------------------------------------------------------------- in a terminal


def inspection_lines(found: Found) -> list[str]:
    """The findings as lines of text."""
    lines = [*_example_lines(found["examples"]), ""]
    for name, source in found["sources"].items():
        kinds = [f"{one_line(kind) or 'no kind'} {count:,}" for kind, count in [*source["kinds"].items()][:NAMED]]
        more = [f"{len(source['kinds']) - NAMED} more kinds"] if len(source["kinds"]) > NAMED else []
        marked = source["marked_unanswerable"]
        left = [f"{marked:,} marked as unanswerable left out"] if marked else []
        facts = [f"{source['tasks']:,} tasks ({one_line(source['format'])})", *left, *kinds, *more]
        lines.append(_row(name, ", ".join(facts)))
    tokens, answers, search, double = (found[name] for name in ("tokens", "answers", "search", "duplicates"))
    lines += [
        _row("prompts", f"{_span(tokens['prompts'])} tokens, of a context of {tokens['context']:,}"),
        _row(
            "left for results",
            f"{_span(tokens['left_for_results'])} tokens beside {tokens['max_turns']} turns of "
            f"{tokens['max_turn_tokens']}",
        ),
    ]
    if answers["tokens"]:
        lines += [
            _row(
                "answers", f"{_span(answers['tokens'])} tokens the shortest accepted, {answers['tag_tokens']} its tags"
            ),
            _row("accepted", f"{_span(answers['accepted'])} answers a task; {answers['without']:,} tasks without"),
        ]
    if double:
        lines.append(
            _row(
                "duplicates",
                f"{double['train']:,} in train, {double['validation']:,} in validation, {double['shared']:,} in both",
            )
        )
        lines += [f"    {one_line(question)}" for question in double["examples"]]
    if search:
        lines += [
            _row("search", f"{search['answer_in_results']:.1%} of {search['asked']:,} bare questions bring an answer"),
            _row("corpus", f"{search['answer_in_corpus']:.1%} of the tasks have an answer somewhere in it"),
            _row("results", f"{_span(search['result_tokens'])} tokens of {search['articles_per_search']} article(s)"),
        ]
    if found["tools"]:
        lines.append(_row("tools", one_line(", ".join(found["tools"]))))
    lines += [f"note: {one_line(note)}" for note in found["notes"]]
    lines += [f"problem: {one_line(problem)}" for problem in found["problems"]]
    return lines


def _example_lines(examples: Sequence[Mapping[str, Any]]) -> list[str]:
    """The prompts whole; what all of them begin with is written once."""
    prompts = [example["prompt"] for example in examples]
    alike = itertools.takewhile(
        lambda lines: len(set(lines)) == 1, zip(*(p.splitlines(True) for p in prompts), strict=False)
    )
    common = "".join(lines[0] for lines in alike) if len(prompts) > 1 else ""
    lines = [f"How all {len(prompts)} prompts begin:", *_indented(common)] if common else []
    for example in examples:
        answers = one_line(" | ".join(example["answers"][:NAMED]))
        lines.append(f"Task {one_line(example['id'])} ({example['tokens']} tokens, answers: {answers}):")
        lines += _indented(example["prompt"][len(common) :])
    return lines


def _indented(text: str) -> list[str]:
    return [f"  | {line}" for line in visible(text).splitlines()]


def _row(name: str, text: str) -> str:
    return f"{name:<17} {text}"


def _span(values: Mapping[str, float]) -> str:
    """A distribution on a line."""
    if not values:
        return "no"
    return f"{values['min']:,} to {values['max']:,} (median {values['median']:,.0f}, 95 % {values['p95']:,.0f})"
