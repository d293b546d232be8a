"""What a configuration stands for: its questions, its tools, its environments and its rewards."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from turnwise import atlas
from turnwise.atlas.world import hash_rank
from turnwise.config import ATLAS, TrainConfig
from turnwise.env import Environment, ToolEnvironment
from turnwise.errors import InputError, unknown_name
from turnwise.judge import check_judge, judged
from turnwise.rewards import JUDGED, PAPER_WEIGHTS, RewardFunction, load_rewards, score
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
    train: Sequence[Task]
    validation: Sequence[Task]
    tools: Mapping[str, Tool]
    rewards: Mapping[str, RewardFunction]

    def environment(self, task: Task) -> Environment:
        """A fresh environment for one rollout of a task."""
        return ToolEnvironment(task, self.tools, max_turns=self.config.max_turns)

    def scored(self, task: Task, rollout: Rollout) -> Rollout:
        """The rollout with its rewards."""
        return score(
            task,
            rollout,
            self.config.reward_weights,
            functions=self.rewards,
            definition=self.config.exact_match,
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
    known = [*PAPER_WEIGHTS, *JUDGED, *rewards]
    for name in config.reward_weights:
        if name not in known:
            raise unknown_name("a reward component", name, known)
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
    """The user's tools, or the search tool over the configured corpus, which must answer some of the tasks, if any."""
    if config.tools:
        return load_tools(config.tools)
    index = open_index(config.corpus)
    if tasks and (config.corpus != ATLAS or config.tasks != ATLAS):
        check_answers_in_corpus(tasks, (article.text for article in load_corpus(config.corpus)))
    tool = search_tool(index, k=config.search_results, cap=config.result_chars)
    return {tool.name: tool}


def named_tasks(source: str, split: atlas.Split) -> Sequence[Task]:
    """The atlas's questions of a split, or a file's."""
    if source != ATLAS:
        return load_tasks(Path(source))
    if split != "train":
        return atlas.tasks(split)
    tasks = atlas.tasks("train", phrasing="all")
    return [task for task in tasks if training_rank(task.metadata["entity"]) < ASKED_SHARE]


def _tasks(config: TrainConfig) -> tuple[Sequence[Task], Sequence[Task]]:
    train = named_tasks(config.tasks, "train")
    if config.validation_tasks:
        validation = named_tasks(config.validation_tasks, "validation")
    elif config.tasks == ATLAS:
        validation = named_tasks(ATLAS, "validation")
    else:
        held = {t.id for t in train if hash_rank("validation", t.id) / 2**64 < VALIDATION_SHARE}
        validation = [task for task in train if task.id in held]
        train = [task for task in train if task.id not in held]
    if not train or not validation:
        raise InputError(
            f"there must be questions to train and to validate on; got {len(train)} and {len(validation)}; give "
            "a larger file, or name --validation-tasks"
        )
    return train, validation
