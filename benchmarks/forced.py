"""The same work for whoever does it: rollouts in which every message is a search until the last granted turn.

Whatever the policy says, its message is taken for a call of the search tool: with the query in it, or else with its
last words. So all who play have the same number of turns, of the same policy's own length, and no training is needed
for that. Credit comes of rewards that differ from rollout to rollout, so that every rollout has a gradient. Questions
are made as long as wanted by putting articles of the embedded world before them, different ones before each.
"""

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from turnwise import tags
from turnwise.chat import Chat
from turnwise.config import TrainConfig
from turnwise.crediting import credit_rollouts
from turnwise.engine import Completion
from turnwise.engines.hf import HFEngine
from turnwise.env import Environment, Step
from turnwise.evaluation import draw, place
from turnwise.learning import update
from turnwise.policy import Policy, load_policy, tiny_policy
from turnwise.protocols import opening, protocol_named
from turnwise.rollout import Limits
from turnwise.search import load_corpus
from turnwise.setting import Setting, make_setting
from turnwise.tools import Tool, error_result
from turnwise.types import Action, Message, Rollout, Task, ToolResult

PROTOCOL = protocol_named("tools")
LAST_WORDS = 60
"""Characters of a message without a query that are searched for."""
RESULT_TOKENS = 260
"""More tokens than a result with its frame has."""
QUERY = re.compile(r'"query": "([^"]+)')


def query_of(text: str) -> str:
    """What a message searches for."""
    found = QUERY.search(text)
    return found[1] if found else text[-LAST_WORDS:]


def turn_value(text: str) -> float:
    """A reward of a turn that depends on what it says: its share of 200 characters."""
    return min(len(text), 200) / 200


def outcome_value(text: str, answers: Sequence[str]) -> float:
    """1 where the last message has an accepted answer in it; and what it says counts a little, as in turns."""
    return float(any(answer in text for answer in answers)) + turn_value(text) / 10


class ForcedSearch:
    """An environment of one rollout that searches `turns` - 1 times."""

    def __init__(self, task: Task, search: Tool, turns: int) -> None:
        self._task, self._search, self._left = task, search, turns

    def start(self) -> tuple[Message, ...]:
        """The rules, and the question."""
        return opening(PROTOCOL, {"search": self._search}, self._task.question)

    def step(self, text: str) -> Step:
        """The result of a search; nothing in the last turn."""
        self._left -= 1
        if not self._left:
            return Step(action=Action(), stop="max_turns")
        try:
            result = ToolResult(text=str(self._search.function(query_of(text))))
        except Exception as error:
            result = error_result("exception", str(error))
        return Step(action=Action(), reply=(Message(role="user", content=tags.result_text(result)),))


class WholeTurns(HFEngine):
    """The engine, whose cut-off turns count as whole ones."""

    async def generate(self, *args: object, **options: object) -> Completion:
        """A completion that ended by itself, whatever ended it."""
        return dataclasses.replace(await super().generate(*args, **options), finish="stop")  # type: ignore[arg-type]


@dataclass(frozen=True)
class ForcedSetting(Setting):
    """The embedded world's questions with forced turns."""

    def environment(self, task: Task) -> Environment:
        """A fresh environment for one rollout of a task."""
        return ForcedSearch(task, self.tools["search"], self.config.max_turns)

    def scored(self, task: Task, rollout: Rollout) -> Rollout:
        """The rollout with rewards that differ between rollouts."""
        *searches, last = rollout.turns
        return dataclasses.replace(
            rollout,
            turn_rewards=(*({"said": turn_value(turn.text)} for turn in searches), {}),
            outcome_rewards={"answered": outcome_value(last.text, task.answers)},
        )


def forced_setting(*, turns: int, tasks: int, prompt_tokens: int, chat: Chat, turn_tokens: int = 64) -> ForcedSetting:
    """So many questions, whose prompts have at least `prompt_tokens` tokens."""
    config = TrainConfig(max_turns=turns, minibatches=1, tasks_per_step=tasks, max_turn_tokens=turn_tokens)
    plain = make_setting(config)
    base = ForcedSetting(**{field.name: getattr(plain, field.name) for field in dataclasses.fields(plain)})
    chosen = [lengthened(base, chat, i, prompt_tokens) for i in range(tasks)]
    return dataclasses.replace(base, train=chosen)


def lengthened(setting: Setting, chat: Chat, number: int, prompt_tokens: int) -> Task:
    """A question behind as many articles as it takes."""
    articles = [f"{article.title}: {article.text}" for article in load_corpus("atlas")]
    task = setting.train[number * len(setting.train) // max(1, setting.config.tasks_per_step)]
    question, count = task.question, 0
    while len(chat.prompt_ids(setting.environment(task).start())) < prompt_tokens:  # type: ignore[arg-type]
        text = "\n".join(articles[(97 * number + i) % len(articles)] for i in range(count + 1))
        task, count = dataclasses.replace(task, question=f"{text}\n{question}"), count + 1
    return task


def context_of(turns: int, prompt_tokens: int, turn_tokens: int = 64) -> int:
    """Tokens that suffice for every rollout."""
    return 300 + prompt_tokens + turns * (turn_tokens + RESULT_TOKENS)


def long_policy(context: int, *, hidden: int | None = None, layers: int = 3) -> Policy:
    """The embedded policy with room for `context` tokens, which its rotary positions need no weights for.

    With `hidden`, a random model of that width instead.
    """
    policy = load_policy("embedded")
    if hidden is not None:
        policy = tiny_policy(policy.chat, seed=0, hidden=hidden, layers=layers)
    policy.model.config.max_position_embeddings = context
    return place(policy, TrainConfig())


def forced_engine(policy: Policy, setting: Setting, size: int) -> HFEngine:
    """An engine for groups of `size`; it and its cache stay from step to step, as in training."""
    return WholeTurns(
        policy.model,
        stop_ids=policy.chat.stop_ids,
        max_rows=len(setting.train) * size,
        max_context=policy.context,
    )


def forced_rollouts(policy: Policy, setting: Setting, engine: HFEngine, size: int, step: int) -> list[Rollout]:
    """A group of `size` rollouts of each question, not scored."""
    config = setting.config
    limits = Limits(max_turn_tokens=config.max_turn_tokens, context=policy.context, max_turns=config.max_turns)
    groups = draw(
        setting.train, setting, [engine], policy.chat, limits=limits, temperature=1.0, seed=(0, step), group_size=size
    )
    return [rollout for group in groups for rollout in group]


def learn(policy: Policy, optimizer: torch.optim.Optimizer, setting: Setting, rollouts: Sequence[Rollout]) -> object:
    """Scores, credit and one optimiser step of forced rollouts."""
    tasks = [task for task in setting.train for _ in range(len(rollouts) // len(setting.train))]
    scored = [setting.scored(task, rollout) for task, rollout in zip(tasks, rollouts, strict=True)]
    return update(policy, optimizer, credit_rollouts(scored, setting.config).rows, setting.config, 0)


def mean_turns(rollouts: Sequence[Rollout]) -> float:
    """Turns of a rollout."""
    return sum(len(rollout.turns) for rollout in rollouts) / len(rollouts)


def mean_sampled(rollouts: Sequence[Rollout]) -> float:
    """Tokens that the policy sampled in a rollout."""
    return sum(len(turn.action_ids) for rollout in rollouts for turn in rollout.turns) / len(rollouts)
