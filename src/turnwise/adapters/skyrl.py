"""Turn credit inside SkyRL: advantage estimators `turnwise/...` for its registry, and what its trainer must add.

SkyRL's environments return a reward per step, which its generator puts on the last token of that step's turn. But the
mask that it hands to estimators is 1 on all tokens after the prompt, what the environment said included: turns are in
`loss_mask`, which `TurnCredit` lays beside. Importing this needs neither SkyRL nor torch; `skyrl_trainer` does.
"""

from functools import partial
from typing import Any

import numpy as np

from turnwise.adapters.dense import (
    OFFERED,
    PREFIX,
    Beside,
    array,
    beside,
    dense_credit,
    entry,
    estimator_options,
    laid_beside,
)
from turnwise.adapters.rows import WITH_CRITIC, batch_turn_ids, check_estimator, observation_anchors
from turnwise.credit import NEEDS, ONE_PER_ROLLOUT
from turnwise.errors import ConfigError, InputError

METRICS = "turn_credit/"
MAIN = "turnwise.adapters.skyrl_trainer"
"""The module with SkyRL's trainer and entry point that hand estimators the turns."""


def register() -> tuple[str, ...]:
    """Puts the estimators into SkyRL's registry, and returns their names there."""
    from skyrl.backends.skyrl_train.utils.ppo_utils import (  # pyright: ignore[reportMissingImports]
        AdvantageEstimatorRegistry,
    )

    known = set(AdvantageEstimatorRegistry.list_available())
    for name in OFFERED:
        if PREFIX + name not in known:
            AdvantageEstimatorRegistry.register(PREFIX + name, partial(estimate, name))
    return tuple(PREFIX + name for name in OFFERED)


def estimate(
    estimator: str, token_level_rewards: Any, response_mask: Any, index: Any, config: Any = None, **_: Any
) -> tuple[Any, Any]:
    """Advantages and returns (B, T) of SkyRL's batch, as tensors like `token_level_rewards`.

    Options, those of `dense_credit`, are `trainer.algorithm.turnwise` of SkyRL's configuration. Raises ConfigError
    where the trainer does not say what the policy sampled, InputError for a batch that does not suit.
    """
    given = laid_beside()
    if given.action is None:
        raise ConfigError(
            f"{PREFIX}{estimator} must see what the policy sampled, and SkyRL's own trainer hands it a mask that is 1 "
            f"on the environment's tokens too: every rollout would be one turn; take "
            f"trainer.override_entrypoint={MAIN}, or put TurnCredit before your trainer's class"
        )
    advantages, returns = dense_credit(
        estimator, array(token_level_rewards), given.action, list(index), estimator_options(config), given
    )
    return token_level_rewards.new_tensor(advantages), token_level_rewards.new_tensor(returns)


def refusals(cfg: Any) -> list[str]:
    """Why a whole configuration of SkyRL would delete or distort turn credit; empty where it would not."""
    algorithm, generator = entry(cfg, "trainer.algorithm"), entry(cfg, "generator")
    name = str(entry(algorithm, "advantage_estimator", ""))
    if not name.startswith(PREFIX):
        return []
    estimator = name.removeprefix(PREFIX)
    if estimator not in OFFERED:
        return [
            f"trainer.algorithm.advantage_estimator must be one of {', '.join(PREFIX + each for each in OFFERED)}; got "
            f"{name}"
        ]
    found = _estimator_refusals(cfg, estimator)
    if entry(algorithm, "use_kl_in_reward", False):
        found.append(
            "trainer.algorithm.use_kl_in_reward must be false: it mixes a penalty per token into the rewards, from "
            "which turn rewards cannot be told again; take trainer.algorithm.use_kl_loss=true"
        )
    if entry(generator, "step_wise_trajectories", False):
        found.append(
            "generator.step_wise_trajectories must be false: estimators are shown the last steps alone, and what they "
            "find there is spread over all steps of a rollout; leave it out"
        )
    return found + ([] if estimator in ONE_PER_ROLLOUT else _turn_refusals(algorithm, generator, estimator))


def _estimator_refusals(cfg: Any, estimator: str) -> list[str]:
    """What the estimator lacks, or does not take."""
    critic = entry(cfg, "trainer.critic.model.path") is not None
    if estimator in WITH_CRITIC and not critic:
        return [
            f"{PREFIX}{estimator} must see a critic's values, and there is no critic; set trainer.critic.model.path, "
            "or take another estimator"
        ]
    options = {key: x for key, x in estimator_options(entry(cfg, "trainer.algorithm")).items() if key != "log"}
    try:
        check_estimator(estimator, options, critic=critic)
    except ConfigError as error:
        return [f"trainer.algorithm.turnwise: {error}"]
    return []


def _turn_refusals(algorithm: Any, generator: Any, estimator: str) -> list[str]:
    """What a credit by rollout would bear, and one by turn does not."""
    found = []
    if entry(generator, "chat_template.name_or_path") is not None:
        found.append(
            "generator.chat_template.name_or_path must not be set: with a template of its own SkyRL's generator keeps "
            "the last turn's reward alone; give the template with the tokenizer"
        )
    if entry(generator, "batched", False):
        found.append(
            f"generator.batched must be false: it plays one turn, and {estimator} is credit by turn; leave it out"
        )
    if entry(generator, "zero_reward_on_non_stop", False):
        found.append(
            "generator.zero_reward_on_non_stop must be false: a rollout that was cut off would lose what its turns "
            "before had earned; take generator.apply_overlong_filtering=true, which leaves it out of the group"
        )
    if entry(algorithm, "advantage_batch_normalize", False):
        found.append(
            "trainer.algorithm.advantage_batch_normalize must be false: it takes one number from all tokens, so that "
            "turns without credit get some; reinforce++ among the estimators normalises over the batch"
        )
    if entry(algorithm, "dynamic_sampling.type") is not None:
        found.append(
            "trainer.algorithm.dynamic_sampling.type must be null: it drops or replaces groups whose rollouts have "
            "equal sums, though their turns differ; leave it out"
        )
    if entry(algorithm, "zero_variance_filter", False):
        found.append(
            "trainer.algorithm.zero_variance_filter must be false: it masks groups whose rollouts have equal sums, "
            "though their turns differ; leave it out"
        )
    if entry(algorithm, "off_policy_correction.tis_ratio_type") == "sequence":
        found.append(
            "trainer.algorithm.off_policy_correction.tis_ratio_type must be 'token' or null; got 'sequence': one "
            "weight over all turns of a rollout, so that one turn's mismatch rescales the others' credit; take 'token'"
        )
    return found


def check(cfg: Any) -> None:
    """ConfigError for what would delete or distort turn credit, with the reason."""
    for refusal in refusals(cfg):
        raise ConfigError(refusal)


class TurnCredit:
    """What SkyRL's trainers must add, to stand before one of them: `class Mine(TurnCredit, RayPPOTrainer)`.

    With an estimator of SkyRL's own it changes nothing. ConfigError for what would delete or distort turn credit.
    """

    cfg: Any
    all_metrics: dict[str, Any]

    def __init__(self, cfg: Any, *args: Any, **options: Any) -> None:
        check(cfg)
        parent: Any = super()
        parent.__init__(cfg, *args, **options)

    def _turn_estimator(self) -> str | None:
        """The name of ours that is configured; None where it is not one of ours."""
        name = str(self.cfg.trainer.algorithm.advantage_estimator)
        return name.removeprefix(PREFIX) if name.startswith(PREFIX) else None

    def postprocess_generator_output(self, generator_output: Any, *args: Any, **options: Any) -> Any:
        """SkyRL's rewards per token; InputError where a generator gave one number per rollout."""
        estimator, rewards = self._turn_estimator(), generator_output["rewards"]
        parent: Any = super()
        if estimator is not None and estimator not in ONE_PER_ROLLOUT:
            for row in rewards:
                if not isinstance(row, list):
                    raise InputError(
                        f"a generator must give rewards as a list per rollout, one number per token; got {row!r}, the "
                        f"rollout's sum, in which {estimator} finds no turns; put each turn's on its last token"
                    )
        return parent.postprocess_generator_output(generator_output, *args, **options)

    def compute_advantages_and_returns(self, data: Any) -> Any:
        """SkyRL's method, whose estimator finds the turns beside what it is handed."""
        estimator = self._turn_estimator()
        parent: Any = super()
        if estimator is None:
            return parent.compute_advantages_and_returns(data)
        with beside(what_else(data, estimator)) as given:
            data = parent.compute_advantages_and_returns(data)
        self.all_metrics.update({METRICS + key: value for key, value in given.metrics.items()})
        return data


def what_else(data: Any, estimator: str) -> Beside:
    """What SkyRL's batch holds beside rewards and its mask, as the estimator takes it."""
    action = array(data["loss_mask"])
    given = Beside(action=action)
    if estimator in WITH_CRITIC:
        given.values = array(data["values"])
    if "anchor" in NEEDS.get(estimator, ()):
        sequences, attention = data["sequences"].cpu().numpy(), data["attention_mask"].cpu().numpy() > 0
        present = data["response_mask"].cpu().numpy()
        # The response is at the end of each sequence, and the prompt before it; both stand right.
        prompts: list[np.ndarray] = [
            row[there][: there.sum() - int(after.sum())]
            for row, there, after in zip(sequences, attention, present, strict=True)
        ]
        ids = sequences[:, sequences.shape[1] - present.shape[1] :]
        given.anchors = observation_anchors(batch_turn_ids(action), ids, present, [p.tolist() for p in prompts])
    return given
