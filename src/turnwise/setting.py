"""What a configuration stands for: its questions, its tools, its environments and its rewards."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from turnwise import atlas
from turnwise.atlas.world import hash_rank
from turnwise.config import ATLAS, ATLAS_HOPS, TrainConfig
from turnwise.env import Environment, ToolEnvironment
from turnwise.errors import InputError, unknown_name
from turnwise.judge import check_judge, judged
from turnwise.protocols import protocol_named
from turnwise.rewards import BUILT_IN, JUDGED, RewardFunction, load_rewards, score
from turnwise.search import load_corpus, open_index, search_tool
from turnwise.tasks import check_answers_in_corpus, load_tasks
from turnwise.tools import Tool, load_tools
from turnwise.types import Rollout, Task

VALIDATION_SHARE = 0.1
ASKED_SHARE = 0.25
"""The share of the atlas's training entities that training asks about. The others only taught the starting policy."""


def training_rank(entity: str) -> float:
    """A training entity's place in [0, 1), by a hash of its name: the first `ASKED_SHARE` are asked about."""
    return hash_rank("training", entity) / 2**64


@dataclass(frozen=True)
class Setting:
    """Questions to train and validate on, the tools to answer them with, and what the answers earn."""

    config: TrainConfig
    """`make_setting` writes the weights of its rewards out."""
    train: Sequence[Task]
    validation: Sequence[Task]
    tools: Mapping[str, Tool]
    rewards: Mapping[str, RewardFunction]

    def environment(self, task: Task) -> Environment:
        """A fresh environment for one rollout of a task."""
        return ToolEnvironment(task, self.tools, max_turns=self.config.max_turns, protocol=self.config.protocol)

    def scored(self, task: Task, rollout: Rollout) -> Rollout:
        """The rollout with its rewards."""
        return score(
            task,
            rollout,
            self.config.weights,
            functions=self.rewards,
            definition=self.config.exact_match,
            protocol=self.config.protocol,
        )

    def all_scored(self, pairs: Sequence[tuple[Task, Rollout]]) -> list[Rollout]:
        """The rollouts with their rewards, judged first where a judge is configured. RunError as in `judged`."""
        if self.config.judge:
            pairs = judged(pairs, self.config.judge)
        return [self.scored(task, rollout) for task, rollout in pairs]


def make_setting(config: TrainConfig) -> Setting:
    """Reads everything a configuration names; bad input raises here, before any work starts."""
    train, validation = _tasks(config)
    rewards = load_rewards(config.rewards) if config.rewards else {}
    known = [*BUILT_IN, *JUDGED, *rewards]
    for name in config.weights:
        if name not in known:
            raise unknown_name("a reward component", name, known)
    config = dataclasses.replace(config, reward_weights=dict(config.weights))
    if config.judge:
        check_judge(config.judge)
    return Setting(
        config=config,
        train=train,
        validation=validation,
        tools=make_tools(config, [*train, *validation]),
        rewards=rewards,
    )


def make_tools(config: TrainConfig, tasks: Sequence[Task]) -> Mapping[str, Tool]:
    """The user's tools, or the search tool over the configured corpus, which must answer some of the tasks, if any.

    Raises ConfigError for tools that the protocol cannot call.
    """
    if config.tools:
        tools = load_tools(config.tools)
        protocol_named(config.protocol).check_tools(tools)
        return tools
    index = open_index(config.corpus)
    if tasks and (config.corpus != ATLAS or config.tasks not in ATLAS_HOPS):
        check_answers_in_corpus(tasks, (article.text for article in load_corpus(config.corpus)))
    tool = search_tool(index, k=config.search_results, cap=config.result_chars)
    return {tool.name: tool}


def named_tasks(source: str, split: atlas.Split, columns: Mapping[str, str] | None = None) -> Sequence[Task]:
    """The atlas's questions of a split, or a file's, whose `columns` may have other names.

    Training asks about the entities that `ASKED_SHARE` leaves; the second fact of a two-hop question
    may be any entity's of the training split.
    """
    if source not in ATLAS_HOPS:
        return load_tasks(source, columns=columns, split=split)
    hops = ATLAS_HOPS[source]
    if split != "train":
        return atlas.tasks(split, hops=hops)
    tasks = atlas.tasks("train", hops=hops, phrasing="all")
    return [task for task in tasks if training_rank(task.metadata["entity"]) < ASKED_SHARE]


def _tasks(config: TrainConfig) -> tuple[Sequence[Task], Sequence[Task]]:
    columns = config.column_names
    train = named_tasks(config.tasks, "train", columns)
    if config.validation_tasks:
        validation = named_tasks(config.validation_tasks, "validation", columns)
    elif config.tasks in ATLAS_HOPS:
        validation = named_tasks(config.tasks, "validation")
    else:
        train, validation = held_out(train)
    if not train or not validation:
        raise InputError(
            f"there must be questions to train and to validate on; got {len(train)} and {len(validation)}; give "
            "a larger file, or name --validation-tasks"
        )
    return train, validation


def held_out(tasks: Sequence[Task]) -> tuple[list[Task], list[Task]]:
    """The tasks to train on and those that are held out for validation, by a hash of their ids."""
    held = {t.id for t in tasks if hash_rank("validation", t.id) / 2**64 < VALIDATION_SHARE}
    return [task for task in tasks if task.id not in held], [task for task in tasks if task.id in held]
