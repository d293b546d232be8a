"""Rewards per token to advantages per token, as the estimators of a trainer's registry see them.

verl and SkyRL call an advantage estimator on the driver, over the whole batch, and hand it a reward per token, a mask
and each row's group. What they do not hand over, a trainer of ours lays beside. Needs neither trainer nor torch.
"""

import contextlib
import json
import time
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from turnwise.adapters.rows import (
    WITH_CRITIC,
    WITHOUT_CRITIC,
    RowCredit,
    batch_turn_ids,
    credit_rows,
    dense_rewards,
    row_credit,
    token_advantages,
)

PREFIX = "turnwise/"
"""What the estimators' names begin with in a registry."""
OFFERED = (*WITHOUT_CRITIC, *(name for name in WITH_CRITIC if name not in ("vetta", "vineppo")))
"""The estimators in a registry: vetta has two heads where a trainer's critic has one, vineppo branches."""


@dataclass
class Beside:
    """What a trainer does not hand to estimators; ours fetches it. None: what the rewards and the mask say."""

    action: np.ndarray | None = None
    """1 where the policy sampled (B, T), where the trainer's own mask says something else."""
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
    """Hands `given` to the estimator that the trainer calls within."""
    global _beside
    before, _beside = _beside, given
    try:
        yield given
    finally:
        _beside = before


def laid_beside() -> Beside:
    """What a trainer of ours laid beside; an empty one where there is none."""
    return _beside


def dense_credit(
    estimator: str,
    rewards: np.ndarray,
    action: np.ndarray,
    groups: Sequence[Hashable],
    options: Mapping[str, Any],
    given: Beside,
) -> tuple[np.ndarray, np.ndarray]:
    """Advantages, and what a critic is to learn (B, T): the advantages again where there is none.

    `options` are the estimator's own, and `log`, a file to which every call appends a line with what
    `RowCredit.metrics` says and the seconds it took. Raises InputError for a batch that does not suit.
    """
    began = time.perf_counter()
    own = {key: value for key, value in options.items() if key != "log"}
    turn_ids = batch_turn_ids(action, given.turn_ids)
    turns, outcomes = dense_rewards(turn_ids, rewards)
    rows = credit_rows(
        turn_ids,
        groups,
        given.turn_rewards if given.turn_rewards is not None else turns,
        given.outcome_rewards if given.outcome_rewards is not None else outcomes,
        anchors=given.anchors,
        values=given.values,
    )
    credit = row_credit(rows, estimator, own)
    advantages = token_advantages(turn_ids, credit.tokens)
    returns = advantages if given.values is None else _returns(turn_ids, credit, given.values)
    given.metrics = {**credit.metrics(), "seconds": time.perf_counter() - began}
    if options.get("log"):
        with Path(options["log"]).open("a", encoding="utf-8") as lines:
            lines.write(json.dumps({"estimator": estimator, "rows": len(rows), **given.metrics}) + "\n")
    return advantages, returns


def _returns(turn_ids: np.ndarray, credit: RowCredit, values: np.ndarray) -> np.ndarray:
    """What a trainer's critic is to learn: the targets, and its own values where a method has none."""
    if credit.returns is None:
        return values
    known = token_advantages(turn_ids, [(~np.isnan(row)).astype(float) for row in credit.returns])
    targets = token_advantages(turn_ids, [np.nan_to_num(row) for row in credit.returns])
    return np.where(known > 0, targets, values)


def array(tensor: Any) -> np.ndarray:
    """A tensor's numbers, in double precision."""
    return tensor.detach().cpu().double().numpy()


def estimator_options(config: Any) -> dict[str, Any]:
    """The node `turnwise` of a trainer's `algorithm` as a plain dict; empty where there is none."""
    node = entry(config, "turnwise") or {}
    return {str(key): dict(value) if isinstance(value, Mapping) else value for key, value in node.items()}


def entry(config: Any, path: str, default: Any = None) -> Any:
    """An entry, by its dotted path, of a configuration made of DictConfigs, dataclasses, dicts or None."""
    for name in path.split("."):
        if config is None:
            return default
        config = config.get(name) if hasattr(config, "get") else getattr(config, name, None)
    return default if config is None else config
