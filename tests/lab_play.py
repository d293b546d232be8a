"""The laboratory's processes as environments that are played, and their policies as engines."""

import itertools
import re
from collections.abc import Callable, Sequence

import numpy as np

from turnwise.chat import Chat
from turnwise.engine import Completion, Sampling
from turnwise.env import Step
from turnwise.lab import TurnProcess, action_probabilities
from turnwise.types import Action, Message


class ProcessEnvironment:
    """One rollout of a process. It says the state's name, and pays turn reward and outcome by these names."""

    def __init__(self, process: TurnProcess, seeds: Callable[[], int]) -> None:
        self.process, self.seeds = process, seeds
        self.rng = np.random.default_rng(seeds())
        self.state, self.turns = -1, 0

    def start(self) -> tuple[Message, ...]:
        self.state = int(self.rng.choice(len(self.process.states), p=self.process.start))
        return (self._says(),)

    def _says(self) -> Message:
        return Message(role="user", content=f"[{self.state_key()}]")

    async def step(self, text: str) -> Step:
        process, came_from = self.process, self.state
        action = process.actions[came_from].index(text)
        self.state = int(self.rng.choice(len(process.states), p=process.transition[came_from, action]))
        self.turns += 1
        rewards = {"turn": float(process.turn_reward[came_from, action, self.state])}
        ended = bool(process.terminal[self.state])
        if ended or self.turns == process.max_turns:
            rewards["outcome"] = float(process.outcome[self.state])
            return Step(action=Action(), stop="done" if ended else "max_turns", rewards=rewards)
        return Step(action=Action(), reply=(self._says(),), rewards=rewards)

    def fork(self) -> "ProcessEnvironment":
        other = ProcessEnvironment(self.process, self.seeds)
        other.state, other.turns = self.state, self.turns
        return other

    def state_key(self) -> str:
        return self.process.states[self.state]


class ProcessEngine:
    """Draws the actions of a process's policy as text."""

    policy_version = 0

    def __init__(self, process: TurnProcess, logits: np.ndarray, chat: Chat) -> None:
        self.process, self.chat = process, chat
        self.policy = action_probabilities(process, logits)

    async def generate(self, prompt_ids: Sequence[int], sampling: Sampling, *, session: object) -> Completion:
        state = self.process.states.index(re.findall(r"\[(.*?)\]", self.chat.decode(prompt_ids))[-1])
        action = np.random.default_rng(sampling.seed).choice(self.policy.shape[1], p=self.policy[state])
        ids = (*self.chat.encode_text(self.process.actions[state][action]), self.chat.end_id)
        return Completion(token_ids=ids, logprobs=(-1.0,) * len(ids), finish="stop")

    def release(self, session: object) -> None:
        pass


def environments(process: TurnProcess, seed: int) -> Callable[[object], ProcessEnvironment]:
    """Makes environments whose draws differ, and are the same in a test's every run."""
    numbers = itertools.count(seed * 1_000_003)
    return lambda task: ProcessEnvironment(process, lambda: next(numbers))
