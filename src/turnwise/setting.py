"""What a configuration stands for: its questions, its tools, its environments and its rewards."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from turnwise import atlas
from turnwise.atlas.world import hash_rank
from turnwise.config import ATLAS, ATLAS_HOPS, TrainConfig
from turnwise.env import Environment, ToolEnvironment
from turnwise.envs import Source, load_source
from turnwise.errors import ConfigError, InputError, unknown_name
from turnwise.judge import check_judge, judged
from turnwise.protocols import NATIVE, ProtocolName, native_protocol, protocol_named
from turnwise.rewards import BUILT_IN, JUDGED, RewardFunction, load_rewards, score, score_or_fail
from turnwise.search import load_corpus, open_index, search_tool
from turnwise.sources import is_hub_name, policy_folder
from turnwise.tasks import check_answers_in_corpus, load_tasks
from turnwise.templates import read_template
from turnwise.tool_objects import check_forkable
from turnwise.toolbox.sources import named_tools
from turnwise.tools import Tool
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
    """`make_setting` writes the weights of its rewards out, and the name of a native protocol."""
    train: Sequence[Task]
    validation: Sequence[Task]
    tools: Mapping[str, Tool]
    rewards: Mapping[str, RewardFunction]
    source: Source | None = None
    """Where environments come from, if they are not those of the tools."""
    tool_failures: float = 0.0
    """The probability that a call's result is lost; training sets it for the rollouts that it learns from."""

    def environment(self, task: Task) -> Environment:
        """A fresh environment for one rollout of a task."""
        if self.source:
            return self.source.environment(task, self.config.max_turns)
        return ToolEnvironment(
            task,
            self.tools,
            max_turns=self.config.max_turns,
            protocol=self.config.protocol,
            failures=self.tool_failures,
        )

    def scored(self, task: Task, rollout: Rollout) -> Rollout:
        """The rollout with its rewards."""
        return score(
            task,
            rollout,
            self.config.weights,
            functions=self.rewards,
            definition=self.config.exact_match,
            protocol=self.config.tag_protocol,
        )

    def all_scored(self, pairs: Sequence[tuple[Task, Rollout]]) -> list[Rollout]:
        """The rollouts with their rewards, judged first where a judge is configured. RunError as in `judged`.

        One whose rewards are not finite has failed: stop `error`, and no rewards.
        """
        if self.config.judge:
            pairs = judged(pairs, self.config.judge)
        return [score_or_fail(lambda t=t, r=r: self.scored(t, r), r) for t, r in pairs]


def make_setting(config: TrainConfig) -> Setting:
    """Reads everything a configuration names; bad input raises here, before any work starts."""
    source = environment_source(config)
    train, validation = _tasks(config, source)
    rewards = load_rewards(config.rewards) if config.rewards else {}
    known = [*BUILT_IN, *JUDGED, *rewards, *((*source.rewards, "success") if source else ())]
    for name in config.weights:
        if name not in known:
            raise unknown_name("a reward component", name, known)
    config = dataclasses.replace(config, reward_weights=dict(config.weights), protocol=played_protocol(config))
    if config.judge:
        check_judge(config.judge)
    return Setting(
        config=config,
        train=train,
        validation=validation,
        tools={} if source else make_tools(config, [*train, *validation]),
        rewards=rewards,
        source=source,
    )


def environment_source(config: TrainConfig) -> Source | None:
    """Where the configuration's environments come from; None for those of tools.

    Raises InputError where it cannot be used, ConfigError for rollouts that branch in an environment that cannot be
    copied.
    """
    if config.environment is None:
        return None
    source = load_source(config.environment)
    if config.branches and not source.forks:
        raise ConfigError(
            f"branches must go with an environment that can be copied; {source.name} cannot; leave branches out"
        )
    return source


def played_protocol(config: TrainConfig) -> ProtocolName:
    """The configuration's protocol, where "native" is the format that the policy's chat template writes.

    Raises ConfigError where the policy has no template, or one of another format.
    """
    if config.protocol != NATIVE:
        return config.protocol
    start = config.start
    folder = policy_folder(start, names="embedded")[0] if is_hub_name(start) else Path(start)
    template = read_template(folder) if folder.is_dir() else None
    return cast(ProtocolName, native_protocol(template, config.start))


def make_tools(config: TrainConfig, tasks: Sequence[Task]) -> Mapping[str, Tool]:
    """The configured tools. The search tool's corpus, where it is one of them, must answer some of the tasks, if any.

    Raises ConfigError for tools that the protocol cannot call, or that cannot be copied where rollouts branch.
    """

    def search() -> Tool:
        index = open_index(config.corpus)
        if tasks and (config.corpus != ATLAS or config.tasks not in ATLAS_HOPS):
            check_answers_in_corpus(tasks, (article.text for article in load_corpus(config.corpus)))
        return search_tool(index, k=config.search_results, cap=config.result_chars)

    tools = named_tools(config.tools, search)
    protocol_named(config.protocol).check_tools(tools)
    if config.branches:
        check_forkable(tools)
    return tools


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


def environment_tasks(
    source: Source, named: str, split: atlas.Split, columns: Mapping[str, str] | None = None
) -> Sequence[Task]:
    """An environment's own tasks of a split, or those that are named: a file, which needs no answers, or the atlas's.

    `atlas`, which is what is named by default, stands for the environment's own.
    """
    if named == ATLAS:
        if source.tasks is None:
            raise ConfigError(f"tasks must be named, as {source.name} has none of its own; give --tasks FILE")
        return source.tasks(split)
    if named in ATLAS_HOPS:
        return named_tasks(named, split)
    return load_tasks(named, columns=columns, split=split, answered=False)


def _tasks(config: TrainConfig, source: Source | None) -> tuple[Sequence[Task], Sequence[Task]]:
    columns = config.column_names

    def named(name: str, split: atlas.Split) -> Sequence[Task]:
        if source:
            return environment_tasks(source, name, split, columns)
        return named_tasks(name, split, columns)

    train = named(config.tasks, "train")
    if config.validation_tasks:
        validation = named(config.validation_tasks, "validation")
    elif config.tasks in ATLAS_HOPS:
        validation = named(config.tasks, "validation")
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
