"""Why a turn has its advantage: the recorded number is split under every method, and what was paid is said."""

import dataclasses

import numpy as np
import pytest

from report_runs import said_turn, write_run
from turnwise.batch import on_sampled, rollout_row
from turnwise.config import BRANCHING, CRITIC_METHODS, TRAINABLE, TrainConfig
from turnwise.credit import TOKEN_ESTIMATORS
from turnwise.crediting import critic_credit, critic_table, estimate, rollout_table
from turnwise.report import load_run
from turnwise.report.data import RolloutLine
from turnwise.report.recipes import RECIPES
from turnwise.report.splits import splits, whitened
from turnwise.report.why import reasons, return_from
from turnwise.types import Rollout, Task, Turn

METHODS = (*TRAINABLE, *BRANCHING)
RECORDED_GROUPS = 2


def chains(rng: np.random.Generator, groups: int = 5, size: int = 4) -> list[Rollout]:
    """Groups of rollouts of one to four turns; observations come again, so that anchors meet."""
    out = []
    for group in range(groups):
        for _ in range(size):
            turns = tuple(
                said_turn(f"t{k}", action_ids=(5,) * int(rng.integers(1, 5)), reply_ids=(int(rng.integers(2)),))
                for k in range(int(rng.integers(1, 5)))
            )
            out.append(scored(rng, group, turns))
    return out


def trees(rng: np.random.Generator) -> list[Rollout]:
    """Two groups, each of two first turns with three second ones after each."""
    out = []
    for group in range(2):
        for first in range(2):
            shared = scored(rng, group, (said_turn(f"first {first}"),)).turn_rewards[0]
            for leaf in range(3):
                one = scored(rng, group, (said_turn(f"first {first}"), said_turn("second")))
                rewards, nodes = (shared, one.turn_rewards[1]), (first, 2 + 3 * first + leaf)
                out.append(dataclasses.replace(one, turn_rewards=rewards, nodes=nodes))
    return out


def scored(rng: np.random.Generator, group: int, turns: tuple[Turn, ...]) -> Rollout:
    rewards = tuple({"found": float(rng.integers(3)) / 2, "format": 0.1} for _ in turns)
    return Rollout(
        task_id=f"q{group}", group=group, prompt_ids=(1,), turns=turns, stop="answer", turn_rewards=rewards,
        outcome_rewards={"exact_match": float(rng.integers(2)), "f1": float(rng.random())},
    )  # fmt: skip


def recorded(config: TrainConfig, rollouts: list[Rollout], rng: np.random.Generator) -> list[RolloutLine]:
    """The lines that training writes of a step's first groups."""
    if config.estimator in CRITIC_METHODS:
        return of_critic(config, rollouts, rng)
    credit = estimate(config, table := rollout_table(rollouts))
    return [
        a_line(
            rollout,
            credit.advantages[table.rollout == i],
            {name: tuple(s.baseline[table.rollout == i].tolist()) for name, s in credit.streams.items()},
        )
        for i, rollout in enumerate(rollouts)
        if rollout.group < RECORDED_GROUPS
    ]


def of_critic(config: TrainConfig, rollouts: list[Rollout], rng: np.random.Generator) -> list[RolloutLine]:
    heads = 2 if config.estimator == "vetta" else 1
    counts = [sum(len(turn.action_ids) for turn in r.turns) for r in rollouts]
    values = [rng.normal(size=(count, heads)) for count in counts]
    at_end = config.estimator in ("ppo-mr", "mt-ppo-paid-at-end")
    tokens = critic_table(rollouts, values, np.zeros((len(rollouts), heads)), at_end=at_end)
    found = critic_credit(config, tokens, np.concatenate(values))
    lines, by_rollout = [], np.split(found.advantages, np.cumsum(counts)[:-1])
    for i, rollout in enumerate(rollouts):
        rows = tokens.turns.rollout == i
        by_token = {}
        if config.estimator in TOKEN_ESTIMATORS:
            row = rollout_row(rollout, [0.0] * len(rollout.turns), [True] * len(rollout.turns))
            by_token = {"token_advantages": on_sampled(row, by_rollout[i])[row.action], "token_values": values[i][:, 0]}
        by_token = {name: tuple(round(float(x), 5) for x in column) for name, column in by_token.items()}
        baselines = {"value": tuple(found.turns.streams["value"].baseline[rows].tolist())}
        lines.append(a_line(rollout, found.turns.advantages[rows], baselines, **by_token))
    return [line for line in lines if line.rollout.group < RECORDED_GROUPS]


def a_line(rollout: Rollout, advantages, baselines=None, **by_token) -> RolloutLine:
    return RolloutLine(
        step=1, split="train", task=Task(id="q", question="q"), rollout=rollout, baselines=baselines or {},
        advantages=tuple(float(a) for a in advantages), loss_mask=(True,) * len(rollout.turns), **by_token,
    )  # fmt: skip


def a_config(method: str, **options) -> TrainConfig:
    return TrainConfig(estimator=method, branches=(2, 3) if method in BRANCHING else (), **options)


def of_step(method: str, seed: int = 0, **options) -> tuple[list[RolloutLine], dict]:
    rng = np.random.default_rng(seed)
    config = a_config(method, **options)
    lines = recorded(config, trees(rng) if method in BRANCHING else chains(rng), rng)
    return lines, dataclasses.asdict(config)


def test_every_method_of_training_has_a_recipe():
    assert {*RECIPES, *CRITIC_METHODS} == set(METHODS)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("method", METHODS)
def test_the_parts_make_the_recorded_advantage_under_every_method(method: str, seed: int):
    lines, config = of_step(method, seed)
    for line, found in zip(lines, splits(lines, config), strict=True):
        assert found is not None
        for split, advantage in zip(found, line.advantages or (), strict=True):
            assert sum(part.advantage for part in split.parts) == pytest.approx(split.total, abs=1e-9)
            assert (split.total - split.centre) / split.spread == pytest.approx(advantage, abs=1e-3)
            assert bool(split.over) == (whitened(config) or method == "gagpo")
            for part in split.parts:  # value, baseline, weight and spread are what is printed
                difference = part.weight * (part.value - (part.baseline or 0.0))
                if abs(part.advantage) > 1e-9:
                    assert difference / part.spread == pytest.approx(part.advantage, abs=1e-9)


@pytest.mark.parametrize(
    ("method", "options"),
    [("mt-grpo", {"alpha": 0.5}), ("grpo-mr", {"gamma": 0.9}), ("turn-rloo", {"gamma": 0.5}), ("gtpo", {"gamma": 1.0}),
     ("turn-ppo", {"whiten": True, "lam": 0.5}), ("mt-ppo", {"whiten": False, "gamma": 0.9}), ("vetta", {"lam": 0.5})],
)  # fmt: skip
def test_the_runs_own_options_are_used(method: str, options: dict):
    lines, config = of_step(method, **options)
    assert all(split is not None for split in splits(lines, config))
    others = {"alpha": 1.0, "gamma": 0.7, "lam": 1.0, "whiten": False}
    wrong = {**config, **{name: others[name] for name in options}} | ({"gamma": 0.3} if "whiten" in options else {})
    assert any(split is None for split in splits(lines, wrong))


@pytest.mark.parametrize("method", METHODS)
def test_no_split_is_claimed_that_the_recorded_advantages_do_not_meet(method: str):
    lines, config = of_step(method)
    advantages = lines[0].advantages
    assert advantages
    lines[0] = dataclasses.replace(lines[0], advantages=(advantages[0] + 0.9, *advantages[1:]))
    first, *others = zip(lines, splits(lines, config), reasons(lines, config), strict=True)
    assert first[1] is None
    assert f"does not give this number under {method}, so it is not split" in first[2][0]
    assert f"return from here on {return_from(first[0]):.2f}" in first[2][0]
    unlike = [split is None for line, split, _ in others if line.group != first[0].group]
    assert all(unlike) if whitened(config) else not any(unlike)


def test_the_critics_value_that_is_not_recorded_is_said_to_be_missing():
    lines, config = of_step("mt-ppo")
    cut = dataclasses.replace(lines[0].rollout, stop="max_tokens")
    lines[0] = dataclasses.replace(lines[0], rollout=cut)
    first, *others = splits(lines, config)
    assert first is None
    assert all(split is not None for split in others)
    assert "goes on with a value that is not recorded" in reasons(lines, config)[0][0]


def test_too_few_different_sums_give_no_mean_and_spread():
    lines, config = of_step("reinforce++")
    assert splits(lines[:1], config) == [None]


# --- the sentences -------------------------------------------------------------------------------------


def two_turns(own: list[float], outcome: list[float], advantages, **config) -> tuple[list[RolloutLine], dict]:
    """A group whose rollouts call a tool and answer."""
    lines = []
    for r, o, a in zip(own, outcome, advantages, strict=True):
        rollout = Rollout(
            task_id="t", group=0, prompt_ids=(), stop="answer", turns=(said_turn("call"), said_turn("answer")),
            turn_rewards=({"tool_execution": r}, {}), outcome_rewards={"exact_match": o},
        )  # fmt: skip
        lines.append(a_line(rollout, a))
    return lines, {"estimator": "mt-grpo", **config}


def test_mt_grpo_is_explained_by_the_turns_own_reward_and_the_outcome():
    # own rewards 0, 1: mean ½, ddof-1 std √½ = 0.71, z = ∓0.71
    # outcomes 2, 0: mean 1, std √2 = 1.41, z = ±0.71
    lines, config = two_turns([0.0, 1.0], [2.0, 0.0], [(0.0, 0.7071), (0.0, -0.7071)])
    first, second = reasons(lines, config)
    assert first[0] == (
        "0.00 = −0.71 + 0.71\n"
        "−0.71: (turn 1’s own reward 0.00 − baseline 0.50) / 0.71, the mean of it and 1 sibling at turn 1.\n"
        "+0.71: (outcome 2.00 − baseline 1.00) / 1.41, the mean of the group’s 2 rollouts.\n"
        "Nothing is paid at this turn. Not paid: tool execution, which 1 of 1 sibling got here. "
        "1 sibling took this turn."
    )
    assert second[1] == (
        "−0.71 = (outcome 0.00 − baseline 1.00) / 1.41, the mean of the group’s 2 rollouts.\n"
        "Nothing is paid at this turn; nothing at the end. Not paid: exact match, which 1 of 1 sibling got at the end. "
        "1 sibling took this turn."
    )


def test_later_turns_stand_with_their_weight():
    # α = ½: 0.71 at the second turn and the outcome's −0.71 half in the first
    lines, config = two_turns([0.0, 0.0], [0.0, 1.0], [(-0.3536, -0.7071), (0.3536, 0.7071)], alpha=0.5)
    assert reasons(lines, config)[1][0].startswith(
        "+0.35 = 0.50 × (outcome 1.00 − baseline 0.50) / 0.71, the mean of the group’s 2 rollouts."
    )


def test_a_reward_that_the_turn_got_too_is_not_called_unpaid():
    lines, config = two_turns([0.5, 1.0], [0.0, 0.0], [(-0.7071, 0.0), (0.7071, 0.0)])
    said = reasons(lines, config)[0][0]
    assert "Paid here: tool execution 0.50." in said
    assert "Not paid" not in said


def test_turn_rloo_names_its_siblings_at_the_turn():
    # returns at turn 1: 1 + 1 = 2, 0 + 1 = 1, 0 + 0 = 0; the last one's baseline is (2 + 1) / 2 = 1.5
    lines, config = two_turns([1.0, 0.0, 0.0], [1.0, 1.0, 0.0], [(1.5, 0.5), (0.0, 0.5), (-1.5, -1.0)],
                              estimator="turn-rloo")  # fmt: skip
    assert reasons(lines, config)[2][0] == (
        "−1.50 = return from here on 0.00 − baseline 1.50, the mean of 2 siblings at this turn.\n"
        "Nothing is paid at this turn. Not paid: tool execution, which 1 of 2 siblings got here. "
        "2 siblings took this turn."
    )


def test_a_turn_that_no_sibling_took_is_compared_with_how_they_ended():
    lines, config = of_step("turn-rloo")
    lone = [
        text
        for line, said in zip(lines, reasons(lines, config), strict=True)
        for k, text in enumerate(said)
        if sum(k < len(other.rollout.turns) for other in lines if other.group == line.group) == 1
    ]
    assert lone
    assert all("how 3 siblings ended, as none took this turn" in text for text in lone)
    assert all("No sibling took this turn." in text for text in lone)


def test_outcome_alone_says_that_turn_rewards_do_not_count():
    lines, config = two_turns([1.0, 0.0], [2.0, 0.0], [(0.7071,) * 2, (-0.7071,) * 2], estimator="grpo-or")
    first, _ = reasons(lines, config)
    assert first[0].startswith(
        "+0.71 = (outcome 2.00 − baseline 1.00) / 1.41, the mean of the group’s 2 rollouts. Every turn"
    )
    assert first[0].endswith(
        "Paid here: tool execution 1.00. 1 sibling took this turn. Turn rewards do not count under grpo-or."
    )


def test_grpo_mr_is_explained_by_the_discounted_sum():
    # γ = ½: 1 + ½·2 = 2 and 0 + ½·0 = 0: mean 1, std √2
    lines, config = two_turns([1.0, 0.0], [2.0, 0.0], [(0.7071,) * 2, (-0.7071,) * 2], estimator="grpo-mr", gamma=0.5)
    assert reasons(lines, config)[0][1].startswith(
        "+0.71 = (all rewards 2.00 − baseline 1.00) / 1.41, the mean of the group’s 2 rollouts. Every turn"
    )


def test_whitening_is_told_with_the_steps_mean_and_spread():
    # rewards 0, 1, 2, 3 whitened with mean 1, spread 2
    lines, config = two_turns([0.0] * 4, [0.0, 1.0, 2.0, 3.0], [((r - 1) / 2,) * 2 for r in range(4)],
                              estimator="reinforce++")  # fmt: skip
    assert reasons(lines, config)[3][0].startswith(
        "+1.00 = (+3.00 − the step’s mean 1.00) / its spread 2.00.\n+3.00 = all rewards 3.00. Every turn gets the same."
    )


def test_a_group_without_difference_says_so():
    lines, config = two_turns([1.0, 1.0], [2.0, 2.0], [(0.0, 0.0)] * 2, estimator="grpo-or")
    assert reasons(lines, config)[0][0].startswith(
        "0.00: outcome 2.00 equals its baseline, the mean of the group’s 2 rollouts. Every turn gets the same."
    )


def test_a_placebos_rewards_are_called_dealt_and_the_advantage_is_split_as_ever():
    lines, config = two_turns([1.0, 0.0], [2.0, 0.0], [(1.0, 1.0), (-1.0, -1.0)], estimator="grpo-mr")
    plain = reasons(lines, config)
    dealt = reasons(lines, {**config, "placebo": "rollouts"})
    for own, other in zip(plain, dealt, strict=True):
        assert [said.rsplit("\n", 1)[0] for said in own] == [said.rsplit("\n", 1)[0] for said in other]
    assert "Paid here: " in plain[0][0]
    assert dealt[0][0].rsplit("\n", 1)[1].startswith("Dealt to this turn by the placebo, whatever it did: ")
    assert dealt[1][0].rsplit("\n", 1)[1] == "The placebo dealt nothing to this turn."
    assert not any("aid here" in said or "Not paid" in said for turns in dealt for said in turns)


def test_rollouts_without_credit_and_unknown_methods_say_so():
    lines, config = two_turns([1.0, 0.0], [2.0, 0.0], [(0.1, 0.2), (0.3, 0.4)], estimator="own")
    lines[1] = dataclasses.replace(lines[1], advantages=None)
    first, second = reasons(lines, config)
    assert "does not give this number under own" in first[0]
    assert second[0].startswith("No advantage: the rollout was not trained on.")


def test_the_generators_advantages_are_all_explained(tmp_path):
    for name in ("grpo-or", "grpo-mr", "mt-grpo"):
        run = load_run(write_run(tmp_path / name, estimator=name, seed=0))
        assert all(split is not None for step in (1, 30, 60)
                   for split in splits([x for x in run.rollouts if x.step == step], run.config))  # fmt: skip
