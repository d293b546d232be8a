"""What a starting checkpoint for several searches can do on held-out two-hop questions, each skill alone.

    python benchmarks/start_search.py CHECKPOINT [--count 300]

Token by token with the right beginning given: the share of questions for which the tokens in question are all the
policy's first choice. *Names* are the relations in its three thoughts (the one to look up first, the bridge's, the one
that is asked for), *first query* is the entity that the question names, *bridge* the second query, read out of the
first article, and *answer* is read out of the second. The last line is the same about one-hop questions.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import dataclasses
import random
from collections.abc import Sequence

import torch

from turnwise import atlas
from turnwise.batch import pack
from turnwise.policy import Policy, load_policy, token_states
from turnwise.search_tags import parse, system_prompt
from turnwise.search_warmup import SEARCH_SKILLS, SearchDemonstrator, task_chain
from turnwise.types import Message, Task
from turnwise.warmup import Demonstration, SubjectSource, demonstration_row, search_stub

CLEAN = dataclasses.replace(SEARCH_SKILLS, follow_ups=0, hurries=0.0)
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--count", type=int, default=300)
    args = parser.parse_args()
    policy = load_policy(args.checkpoint)
    for hops in (2, 1):
        tasks = atlas.tasks("validation", hops=hops)
        found = skills(policy, random.Random(0).sample(tasks, min(args.count, len(tasks))))
        print(f"{hops} hops: " + ", ".join(f"{name} {share:.3f}" for name, share in found.items()))


if __name__ == "__main__":
    main()
