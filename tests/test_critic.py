"""The critic: values of the states before tokens, what they are to learn, and who learns from it."""

import dataclasses

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from torch.testing import assert_close

from turnwise.batch import Row, on_sampled, pack, rollout_row
from turnwise.config import CRITIC_METHODS, TrainConfig
from turnwise.crediting import credit_rollouts, critic_credit, critic_table
from turnwise.critic import Critic, make_critic, step_values, token_values
from turnwise.errors import RunError
from turnwise.learning import update
from turnwise.policy import Policy, tiny_policy
from turnwise.rundir import load_critic, save_checkpoint
from turnwise.types import Action, Rollout, Turn

VOCAB = 300


def played(seed: int, *lengths: int, prompt: int = 9, stop: str = "answer", outcome: float | None = None) -> Rollout:
    """Turns of random tokens, of the given lengths, with replies of 3 tokens between them."""
    rng = np.random.default_rng(seed)

    def ids(n: int) -> tuple[int, ...]:
        return tuple(rng.integers(3, VOCAB, n).tolist())

    turns = tuple(
        Turn(action_ids=ids(n), sampling_logprobs=(-6.0,) * n, text="", action=Action(), reply_ids=ids(3))
        for n in lengths
    )
    return Rollout(
        task_id="t",
        group=0,
        prompt_ids=tuple(range(3, 3 + prompt)),
        turns=turns,
        stop=stop,  # type: ignore[arg-type]
        turn_rewards=({},) * len(lengths),
        outcome_rewards={} if outcome is None else {"right": outcome},
    )


def row_of(rollout: Rollout) -> Row:
    return rollout_row(rollout, [0.0] * len(rollout.turns), [True] * len(rollout.turns))


def noisy_critic(policy: Policy, trunk="own", heads: int = 1) -> Critic:
    """A critic whose head says something."""
    critic = make_critic(policy, trunk, heads=heads)
    torch.manual_seed(7)
    torch.nn.init.normal_(critic.head.weight)
    return critic


@pytest.fixture
def policy(bpe_chat) -> Policy:
    return tiny_policy(bpe_chat, seed=0, hidden=16, layers=2)


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


# ---------------------------------------------------------------------------------------- values


@pytest.mark.parametrize("trunk", ["own", "shared"])
def test_a_value_is_of_the_state_before_its_token(policy: Policy, trunk):
    critic = noisy_critic(policy, trunk, heads=2)
    row = row_of(played(0, 3, 2))
    [own], after = step_values(critic, [row], [True], max_tokens=1000, pad_id=0)
    ids = torch.tensor([[*row.prompt_ids, *row.ids]])
    with torch.no_grad():
        states = policy.model.get_decoder()(input_ids=ids).last_hidden_state[0]
        plain = critic.head(states).numpy()
    before = len(row.prompt_ids) - 1 + np.flatnonzero(row.action)  # the state before a token is that at the one before
    assert_allclose(own, plain[before], atol=1e-5)
    assert_allclose(after, plain[-1:], atol=1e-5)


@pytest.mark.parametrize(("max_tokens", "pad_id"), [(1, 0), (40, 0), (10_000, 7)])
def test_values_do_not_depend_on_micro_batches_order_and_padding(policy: Policy, max_tokens: int, pad_id: int):
    critic = noisy_critic(policy)
    rows = [row_of(played(i, *sizes, prompt=5 + i % 2)) for i, sizes in enumerate([(4,), (2, 5), (1,), (3, 1, 2)])]
    rows += rows[:2]
    cut = [True, False, True, False, False, True]
    usual, usual_after = step_values(critic, rows, cut, max_tokens=100_000, pad_id=0)
    other, other_after = step_values(critic, rows[::-1], cut[::-1], max_tokens=max_tokens, pad_id=pad_id)
    for one, two in zip(usual, other[::-1], strict=True):
        assert_allclose(one, two, atol=1e-5)
    assert_allclose(usual_after, other_after[::-1], atol=1e-5)
    assert [bool(x) for x in usual_after[:, 0] != 0] == cut, "only those that were cut off have a value after them"


def test_a_fresh_critic_says_zero(policy: Policy):
    for trunk in ("own", "shared"):
        values, after = step_values(make_critic(policy, trunk), [row_of(played(0, 3))], [True], max_tokens=99, pad_id=0)
        assert not values[0].any()
        assert not after.any()


# ------------------------------------------------------------------------- who learns from its loss


@pytest.mark.parametrize("trunk", ["own", "shared"])
def test_the_value_losss_gradient_does_not_reach_the_policy(policy: Policy, trunk):
    critic = noisy_critic(policy, trunk)
    token_values(critic, pack([row_of(played(0, 3, 2))], pad_id=0)).square().sum().backward()
    assert all(p.grad is None for p in policy.model.parameters())
    assert all(p.grad is not None for p in critic.head.parameters())
    if trunk == "own":
        assert any(p.grad is not None for p in critic.trunk.get_decoder().parameters())


def valued_rows(policy: Policy, critic: Critic, targets: list[float]) -> list[tuple[int, Row]]:
    """A rollout of three tokens for each target, in groups of their own, each after its own prompt."""
    rollouts = [played(i, 3, prompt=5 + i) for i in range(len(targets))]
    rows = [row_of(r) for r in rollouts]
    values, _ = step_values(critic, rows, [False] * len(rows), max_tokens=1000, pad_id=0)
    return [
        (
            i,
            dataclasses.replace(
                row,
                advantages=on_sampled(row, np.full(3, target)),
                values=on_sampled(row, own),
                returns=on_sampled(row, np.full((3, 1), target), fill=np.nan),
            ),
        )
        for i, (row, own, target) in enumerate(zip(rows, values, targets, strict=True))
    ]


def test_the_critic_learns_what_returns_depend_on(policy: Policy):
    critic = make_critic(policy, "own", learning_rate=3e-3)
    targets = [0.0, 1.0, 2.0, 0.5]
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=1e-3)
    config = TrainConfig(
        estimator="mt-ppo", critic_learning_rate=3e-3, critic_warmup_steps=60, warmup_steps=0, minibatches=1
    )
    before, explained = weights(policy.model), []
    for step in range(60):
        rows = valued_rows(policy, critic, targets)
        values = np.concatenate([row.values[row.action, 0] for _, row in rows if row.values is not None])
        explained.append(1 - np.var(np.repeat(targets, 3) - values) / np.var(np.repeat(targets, 3)))
        found = update(policy, optimizer, rows, config, step, critic=critic)
    assert explained[0] == 0
    assert explained[-1] > 0.8
    assert same(before, policy.model.state_dict()), "in its warm-up the critic learns alone"
    assert "grad_norm" not in found
    assert found["value_loss"] < 0.05
    found = update(policy, optimizer, valued_rows(policy, critic, targets), config, 60, critic=critic)
    assert found["grad_norm"] > 0
    assert not same(before, policy.model.state_dict())


def test_the_critic_changes_nothing_of_the_policys_step(bpe_chat):
    """With the same rows, the policy moves alike with either critic and with none."""
    moved = []
    for trunk in (None, "own", "shared"):
        policy = tiny_policy(bpe_chat, seed=0, hidden=16, layers=2)
        critic = noisy_critic(policy, trunk or "own")
        rows = valued_rows(policy, critic, [1.0, -1.0])
        optimizer = torch.optim.AdamW(policy.model.parameters(), lr=1e-2)
        config = TrainConfig(warmup_steps=0, minibatches=2)
        update(policy, optimizer, rows, config, 0, critic=critic if trunk else None)
        moved.append(weights(policy.model))
    assert_close(moved[1], moved[0])
    assert_close(moved[2], moved[0])


def test_a_clipped_value_stands_still_and_is_counted(policy: Policy):
    critic = make_critic(policy, "shared")
    rows = valued_rows(policy, critic, [3.0])
    row = rows[0][1]
    assert row.values is not None
    far = [(0, dataclasses.replace(row, values=row.values - 1))]  # values have moved by 1 since, towards 3
    found = update(
        policy, torch.optim.AdamW(policy.model.parameters(), lr=0.0), far, TrainConfig(value_clip=0.5), 0, critic=critic
    )
    assert found["value_clip_fraction"] == 1
    assert found["value_grad_norm"] == 0
    assert found["value_loss"] == pytest.approx((-0.5 - 3) ** 2 / 2)


def test_a_value_gradient_that_is_not_finite_is_no_step_of_policy_or_critic(policy: Policy):
    critic = make_critic(policy, "own")
    rows = valued_rows(policy, critic, [float("inf")])
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=0.0)
    config = TrainConfig(estimator="mt-ppo", critic_warmup_steps=1)
    before = [weight.clone() for weight in critic.parameters]
    told = []
    found = update(policy, optimizer, rows, config, 0, critic=critic, skipped=told.append)
    assert found["skipped_steps"] == len(told) == config.passes  # one group makes one minibatch
    assert all(skipped is not None for skipped in told)
    assert all(torch.equal(old, new) for old, new in zip(before, critic.parameters, strict=True))


# ------------------------------------------------------------------------- values and the table


def test_what_a_token_budget_cut_off_goes_on_with_its_value_and_is_not_paid():
    # two tokens with values 1 and 2, outcome 5 as scored, 4 the value of the last state. γ = λ = 1:
    #   answered or out of turns   5 − 1, 5 − 2
    #   out of tokens              4 − 1, 4 − 2: the outcome of a rollout that was cut off is unknown
    values = np.array([[1.0], [2.0]])
    config = TrainConfig(estimator="mt-ppo", whiten=False)
    for stop, after, expected in (("answer", 0.0, [4, 3]), ("max_turns", 0.0, [4, 3]), ("max_tokens", 4.0, [3, 2])):
        table = critic_table([played(0, 2, stop=stop, outcome=5.0)], [values], np.array([[after]]))
        assert_allclose(critic_credit(config, table, values).advantages, expected)


def test_only_what_a_token_budget_cut_off_asks_for_its_last_value(policy: Policy):
    critic = noisy_critic(policy)
    stops = ("answer", "no_action", "max_turns", "max_tokens")
    rollouts = [played(0, 3, stop=stop, outcome=1.0) for stop in stops]
    found = credit_rollouts(rollouts, TrainConfig(estimator="turn-ppo"), critic)
    assert found.table.bootstrap is not None
    assert [bool(x) for x in found.table.bootstrap != 0] == [False, False, False, True]
    assert_allclose(found.table.outcome_reward(), [1, 1, 1, 0])
    assert found.metrics["bootstrapped"] == 0.25


def two_rollouts() -> tuple[list[Rollout], list[np.ndarray]]:
    """Turns of 2 and 1 tokens, turn reward 4 and outcome 2, then a turn of one token with outcome 1; two heads."""
    one = dataclasses.replace(played(0, 2, 1, outcome=2.0), turn_rewards=({"found": 4.0}, {}))
    values = [np.array([[2.0, 3.0], [1.0, 9.0], [3.0, 1.0]]), np.array([[0.5, 0.5]])]
    return [one, played(1, 1, outcome=1.0)], values


@pytest.mark.parametrize(
    ("estimator", "advantages"),
    [
        ("ppo-or", [0, 1, -1, 0.5]),  # returns 2 2 2 1
        ("ppo-mr", [4, 5, 3, 0.5]),  # 6 6 6 1
        ("mt-ppo", [4, 5, -1, 0.5]),  # 6 6 2 1
        ("mt-ppo-paid-at-end", [4, 5, 3, 0.5]),
    ],
)
def test_token_methods_give_each_token_its_own(estimator: str, advantages: list[float]):
    rollouts, values = two_rollouts()
    table = critic_table(rollouts, values, np.zeros((2, 2)))
    first_head = np.concatenate(values)[:, :1]
    found = critic_credit(TrainConfig(estimator=estimator, whiten=False), table, first_head)
    assert_allclose(found.advantages, advantages)
    assert_allclose(found.returns[:, 0], advantages + first_head[:, 0])
    assert_allclose(found.turns.advantages, [np.mean(advantages[:2]), *advantages[2:]])
    assert_allclose(found.turns.streams["value"].baseline, [2, 3, 0.5])  # at the turns' first tokens
    white = critic_credit(TrainConfig(estimator=estimator), table, first_head).advantages
    assert_allclose(white, (advantages - np.mean(advantages)) / np.std(advantages, ddof=1), rtol=1e-6)


def test_turn_methods_learn_values_at_the_turns_first_tokens():
    rollouts, values = two_rollouts()
    first_head = [own[:, :1] for own in values]
    table = critic_table(rollouts, first_head, np.zeros((2, 1)))
    config = TrainConfig(estimator="turn-ppo", gamma=0.5, lam=1.0)
    found = critic_credit(config, table, np.concatenate(first_head))
    # returns 4 + ½ · 2 = 5, 2 and 1; values 2, 3 and ½
    assert_allclose(found.advantages, [3, 3, -1, 0.5])
    assert_allclose(found.returns[:, 0], [5, np.nan, 2, 1])


def test_vetta_learns_turn_values_with_a_second_head():
    rollouts, values = two_rollouts()
    table = critic_table(rollouts, values, np.zeros((2, 2)))
    found = critic_credit(TrainConfig(estimator="vetta", gamma=0.5, lam=1.0), table, np.concatenate(values))
    assert_allclose(found.returns[:, 0], [6, 6, 2, 1])  # tokens, undiscounted
    assert_allclose(found.returns[:, 1], [5, np.nan, 2, 1])  # turns


def test_explained_variance_is_that_of_the_values_before_the_update():
    # returns 6 6 2 1, values 2 1 3 ½: differences 4 5 −1 ½
    rollouts, values = two_rollouts()
    first_head = [own[:, :1] for own in values]
    table = critic_table(rollouts, first_head, np.zeros((2, 1)))
    found = critic_credit(TrainConfig(estimator="mt-ppo"), table, np.concatenate(first_head)).metrics
    assert found["explained_variance"] == pytest.approx(1 - np.var([4, 5, -1, 0.5]) / np.var([6, 6, 2, 1]))
    assert found["mean_value"] == pytest.approx(6.5 / 4)
    alike = critic_table([played(0, 2, outcome=1.0)], [np.ones((2, 1))], np.zeros((1, 1)))
    assert "explained_variance" not in critic_credit(TrainConfig(estimator="mt-ppo"), alike, np.ones((2, 1))).metrics


@pytest.mark.parametrize("estimator", CRITIC_METHODS)
def test_the_methods_discounts_are_their_papers_and_can_be_given(estimator: str):
    rollouts, values = two_rollouts()
    own = {"turn-ppo": (0.99, 0.9), "step-ppo": (0.99, 1.0), "bi-level-gae": (0.95, 1.0), "vetta": (0.95, 0.95)}
    gamma, lam = own.get(estimator, (1.0, 1.0))
    table = critic_table(rollouts, values, np.zeros((2, 2)))

    def found(**options: float) -> np.ndarray:
        config = TrainConfig(estimator=estimator, whiten=False, **options)
        return critic_credit(config, table, np.concatenate(values)).advantages

    assert_allclose(found(), found(gamma=gamma, lam=lam), rtol=0, atol=0)
    assert not np.allclose(found(), found(gamma=0.3))
    assert not np.allclose(found(), found(lam=0.3))


# ------------------------------------------------------------------------------------ checkpoints


@pytest.mark.parametrize("trunk", ["own", "shared"])
def test_a_checkpoint_brings_back_the_critic_and_its_optimiser(policy: Policy, tmp_path, trunk):
    critic = noisy_critic(policy, trunk)
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=0.0)
    config = TrainConfig(warmup_steps=0)
    update(policy, optimizer, valued_rows(policy, critic, [1.0, 2.0]), config, 0, critic=critic)
    folder = save_checkpoint(tmp_path, 1, policy, optimizer, {}, critic)
    again = make_critic(policy, trunk)
    load_critic(again, folder)
    assert critic.state().keys() == again.state().keys()
    assert same(critic.state(), again.state())
    before, after = (c.optimizer.state_dict()["state"] for c in (critic, again))
    assert all(torch.equal(before[i][name], after[i][name]) for i in before for name in before[i])
    (folder / "critic.safetensors").write_bytes(b"torn")
    with pytest.raises(RunError, match="must hold the critic"):
        load_critic(again, folder)


@pytest.mark.parametrize(("method", "exact", "after"), [("mt-ppo", [0.8, 0.5, 0.5], 0.5), ("ppo-mr", [0.8] * 3, 0.8)])
def test_a_cut_rollout_is_paid_once_wherever_rewards_are_paid(method: str, exact: list[float], after: float):
    """Turn 1 of one token earned .3; turn 2 was cut after two, with .5 still to come.

    Exact values are what is still to be paid: .3 + .5 before turn 1, and after it .5 where .3 has been paid, .8 where
    all is paid at the end. With them every advantage is 0. The outcome, and what a judge says of the turn that was cut,
    are not paid.
    """
    cut = dataclasses.replace(
        played(0, 1, 2, stop="max_tokens", outcome=-1.0), turn_rewards=({"found": 0.3}, {"judge_turn": -1.0})
    )
    values = np.array(exact)[:, None]
    table = critic_table([cut], [values], np.array([[after]]), at_end=method == "ppo-mr")
    credit = critic_credit(TrainConfig(estimator=method, whiten=False), table, values)
    assert_allclose(credit.advantages, 0, atol=1e-12)
