"""Turn credit inside verl: advantage estimators `turnwise/...` for its registry, over its batch as it is.

verl calls an estimator on the driver with the whole batch: a reward per token, the mask of sampled tokens and each
row's group. Our agent loops (`verl_loops`) pay every turn on its last sampled token; here the payments are read back,
credited, and spread over the turns' tokens. Importing this needs neither verl nor torch; `verl_plugin` registers.
"""

from functools import partial
from typing import Any

from turnwise.adapters.dense import OFFERED, PREFIX, array, dense_credit, entry, estimator_options, laid_beside
from turnwise.adapters.rows import WITH_CRITIC, check_estimator
from turnwise.credit import NEEDS, ONE_PER_ROLLOUT
from turnwise.errors import ConfigError, InputError

BY_SEQUENCE = ("gspo", "geo_mean")
"""verl's losses with one ratio per rollout, whose gradient is the same at all of its tokens."""
TRAINER = "turnwise.adapters.verl_trainer"
"""The module with a trainer that hands estimators more than verl does."""
MODE = "turnwise"
"""That trainer's name in verl's configuration."""


def register() -> tuple[str, ...]:
    """Puts the estimators into verl's registry, and returns their names there."""
    from verl.trainer.ppo.core_algos import (  # pyright: ignore[reportMissingImports]
        ADV_ESTIMATOR_REGISTRY,
        register_adv_est,
    )

    for name in OFFERED:
        if PREFIX + name not in ADV_ESTIMATOR_REGISTRY:
            register_adv_est(PREFIX + name)(partial(estimate, name))
    return tuple(PREFIX + name for name in OFFERED)


def estimate(
    estimator: str, token_level_rewards: Any, response_mask: Any, config: Any = None, index: Any = None, **_: Any
) -> tuple[Any, Any]:
    """Advantages and returns (B, T) of verl's batch, as tensors like `token_level_rewards`.

    Options, those of `dense_credit`, are `algorithm.turnwise` of verl's configuration. Raises ConfigError for a
    configuration that would distort turn credit, InputError for a batch that does not suit.
    """
    given = laid_beside()
    for refusal in refusals(config, estimator, has_values=given.values is not None, has_ids=given.anchors is not None):
        raise ConfigError(refusal)
    if index is None:
        raise InputError("verl's batch must have `uid`, which says what rows are a group; got none; set it per prompt")
    advantages, returns = dense_credit(
        estimator,
        array(token_level_rewards),
        array(response_mask),
        [str(group) for group in index],
        estimator_options(config),
        given,
    )
    return token_level_rewards.new_tensor(advantages), token_level_rewards.new_tensor(returns)


def refusals(config: Any, estimator: str, *, has_values: bool = False, has_ids: bool = False) -> list[str]:
    """Why the estimator cannot give turn credit under `algorithm`; empty where it can. What it lacks comes first."""
    found = []
    name, trainer = PREFIX + estimator, f"trainer.v1.trainer_mode={MODE} and VERL_USE_EXTERNAL_MODULES=" + TRAINER
    if "anchor" in NEEDS.get(estimator, ()) and not has_ids:
        found.append(
            f"{name} must see what the environment said, and verl hands its estimators no tokens; take {trainer}"
        )
    if estimator in WITH_CRITIC and not has_values:
        same = "; algorithm.adv_estimator=gae with our agent loop is the same method" if estimator == "mt-ppo" else ""
        found.append(
            f"{name} must see the critic's values, and verl hands them to its own gae alone; take {trainer} and "
            f"critic.enable=True{same}"
        )
    if not found:
        options = {key: value for key, value in estimator_options(config).items() if key != "log"}
        try:
            check_estimator(estimator, options, critic=has_values)
        except ConfigError as error:
            found.append(f"algorithm.turnwise: {error}")
    if entry(config, "use_kl_in_reward", False):
        found.append(
            "algorithm.use_kl_in_reward must be False: it mixes a penalty per token into the rewards, from which turn "
            "rewards cannot be told again; take actor_rollout_ref.actor.use_kl_loss=True"
        )
    correction = entry(config, "rollout_correction")
    rejected = str(entry(correction, "rollout_rs", ""))
    if "token_" in rejected:
        found.append(
            f"algorithm.rollout_correction.rollout_rs must not reject single tokens; got {rejected!r}: holes in the "
            "mask would split turns; take seq_mean_k1"
        )
    if entry(correction, "rollout_is", "") == "sequence" and estimator not in ONE_PER_ROLLOUT:
        found.append(
            "algorithm.rollout_correction.rollout_is must be 'token' or null; got 'sequence': one weight over all "
            "turns of a rollout, so that one turn's mismatch rescales the others' credit; set it to 'token'"
        )
    return found


def loop_refusals(config: Any) -> list[str]:
    """Why a whole configuration of verl cannot carry turn credit through our agent loops; empty where it can."""
    algorithm, found = entry(config, "algorithm"), []
    name = str(entry(algorithm, "adv_estimator", ""))
    estimator = name.removeprefix(PREFIX)
    ours = name.startswith(PREFIX)
    if ours and estimator not in OFFERED:
        found.append(f"algorithm.adv_estimator must be one of {', '.join(PREFIX + each for each in OFFERED)}")
    elif ours:
        v1 = entry(config, "trainer.v1")
        by_trainer = entry(v1, "trainer_mode") == MODE or bool(entry(v1, MODE, False))
        critic = bool(entry(config, "critic.enable", False))
        found += refusals(algorithm, estimator, has_values=by_trainer and critic, has_ids=by_trainer)
    if not entry(config, "trainer.use_v1", True):
        found.append(
            "trainer.use_v1 must be True: the old trainer keeps one number per rollout, on its last token; leave it out"
        )
    loss = str(entry(config, "actor_rollout_ref.actor.policy_loss.loss_mode", "vanilla"))
    if loss in BY_SEQUENCE and estimator not in ONE_PER_ROLLOUT:
        found.append(
            f"actor_rollout_ref.actor.policy_loss.loss_mode must have a ratio per token; got {loss!r}: one ratio per "
            "rollout has the same gradient at all of its tokens, so that only the sum over turns counts; take 'vanilla'"
        )
    judge = entry(config, "reward.reward_model")
    if entry(judge, "enable", False) and not entry(judge, "enable_resource_pool", False):
        found.append(
            "reward.reward_model must have a resource pool of its own: one that shares the trainer's replaces all "
            "rewards of a rollout by its own, after the agent loop; set reward.reward_model.enable_resource_pool=True"
        )
    return found
