"""Turn credit inside SkyRL: estimators `turnwise/...` for its registry, over its batch as it is.

SkyRL pays an environment's step reward on the turn's last token, and calls an estimator on the driver with the whole
batch. What it hands over as `response_mask` is 1 on everything after the prompt, so that an estimator sees one turn;
`skyrl_trainer` hands over the mask of sampled tokens instead. Importing this needs neither SkyRL nor torch.
"""

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from turnwise.adapters.rows import (
    WITHOUT_CRITIC,
    batch_turn_ids,
    check_estimator,
    credit_rows,
    dense_rewards,
    observation_anchors,
    row_credit,
    token_advantages,
)
from turnwise.errors import ConfigError, unknown_name

PREFIX = "turnwise/"
"""What the estimators' names begin with in SkyRL's registry."""
_texts: tuple[np.ndarray, np.ndarray, Sequence[Sequence[int]]] | None = None
"""Response ids, where there are any, and prompts of the batch whose credit is computed; None outside our trainer."""


def register(options: Mapping[str, Any] | None = None) -> tuple[str, ...]:
    """Puts the estimators into SkyRL's registry, and returns their names there; `options` are of the one in use."""
    from skyrl.backends.skyrl_train.utils.ppo_utils import (  # pyright: ignore[reportMissingImports]
        AdvantageEstimatorRegistry,
    )

    for name in WITHOUT_CRITIC:
        if PREFIX + name in AdvantageEstimatorRegistry.list_available():
            AdvantageEstimatorRegistry.unregister(PREFIX + name)
        AdvantageEstimatorRegistry.register(PREFIX + name, partial(estimate, name, dict(options or {})))
    return tuple(PREFIX + name for name in WITHOUT_CRITIC)


def estimate(
    estimator: str,
    options: Mapping[str, Any],
    token_level_rewards: Any,
    response_mask: Any,
    index: Sequence[Any],
    **_: Any,
) -> tuple[Any, Any]:
    """Advantages and returns (B, T) of SkyRL's batch, as tensors like `token_level_rewards`.

    `response_mask` must be the mask of sampled tokens, as our trainer hands it over. ConfigError outside that trainer.
    """
    if _texts is None:
        raise ConfigError(
            f"{PREFIX}{estimator} must be used with our trainer, which hands over the mask of sampled tokens; SkyRL's "
            "own makes one turn of a rollout; set trainer.override_entrypoint=turnwise.adapters.skyrl_trainer"
        )
    ids, present, prompts = _texts
    turn_ids = batch_turn_ids(response_mask.detach().cpu().numpy())
    turns, outcomes = dense_rewards(turn_ids, token_level_rewards.detach().cpu().double().numpy())
    anchors = observation_anchors(turn_ids, ids, present, prompts)
    rows = credit_rows(turn_ids, [str(group) for group in index], turns, outcomes, anchors=anchors)
    found = token_advantages(turn_ids, row_credit(rows, estimator, options).tokens)
    advantages = token_level_rewards.new_tensor(found)
    return advantages, advantages


@contextlib.contextmanager
def turns_of(data: Any) -> Iterator[Any]:
    """SkyRL's training batch with the mask of sampled tokens in the place of `response_mask`, for as long."""
    global _texts
    before, response = _texts, data["response_mask"]
    ids, attended = data["sequences"].cpu().numpy(), data["attention_mask"].cpu().numpy() > 0
    present = response.cpu().numpy() > 0  # at the right end of the sequences
    width = present.shape[1]
    in_prompt = attended.copy()
    in_prompt[:, -width:] &= ~present
    _texts = ids[:, -width:], present, [row[own].tolist() for row, own in zip(ids, in_prompt, strict=True)]
    data["response_mask"] = data["loss_mask"].to(response.dtype)
    try:
        yield data
    finally:
        data["response_mask"], _texts = response, before


def refusals(config: Any, options: Mapping[str, Any] | None = None) -> list[str]:
    """Why a configuration of SkyRL cannot carry turn credit; empty where it can, or has an estimator of its own."""
    algorithm, generator = config.trainer.algorithm, config.generator
    name = str(algorithm.advantage_estimator)
    if not name.startswith(PREFIX):
        return []
    estimator, found = name.removeprefix(PREFIX), []
    if estimator not in WITHOUT_CRITIC:
        offered = [PREFIX + each for each in WITHOUT_CRITIC]
        return [str(unknown_name("trainer.algorithm.advantage_estimator", name, offered))]
    try:
        check_estimator(estimator, options or {})
    except ConfigError as error:
        found.append(f"turnwise.*: {error}")
    if generator.step_wise_trajectories:
        found.append(
            "generator.step_wise_trajectories must be False: each turn is a sample of its own there, and one number of "
            "the last one goes to all"
        )
    if algorithm.use_kl_in_reward:
        found.append(
            "trainer.algorithm.use_kl_in_reward must be False: it mixes a penalty per token into the rewards, from "
            "which turn rewards cannot be told again; take trainer.algorithm.use_kl_loss=True"
        )
    if algorithm.zero_variance_filter:
        found.append(
            "trainer.algorithm.zero_variance_filter must be False: it drops groups by their rollouts' sums, though "
            "their turns may differ"
        )
    return found


def given_options(arguments: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """SkyRL's arguments, and the estimator's own: `turnwise.alpha=0.5`, values as in JSON or else text."""
    rest, options = [], {}
    for argument in arguments:
        name, equals, text = argument.partition("=")
        if not (equals and name.startswith("turnwise.")):
            rest.append(argument)
            continue
        try:
            options[name.removeprefix("turnwise.")] = json.loads(text)
        except ValueError:
            options[name.removeprefix("turnwise.")] = text
    return rest, options
