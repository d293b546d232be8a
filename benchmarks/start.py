"""What a starting checkpoint can do: reading, copying a name into a query, and knowing facts by heart.

    python benchmarks/start.py [CHECKPOINT] [--count 300] [--questions FILE]

Each skill is measured alone, token by token with the right beginning given: the share of demonstrations whose tokens
in question are all the policy's first choice. *Reads* takes held-out articles and answers, *copies* held-out names in
queries, *recalls* answers without a search about entities that the warm-up taught by heart. With a file of questions of
another world, *copies whole* is the share of those that it would ask as they stand.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import dataclasses
import json
import random
from pathlib import Path

import numpy as np
import torch

from turnwise import atlas
from turnwise.batch import Row, pack
from turnwise.policy import Policy, load_policy, token_states
from turnwise.tags import parse, system_prompt
from turnwise.tasks import load_tasks
from turnwise.types import Message
from turnwise.warmup import (
    CALL_THOUGHTS,
    SKILLS,
    Demonstration,
    Demonstrator,
    Subject,
    SubjectSource,
    demonstration_row,
    search_stub,
)

CALL_BEGINS = '{"name": "search", "args": {"query": "'
CLEAN = dataclasses.replace(SKILLS, asks_whole=0.0, follow_ups=0)


def skills(policy: Policy, *, count: int, seed: int = 0) -> dict[str, float]:
    """The share of `count` demonstrations that the policy would write as they are, by skill."""
    source = SubjectSource(random.Random(seed))
    held_out = [e for e in atlas.entities().values() if e.split == "validation" and e.values]
    subjects = [source.real(source.rng.choice(held_out)) for _ in range(count)]
    known = [source.real(source.rng.choice(source.known)) for _ in range(count)]
    return {
        "reads": _share(policy, source, subjects, calls=True, message=1),
        "copies": _share(policy, source, subjects, calls=True, message=0),
        "recalls": _share(policy, source, known, calls=False, message=0),
    }


def copies_whole(policy: Policy, questions: list[str]) -> float:
    """The share of questions that the policy would write into a query as they stand, to the end of the call."""
    chat, copied = policy.chat, 0
    for question in questions:
        call = json.dumps({"name": "search", "args": {"query": question}}, ensure_ascii=False)
        message = f"<reasoning>\n{CALL_THOUGHTS[0]}\n</reasoning>\n<tool>\n{call}\n</tool>"
        begun = chat.encode_text(message[: message.index(call)] + CALL_BEGINS)
        row = demonstration_row(Demonstration(question=question, messages=(message,)), chat, _system(policy))
        place = int(np.argmax(row.action)) + len(begun)
        copied += _chosen(policy, row, place, len(row.ids) - 1)
    return copied / len(questions)


def _share(policy: Policy, source: SubjectSource, subjects: list[Subject], *, calls: bool, message: int) -> float:
    demonstrator = Demonstrator(source, CLEAN)
    written = [_writes(policy, demonstrator.about(subject, calls=calls), message) for subject in subjects]
    return sum(written) / len(written)


def _writes(policy: Policy, demonstration: Demonstration, message: int) -> bool:
    """Whether the tokens of a message's query or answer are the policy's first choice, each after the right ones."""
    row = demonstration_row(demonstration, policy.chat, _system(policy))
    action = parse(demonstration.messages[message])
    said = action.tool_call.arguments["query"] if action.tool_call else action.answer
    value = policy.chat.encode_text(said)
    places = [i for i in range(len(row.ids)) if row.action[i] and list(row.ids[i : i + len(value)]) == value]
    place = places[0 if message == 0 else -1]
    return _chosen(policy, row, place, place + len(value))


def _system(policy: Policy) -> tuple[int, ...]:
    return tuple(policy.chat.message_ids(Message(role="system", content=system_prompt(search_stub()))))


@torch.inference_mode()
def _chosen(policy: Policy, row: Row, start: int, end: int) -> bool:
    """Whether the tokens start..end of a row are the policy's first choice, each after the right ones."""
    batch = pack([row], pad_id=policy.chat.pad_id)
    states = token_states(policy.model, batch)[batch.place[0, start:end]]
    return policy.model.get_output_embeddings()(states).argmax(-1).tolist() == list(row.ids[start:end])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", default="embedded")
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--questions", type=Path)
    args = parser.parse_args()
    policy = load_policy(args.checkpoint)
    found = skills(policy, count=args.count)
    if args.questions:
        asked = [task.question for task in load_tasks(args.questions)][: args.count]
        found["copies whole"] = copies_whole(policy, asked)
    print(", ".join(f"{name} {share:.3f}" for name, share in found.items()), f"of {args.count} each")


if __name__ == "__main__":
    main()
