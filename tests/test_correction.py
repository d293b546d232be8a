"""The correction for a sampler that differs from the trainer."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose

from turnwise.batch import Row, rollout_row
from turnwise.config import TrainConfig
from turnwise.correction import corrected, sampler_weights, trainer_logprobs
from turnwise.errors import ConfigError
from turnwise.learning import update
from turnwise.policy import Policy, load_policy
from turnwise.types import Action, Rollout, Turn

LN2 = np.log(2)


def test_weights_are_the_ratio_up_to_the_cap():
    # trainer / sampler = 1, 2, 1/2, 8, 1/8
    trainer, sampler = np.array([-1, -1, -1 - LN2, -1, -1 - 3 * LN2]), np.array([-1, -1 - LN2, -1, -1 - 3 * LN2, -1])
    assert_allclose(sampler_weights(trainer, sampler, cap=4, kind="truncate"), [1, 2, 0.5, 4, 0.125])
    assert_allclose(sampler_weights(trainer, sampler, cap=4, kind="mask"), [1, 2, 0.5, 0, 0])


TRAINER, SAMPLER = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.3, 0.5])
ADVANTAGES = np.array([1.0, -2.0, 0.5])


def expected_gradient(p: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """E under p of w A times the gradient of the trainer's log-probability in its logits: every token counted."""
    scores = np.eye(3) - TRAINER
    return np.sum((p * weights * ADVANTAGES)[:, None] * scores, axis=0)


def test_with_room_under_the_cap_the_gradient_is_that_of_the_trainers_own_samples():
    # ratios 2.5, 1, 0.4
    own = expected_gradient(TRAINER, np.ones(3))
    for kind in ("truncate", "mask"):
        weights = sampler_weights(np.log(TRAINER), np.log(SAMPLER), cap=2.6, kind=kind)
        assert_allclose(expected_gradient(SAMPLER, weights), own, atol=1e-12)
    assert np.abs(expected_gradient(SAMPLER, np.ones(3)) - own).max() > 0.1, "without weights it is another one"


def test_a_cap_that_holds_biases_by_what_it_cuts_off():
    # the first token's ratio 2.5 counts 2: 0.2 x 0.5 of its gradient is missing
    own = expected_gradient(TRAINER, np.ones(3))
    weights = sampler_weights(np.log(TRAINER), np.log(SAMPLER), cap=2, kind="truncate")
    missing = 0.2 * 0.5 * ADVANTAGES[0] * (np.eye(3)[0] - TRAINER)
    assert_allclose(own - expected_gradient(SAMPLER, weights), missing, atol=1e-12)


def played(policy: Policy, shift: float = 0.0) -> list[tuple[int, Row]]:
    """Four rows of random tokens, sampled with the policy's own log-probabilities and a shift."""
    rng = np.random.default_rng(0)
    rows = []
    for i in range(4):
        ids = [tuple(rng.integers(3, 300, n).tolist()) for n in (4, 2, 3)]
        first, last = (
            Turn(action_ids=own, sampling_logprobs=(0.0,) * len(own), text="", action=Action(), reply_ids=reply)
            for own, reply in ((ids[0], ids[1]), (ids[2], ()))
        )
        rollout = Rollout(task_id="t", group=i // 2, prompt_ids=(5, 6, 7), turns=(first, last), stop="answer")
        rows.append(rollout_row(rollout, [1.0 - i, 0.5 * i], [True, True]))
    own = trainer_logprobs(policy, rows, max_tokens=30)
    for row, logprobs in zip(rows, own, strict=True):
        row.sampling_logprobs[row.action] = logprobs + shift * np.linspace(-1, 1, len(logprobs))
    return [(i // 2, row) for i, row in enumerate(rows)]


def test_a_sampler_that_agrees_changes_nothing(tiny: Policy):
    rows = played(tiny)
    made, metrics = corrected(tiny, rows, TrainConfig(sampler_correction="truncate"))
    for (_, row), (_, same) in zip(rows, made, strict=True):
        assert_allclose(same.advantages, row.advantages, rtol=1e-5)
        assert_allclose(same.sampling_logprobs, row.sampling_logprobs, atol=1e-5)
    assert metrics["sampler_weight"] == pytest.approx(1, abs=1e-5)
    assert (metrics["sampler_capped"], metrics["sampler_kl"]) == (0, pytest.approx(0, abs=1e-6))


def test_a_sampler_that_differs_is_measured_and_weighed(tiny: Policy):
    # shifts of a row's 7 tokens: -1, -2/3, -1/3, 0, 1/3, 2/3, 1; the ratio is exp of their negative, the cap 2 holds e
    rows = played(tiny, shift=1.0)
    made, metrics = corrected(tiny, rows, TrainConfig(sampler_correction="truncate"))
    ratio = np.exp(-np.linspace(-1, 1, 7))
    assert_allclose(metrics["sampler_weight"], np.minimum(ratio, 2).mean(), rtol=1e-4)
    assert metrics["sampler_capped"] == 1 / 7
    assert_allclose(metrics["sampler_kl"], (ratio - 1 - np.log(ratio)).mean(), rtol=1e-4)
    row, changed = rows[1][1], made[1][1]
    assert_allclose(changed.advantages[row.action], row.advantages[row.action] * np.minimum(ratio, 2), rtol=1e-4)
    _, masked = corrected(tiny, rows, TrainConfig(sampler_correction="mask"))
    assert masked["sampler_capped"] == 2 / 7  # e and 1/e


def test_the_clip_is_against_the_trainers_probabilities(checkpoint):
    # the sampler's are off by up to e: against those, the clip would hold tokens at once
    config = TrainConfig(tasks_per_step=2, minibatches=1, warmup_steps=0, sampler_correction="truncate")
    found = {}
    for name in ("corrected", "raw"):
        policy = load_policy(checkpoint)
        rows = played(policy, shift=1.0)
        rows = corrected(policy, rows, config)[0] if name == "corrected" else rows
        found[name] = update(policy, torch.optim.SGD(policy.model.parameters(), lr=0.0), rows, config, 0)
    assert found["corrected"]["clip_fraction"] == 0 < found["raw"]["clip_fraction"]
    assert found["corrected"]["policy_shift"] < 1e-6 < found["raw"]["policy_shift"]


def test_equal_rows_are_computed_once_and_order_does_not_matter(tiny: Policy):
    rows = [row for _, row in played(tiny)]
    found = trainer_logprobs(tiny, [*rows[::-1], replace(rows[0])], max_tokens=10_000)
    assert_allclose(found[0], rows[3].sampling_logprobs[rows[3].action], atol=1e-5)
    assert found[3] is found[4]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampler_correction": "clip"}, "sampler-correction must be a known name; got 'clip'"),
        ({"sampler_cap": 3.0}, "sampler-cap must go with sampler-correction truncate or mask"),
        ({"sampler_correction": "mask", "sampler_cap": 0.5}, r"sampler-cap must be >= 1"),
    ],
)
def test_bad_options_are_refused(options: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        TrainConfig(**options)
