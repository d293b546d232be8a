"""Turn credit inside verl: advantage estimators `turnwise/...` for its registry, over its batch as it is.

verl calls an estimator on the driver with the whole batch: a reward per token, the mask of sampled tokens and each
row's group. Our agent loops (`verl_loops`) pay every turn on its last sampled token; here the payments are read back,
credited, and spread over the turns' tokens. Importing this needs neither verl nor torch; `verl_plugin` registers.
"""

import contextlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from turnwise.adapters.rows import (
    WITH_CRITIC,
    WITHOUT_CRITIC,
    RowCredit,
    batch_turn_ids,
    check_estimator,
    credit_rows,
    dense_rewards,
    row_credit,
    token_advantages,
)
from turnwise.credit import NEEDS, ONE_PER_ROLLOUT
from turnwise.errors import ConfigError, InputError

PREFIX = "turnwise/"
"""What the estimators' names begin with in verl's registry."""
OFFERED = (*WITHOUT_CRITIC, *(name for name in WITH_CRITIC if name not in ("vetta", "vineppo")))
"""The estimators in the registry: vetta has two heads where verl's critic has one, vineppo branches."""
BY_SEQUENCE = ("gspo", "geo_mean")
"""verl's losses with one ratio per rollout, whose gradient is the same at all of its tokens."""
TRAINER = "turnwise.adapters.verl_trainer"
"""The module with a trainer that hands estimators more than verl does."""
MODE = "turnwise"
"""That trainer's name in verl's configuration."""


@dataclass
class Beside:
    """What verl does not hand to estimators; `verl_trainer` fetches it. None: what the rewards and the mask say."""

    values: np.ndarray | None = None
    anchors: Sequence[Any] | None = None
    turn_ids: list[list[int]] | None = None
    turn_rewards: list[list[Mapping[str, float]]] | None = None
    outcome_rewards: list[Mapping[str, float]] | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    """What the estimator found, for whoever asked."""


_beside = Beside()


@contextlib.contextmanager
def beside(given: Beside) -> Iterator[Beside]:
    """Hands `given` to the estimator that verl calls within."""
    global _beside
    before, _beside = _beside, given
    try:
        yield given
    finally:
        _beside = before


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

    Options are `algorithm.turnwise` of verl's configuration: the estimator's own, and `log`, a file to which every
    call appends a line with what `RowCredit.metrics` says and the seconds it took. Raises ConfigError for a
    configuration that would distort turn credit, InputError for a batch that does not suit.
    """
    began, given = time.perf_counter(), _beside
    options = estimator_options(config)
    log = options.pop("log", None)
    for refusal in refusals(config, estimator, has_values=given.values is not None, has_ids=given.anchors is not None):
        raise ConfigError(refusal)
    if index is None:
        raise InputError("verl's batch must have `uid`, which says what rows are a group; got none; set it per prompt")
    rewards, action = _array(token_level_rewards), _array(response_mask)
    turn_ids = batch_turn_ids(action, given.turn_ids)
    turns, outcomes = dense_rewards(turn_ids, rewards)
    rows = credit_rows(
        turn_ids,
        [str(group) for group in index],
        given.turn_rewards if given.turn_rewards is not None else turns,
        given.outcome_rewards if given.outcome_rewards is not None else outcomes,
        anchors=given.anchors,
        values=given.values,
    )
    credit = row_credit(rows, estimator, options)
    advantages = token_advantages(turn_ids, credit.tokens)
    returns = advantages if given.values is None else _returns(turn_ids, credit, given.values)
    given.metrics = {**credit.metrics(), "seconds": time.perf_counter() - began}
    if log:
        with Path(log).open("a", encoding="utf-8") as lines:
            lines.write(json.dumps({"estimator": estimator, "rows": len(rows), **given.metrics}) + "\n")
    return token_level_rewards.new_tensor(advantages), token_level_rewards.new_tensor(returns)


def _array(tensor: Any) -> np.ndarray:
    return tensor.detach().cpu().double().numpy()


def _returns(turn_ids: np.ndarray, credit: RowCredit, values: np.ndarray) -> np.ndarray:
    """What verl's critic is to learn: the targets, and its own values where a method has none."""
    if credit.returns is None:
        return values
    known = token_advantages(turn_ids, [(~np.isnan(row)).astype(float) for row in credit.returns])
    targets = token_advantages(turn_ids, [np.nan_to_num(row) for row in credit.returns])
    return np.where(known > 0, targets, values)


def estimator_options(config: Any) -> dict[str, Any]:
    """`algorithm.turnwise` as a plain dict; empty where there is none."""
    node = _get(config, "turnwise") or {}
    return {str(key): dict(value) if isinstance(value, Mapping) else value for key, value in node.items()}


def _get(config: Any, name: str, default: Any = None) -> Any:
    """An entry of a node of verl's configuration, which is a DictConfig, a dataclass, a dict or None."""
    if config is None:
        return default
    if hasattr(config, "get"):
        found = config.get(name, default)
        return default if found is None else found
    return getattr(config, name, default)


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
    if _get(config, "use_kl_in_reward", False):
        found.append(
            "algorithm.use_kl_in_reward must be False: it mixes a penalty per token into the rewards, from which turn "
            "rewards cannot be told again; take actor_rollout_ref.actor.use_kl_loss=True"
        )
    correction = _get(config, "rollout_correction")
    rejected = str(_get(correction, "rollout_rs", ""))
    if "token_" in rejected:
        found.append(
            f"algorithm.rollout_correction.rollout_rs must not reject single tokens; got {rejected!r}: holes in the "
            "mask would split turns; take seq_mean_k1"
        )
    if _get(correction, "rollout_is", "") == "sequence" and estimator not in ONE_PER_ROLLOUT:
        found.append(
            "algorithm.rollout_correction.rollout_is must be 'token' or null; got 'sequence': one weight over all "
            "turns of a rollout, so that one turn's mismatch rescales the others' credit; set it to 'token'"
        )
    return found


def loop_refusals(config: Any) -> list[str]:
    """Why a whole configuration of verl cannot carry turn credit through our agent loops; empty where it can."""
    algorithm, found = _get(config, "algorithm"), []
    name = str(_get(algorithm, "adv_estimator", ""))
    estimator = name.removeprefix(PREFIX)
    ours = name.startswith(PREFIX)
    if ours and estimator not in OFFERED:
        found.append(f"algorithm.adv_estimator must be one of {', '.join(PREFIX + each for each in OFFERED)}")
    elif ours:
        v1 = _get(_get(config, "trainer"), "v1")
        by_trainer = _get(v1, "trainer_mode") == MODE or bool(_get(v1, MODE, False))
        critic = bool(_get(_get(config, "critic"), "enable", False))
        found += refusals(algorithm, estimator, has_values=by_trainer and critic, has_ids=by_trainer)
    if not _get(_get(config, "trainer"), "use_v1", True):
        found.append(
            "trainer.use_v1 must be True: the old trainer keeps one number per rollout, on its last token; leave it out"
        )
    loss = str(_get(_get(_get(_get(config, "actor_rollout_ref"), "actor"), "policy_loss"), "loss_mode", "vanilla"))
    if loss in BY_SEQUENCE and estimator not in ONE_PER_ROLLOUT:
        found.append(
            f"actor_rollout_ref.actor.policy_loss.loss_mode must have a ratio per token; got {loss!r}: one ratio per "
            "rollout has the same gradient at all of its tokens, so that only the sum over turns counts; take 'vanilla'"
        )
    judge = _get(_get(config, "reward"), "reward_model")
    if _get(judge, "enable", False) and not _get(judge, "enable_resource_pool", False):
        found.append(
            "reward.reward_model must have a resource pool of its own: one that shares the trainer's replaces all "
            "rewards of a rollout by its own, after the agent loop; set reward.reward_model.enable_resource_pool=True"
        )
    return found
