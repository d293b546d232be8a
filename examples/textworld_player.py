"""A tiny policy learns to play a TextWorld game, with anchor-state credit or with one number for the whole rollout.

    python examples/textworld_player.py --method gigpo --steps 12

The policy is a table: a softmax over the commands that make sense, for every observation that it has met. It plays
through Turnwise's rollouts, with text in and text out as a language model would, so that rewards, turn table and credit
are those of any other training.
"""

import argparse
import asyncio
import re

import numpy as np

from turnwise import ScriptedEngine, Task, credit, score
from turnwise.chat import byte_chat
from turnwise.crediting import rollout_table
from turnwise.envs import load_source
from turnwise.rollout import Limits, run_groups
from turnwise.types import Rollout

CHAT = byte_chat()


class Player:
    """Preferences for commands by observation, drawn from and learned."""

    def __init__(self, seed: int) -> None:
        self.preferences: dict[str, dict[str, float]] = {}
        self.random = np.random.default_rng(seed)

    def command(self, prompt: str) -> str:
        """A command drawn for the last observation of a conversation."""
        observation = last_observation(prompt)
        words = re.findall(r"Commands: (.*)\.", observation)[-1].split("; ")
        known = self.preferences.setdefault(observation, dict.fromkeys(words, 0.0))
        return str(self.random.choice(list(known), p=probabilities(known)))

    def learn(self, observation: str, command: str, advantage: float, rate: float) -> None:
        """One step up the gradient of advantage times log-probability."""
        known = self.preferences[observation]
        for word, share in zip(known, probabilities(known), strict=True):
            known[word] += rate * advantage * ((word == command) - share)


def probabilities(preferences: dict[str, float]) -> np.ndarray:
    weights = np.exp(np.array(list(preferences.values())) - max(preferences.values()))
    return weights / weights.sum()


def last_observation(prompt: str) -> str:
    return prompt.rsplit("\nuser\n", 1)[-1].removesuffix("\nassistant\n")


def observations(rollout: Rollout) -> list[str]:
    """What the policy read before each turn."""
    ids, seen = list(rollout.prompt_ids), []
    for turn in rollout.turns:
        seen.append(last_observation(CHAT.decode(ids)))
        ids += [*turn.action_ids, *turn.reply_ids]
    return seen


def play(
    spec: str, method: str, *, steps: int, game: int = 0, rate: float = 0.5, max_turns: int = 20, seed: int = 0
) -> list[float]:
    """The share of won rollouts at each step of training on one game, eight rollouts a step."""
    source, player = load_source(spec), Player(seed)
    assert source.tasks is not None
    task: Task = source.tasks("train")[game]
    engine = ScriptedEngine(player.command, CHAT)
    limits = Limits(max_turn_tokens=100, context=200_000, max_turns=max_turns)
    won = []
    for _ in range(steps):
        playing = run_groups(
            [task], lambda t: source.environment(t, max_turns), engine, CHAT, group_size=8, limits=limits
        )
        [group] = asyncio.run(playing)
        scored = [score(task, r, {"environment": 1.0, "progress": 0.0}, protocol=None) for r in group]
        table = rollout_table(scored)
        advantages = iter(credit.ESTIMATORS[method](table).advantages)
        for rollout in scored:
            for observation, turn in zip(observations(rollout), rollout.turns, strict=True):
                player.learn(observation, turn.text, float(next(advantages)), rate)
        won.append(sum(bool(r.success) for r in scored) / 8)
    return won


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--environment", default="textworld:?rooms=3&objects=4&quest=3&quests=2&games=1")
    parser.add_argument("--method", default="gigpo", choices=["gigpo", "grpo-mr", "turn-rloo", "mt-grpo"])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rates = play(options.environment, options.method, steps=options.steps, seed=options.seed)
    print(f"{options.method}: won " + " ".join(f"{rate:.2f}" for rate in rates))
