"""A trainer mode for verl, `trainer.v1.trainer_mode=turnwise`: verl's synchronous one, which hands estimators more.

verl gives an estimator rewards and the mask alone. This one also hands over the critic's values, what the environment
said, and rewards by name and turn as `turnwise/environment` recorded them; and it puts what the estimator found beside
verl's metrics. VERL_USE_EXTERNAL_MODULES=turnwise.adapters.verl_trainer registers it. Needs verl.
"""

from typing import Any

import numpy as np
import transfer_queue as tq
from omegaconf import open_dict
from verl.trainer.ppo.v1.trainer_base import register_trainer
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync

from turnwise.adapters.dense import PREFIX, Beside, beside
from turnwise.adapters.rows import batch_turn_ids, observation_anchors
from turnwise.adapters.verl import MODE
from turnwise.credit import NEEDS
from turnwise.errors import InputError

METRICS = "turn_credit/"


@register_trainer(MODE)
class TurnTrainer(PPOTrainerSync):
    """verl's synchronous trainer, with what its estimators cannot see."""

    def __init__(self, config: Any) -> None:
        with open_dict(config):
            config.trainer.v1.trainer_mode = "sync"  # verl picks its replay buffer by this name
            config.trainer.v1[MODE] = True  # for our agent loops, which get this configuration
        super().__init__(config)

    def _compute_advantage(self, batch: Any, metrics: dict[str, Any]) -> Any:
        """verl's advantages; InputError where an agent loop returned several rows per rollout."""
        name = str(self.config.algorithm.adv_estimator)
        if not name.startswith(PREFIX):
            return super()._compute_advantage(batch, metrics)
        check_single_rows(batch.keys)
        fields = ["response_mask", "responses", "prompts", "extra_fields"] + ["values"] * self.use_critic
        data = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=fields)
        with beside(what_else(data, name.removeprefix(PREFIX))) as given:
            batch = super()._compute_advantage(batch, metrics)
        metrics.update({METRICS + key: value for key, value in given.metrics.items()})
        return batch


def check_single_rows(keys: list[str]) -> None:
    """InputError where a rollout has more than one row; verl's keys are GROUP_ROLLOUT_ROW."""
    for key in keys:
        if key.rsplit("_", 1)[-1] not in ("0", key):
            raise InputError(
                f"an agent loop must return one output per rollout; got a second one, {key!r}: its turns would count "
                "as another rollout's; return one, with all turns in its mask"
            )


def what_else(data: Any, estimator: str) -> Beside:
    """What verl's queue holds beside rewards and mask, as the estimator takes it."""
    mask = data["response_mask"].to_padded_tensor(0).numpy()
    given = Beside()
    if "values" in data:
        given.values = data["values"].to_padded_tensor(0.0).double().numpy()
    extra = [_plain(row) for row in list(data["extra_fields"])]
    live = mask.any(1)
    if all("turn_rewards" in row for row, alive in zip(extra, live, strict=True) if alive):
        none: dict[str, Any] = {"turn_ids": [], "turn_rewards": [], "outcome_rewards": {}}
        extra = [row if alive else none for row, alive in zip(extra, live, strict=True)]
        given.turn_ids = [row["turn_ids"] for row in extra]
        given.turn_rewards = [row["turn_rewards"] for row in extra]
        given.outcome_rewards = [row["outcome_rewards"] for row in extra]
    if "anchor" in NEEDS.get(estimator, ()):
        turn_ids = batch_turn_ids(mask, given.turn_ids)
        ids = data["responses"].to_padded_tensor(-1).numpy()
        prompts = [row.tolist() for row in data["prompts"].unbind()]
        given.anchors = observation_anchors(turn_ids, np.maximum(ids, 0), ids >= 0, prompts)
    return given


def _plain(row: Any) -> dict[str, Any]:
    found = getattr(row, "data", row)
    return found if isinstance(found, dict) else {}
