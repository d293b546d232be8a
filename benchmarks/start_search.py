"""What a starting checkpoint for several searches can do on held-out two-hop questions, each skill alone.

    python benchmarks/start_search.py CHECKPOINT [--count 300] [--played 100]

Token by token with the right beginning given: the share of questions for which the tokens in question are all the
policy's first choice. *Names* are the relations in its three thoughts (the one to look up first, the bridge's, the one
that is asked for), *first query* is the entity that the question names, *bridge* the second query, read out of the
first article, and *answer* is read out of the second; then the same about one-hop questions.

The last lines are of whole rollouts of up to four turns, on as many questions as `--played` says: the shares that
search first for the entity that the question names, then also for the bridge, and then also answer right; that answer
right however they came to it; whose last message is in the form that arXiv 2505.11821 v2 asks for; searches a rollout.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import dataclasses
import random
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch

from turnwise import atlas
from turnwise.batch import pack
from turnwise.config import TrainConfig
from turnwise.evaluation import Mode, make_engine, mean_metrics, play, rollout_limits, spread
from turnwise.policy import Policy, load_policy, token_states
from turnwise.search_tags import parse, system_prompt
from turnwise.search_warmup import SEARCH_SKILLS, SearchDemonstrator, task_chain
from turnwise.setting import make_setting, named_tasks
from turnwise.types import Message, Rollout, Task
from turnwise.warmup import Demonstration, SubjectSource, demonstration_row, search_stub

CLEAN = dataclasses.replace(SEARCH_SKILLS, follow_ups=0, hurries=0.0)
HOPS: tuple[Literal[1, 2], ...] = (2, 1)
MODES: tuple[Mode, ...] = ("greedy", "sampled")
PLAYED: tuple[tuple[str, atlas.Split], ...] = (
    ("atlas-two-hop", "train"),
    ("atlas-two-hop", "validation"),
    ("atlas", "validation"),
)
NAMES = {2: ("first", "answer"), 3: ("first", "bridge", "answer")}


def skills(policy: Policy, tasks: Sequence[Task], *, seed: int = 0) -> dict[str, float]:
    """The share of the tasks' demonstrations that the policy would write as they are, by message and part of it."""
    demonstrator = SearchDemonstrator(SubjectSource(random.Random(seed)), CLEAN)
    found: dict[str, list[bool]] = {}
    for task in tasks:
        chain = task_chain(task)
        shown = demonstrator.about(chain, searches=True)
        relations = [hop.relation.replace("_", " ") for hop in chain.hops]
        named = [relations[0], *relations]
        for k, right in enumerate(_first_choices(policy, shown, named)):
            name = NAMES[len(shown.messages)][k]
            found.setdefault(f"names {name}", []).append(right[0])
            found.setdefault("answer" if name == "answer" else f"{name} query", []).append(right[1])
    return {name: sum(rights) / len(rights) for name, rights in found.items()}


@torch.inference_mode()
def _first_choices(policy: Policy, shown: Demonstration, relations: Sequence[str]) -> list[tuple[bool, bool]]:
    """For each message: whether the relation in its thought, and its query or answer, are the first choices."""
    chat = policy.chat
    system = tuple(chat.message_ids(Message(role="system", content=system_prompt(search_stub()))))
    row = demonstration_row(shown, chat, system)
    batch = pack([row], pad_id=chat.pad_id)
    head = policy.model.get_output_embeddings()
    assert head is not None, "a causal language model has an output layer"
    choices = head(token_states(policy.model, batch))[batch.place[0]].argmax(-1).tolist()
    right = [a == b for a, b in zip(choices, row.ids, strict=False)]
    starts = [i for i in range(len(row.ids)) if row.action[i] and (i == 0 or not row.action[i - 1])]
    found = []
    for start, message, relation in zip(starts, shown.messages, relations, strict=True):
        ids = chat.encode_text(message)
        named, said = (_span(ids, chat.encode_text(text)) for text in (f" {relation}", _said(message)))
        found.append((all(right[start + i] for i in named), all(right[start + i] for i in said)))
    return found


def _said(message: str) -> str:
    """The query or the answer in a message."""
    action = parse(message)
    arguments = (action.tool_call and action.tool_call.arguments) or {}
    return str(arguments.get("query", action.answer))


def _span(ids: list[int], part: list[int]) -> range:
    """Where a part of a message stands in it, the last time."""
    places = [i for i in range(len(ids)) if ids[i : i + len(part)] == part]
    return range(places[-1], places[-1] + len(part))


def behaviour(policy: Policy, source: str, split: atlas.Split, mode: Mode, *, count: int) -> dict[str, float]:
    """Shares of `count` rollouts that do each step of the right way, and what else there is to say of them."""
    config = TrainConfig(tasks=source, protocol="search", max_turns=4)
    tasks = spread(named_tasks(source, split), count)
    limits = rollout_limits(config, policy)
    played = play(tasks, make_setting(config), [make_engine(policy)], policy.chat, limits=limits, mode=mode)
    steps = np.mean([_right_steps(task, rollout) for task, rollout in played], axis=0)
    means = mean_metrics(played, "search")
    names = {"exact_match": "exact match", "final_format": "final format", "searches": "searches"}
    return {
        **dict(zip(("entity", "and bridge", "and answer"), steps.tolist(), strict=True)),
        **{said: means[name] for name, said in names.items()},
    }


def _right_steps(task: Task, rollout: Rollout) -> tuple[bool, bool, bool]:
    """Whether the entity was searched first; then the bridge too, if there is one; and then the answer was right."""
    queries = [call.arguments["query"] for turn in rollout.turns if (call := turn.action.tool_call) and call.arguments]
    entity = queries[:1] == [task.metadata["entity"]]
    bridge = entity and task.metadata["linked"] in (None, *queries[1:])
    return entity, bridge, bridge and rollout.answer in task.answers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--played", type=int, default=100)
    args = parser.parse_args()
    policy = load_policy(args.checkpoint)
    for hops in HOPS:
        tasks = atlas.tasks("validation", hops=hops)
        found = skills(policy, random.Random(0).sample(tasks, min(args.count, len(tasks))))
        _print(f"{hops} hops", found)
    for source, split in PLAYED:
        for mode in MODES:
            _print(f"{source} {split} {mode}", behaviour(policy, source, split, mode, count=args.played))


def _print(name: str, found: dict[str, float]) -> None:
    print(f"{name}: " + ", ".join(f"{part} {share:.3f}" for part, share in found.items()), flush=True)


if __name__ == "__main__":
    main()
