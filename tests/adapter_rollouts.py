"""A step of awkward rollouts, natively and as a trainer's padded arrays; for the adapters' tests."""

import dataclasses
from typing import Any

import numpy as np

from turnwise.adapters.rows import dense_scores
from turnwise.config import CRITIC_METHODS, TrainConfig
from turnwise.crediting import credit_rollouts, critic_credit, critic_table
from turnwise.types import Action, Rollout, Turn

END = 2


def awkward_rollouts(groups: int = 4, size: int = 4, *, seed: int = 0, singleton: bool = True) -> list[Rollout]:
    """Rollouts of 1 to 3 turns of 1 to 5 tokens; some cut off; one group whose rewards are equal; one of a single one.

    Some rewards are absent, and replies come again within a group.
    """
    random = np.random.default_rng(seed)
    found = []
    for group in range(groups):
        prompt = tuple(random.integers(3, 40, random.integers(2, 5)).tolist())
        for member in range(1 if singleton and group == groups - 1 else size):
            count = 1 if member == 0 else int(random.integers(1, 4))
            turns = []
            for k in range(count):
                length = int(random.integers(1, 5))
                own = [50 + len(found)] if k == 0 else []  # no two rollouts are alike
                ids = tuple([*own, *random.integers(3, 40, length - 1).tolist(), END])
                reply = tuple(random.integers(3, 6, random.integers(1, 3)).tolist()) if k + 1 < count else ()
                turns.append(
                    Turn(
                        action_ids=ids, sampling_logprobs=(-0.5,) * len(ids), text="", action=Action(), reply_ids=reply
                    )
                )
            equal = group == 1
            rewards = tuple(
                {"tool": 0.2 if equal else float(random.integers(0, 4)) / 5}
                | ({"hit": 0.5} if k % 2 and not equal else {})
                if k + 1 < count
                else {}
                for k in range(count)
            )
            found.append(
                Rollout(
                    task_id=f"task {group}",
                    group=group,
                    prompt_ids=prompt,
                    turns=tuple(turns),
                    stop="max_tokens" if member == 2 else "answer",
                    turn_rewards=rewards,
                    outcome_rewards={"exact": 1.0 if equal else float(random.integers(0, 2)), "form": 0.25},
                )
            )
    return found


def shuffled(rollouts: list[Rollout], seed: int = 1) -> list[Rollout]:
    return [rollouts[i] for i in np.random.default_rng(seed).permutation(len(rollouts))]


def dealt(rollouts: list[Rollout], ranks: int = 2) -> list[list[Rollout]]:
    """The rollouts as processes would have them: dealt like cards, so that every group is split."""
    return [rollouts[rank::ranks] for rank in range(ranks)]


def native_advantages(rollouts: list[Rollout], estimator: str, **options: Any) -> list[np.ndarray]:
    """What the native trainer gives the tokens after each prompt, 0 where they were not sampled."""
    config = TrainConfig(estimator=estimator, **options)
    if estimator in CRITIC_METHODS:
        tokens = critic_table(rollouts, *critic_values(rollouts, estimator))
        found = critic_credit(config, tokens, np.concatenate(critic_values(rollouts, estimator)[0]).astype(float))
        counts = [sum(len(turn.action_ids) for turn in r.turns) for r in rollouts]
        return np.split(found.advantages, np.cumsum(counts)[:-1])
    ordered = sorted(range(len(rollouts)), key=lambda i: rollouts[i].group)
    rows = credit_rollouts([rollouts[i] for i in ordered], config).rows
    by_place = dict(zip(ordered, rows, strict=True))
    return [by_place[i][1].advantages[by_place[i][1].action] for i in range(len(rollouts))]


def critic_values(rollouts: list[Rollout], estimator: str) -> tuple[list[np.ndarray], np.ndarray]:
    """A critic's made-up values at sampled tokens, and after rollouts that were cut off."""
    heads = 2 if estimator == "vetta" else 1
    random = np.random.default_rng(7)
    values = [random.normal(size=sum(len(t.action_ids) for t in r.turns)).astype(np.float32) for r in rollouts]
    after = np.array([0.5 if r.stop == "max_tokens" else 0.0 for r in rollouts])
    return [np.repeat(own[:, None], heads, 1) for own in values], np.repeat(after[:, None], heads, 1)


@dataclasses.dataclass(kw_only=True)
class Padded:
    """Rollouts as a trainer has them."""

    ids: np.ndarray
    present: np.ndarray
    action: np.ndarray
    prompts: list[tuple[int, ...]]
    groups: list[str]
    turn_rewards: list[list[dict[str, float]]]
    outcome_rewards: list[dict[str, float]]


def padded_rollouts(rollouts: list[Rollout], *, left: bool = False, padding_rows: int = 0) -> Padded:
    """The tokens after each prompt in one array; `padding_rows` more whose mask is all zero, in groups of their own."""
    rows = []
    for rollout in rollouts:
        row: list[tuple[int, int]] = []
        for turn in rollout.turns:
            row += [(i, 1) for i in turn.action_ids] + [(i, 0) for i in turn.reply_ids]
        rows.append(row)
    width = max(map(len, rows)) + 2
    ids, present, action = (np.zeros((len(rows) + padding_rows, width), np.int64) for _ in range(3))
    for i, row in enumerate(rows):
        place = slice(width - len(row), width) if left else slice(0, len(row))
        ids[i, place], action[i, place] = zip(*row, strict=True)
        present[i, place] = 1
    return Padded(
        ids=ids,
        present=present,
        action=action,
        prompts=[r.prompt_ids for r in rollouts] + [(3,)] * padding_rows,
        groups=[r.task_id for r in rollouts] + [f"padding {i}" for i in range(padding_rows)],
        turn_rewards=[[dict(turn) for turn in r.turn_rewards] for r in rollouts] + [[] for _ in range(padding_rows)],
        outcome_rewards=[dict(r.outcome_rewards) for r in rollouts] + [{"exact": 9.0}] * padding_rows,
    )


def of_two_numbers(rollout: Rollout) -> Rollout:
    """A rollout as dense rewards tell of it: one number for every turn but the last, and one for the outcome."""
    last = len(rollout.turns) - 1
    return dataclasses.replace(
        rollout,
        turn_rewards=tuple(
            {"reward": sum(turn.values())} if k < last else {} for k, turn in enumerate(rollout.turn_rewards)
        ),
        outcome_rewards={"outcome": sum(rollout.outcome_rewards.values()) + sum(rollout.turn_rewards[-1].values())},
    )


@dataclasses.dataclass(kw_only=True)
class Dense:
    """Rollouts as verl has them: a reward per token."""

    rewards: np.ndarray
    action: np.ndarray
    groups: list[str]


def dense_batch(rollouts: list[Rollout], *, padding_rows: int = 0, at_end: bool = False, left: bool = False) -> Dense:
    """Each turn paid on its last sampled token; `at_end`: the outcome on the row's last token, sampled or not."""
    batch = padded_rollouts(rollouts, padding_rows=padding_rows, left=left)
    rewards = np.zeros(batch.action.shape, np.float32)
    for i, rollout in enumerate(rollouts):
        outcome = sum(rollout.outcome_rewards.values())
        turns = [sum(turn.values()) for turn in rollout.turn_rewards]
        rewards[i] = dense_scores(batch.action[i].tolist(), turns, 0.0 if at_end else outcome)
        if at_end:
            rewards[i, np.flatnonzero(batch.present[i])[-1]] += outcome
    rewards[len(rollouts) :, 0] = 9.0  # padding's rewards are not looked at
    return Dense(rewards=rewards, action=batch.action, groups=batch.groups)
