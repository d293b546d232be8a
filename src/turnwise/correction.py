"""Correction for a sampler whose probabilities differ from the trainer's: other kernels, other numbers, older weights.

A rollout carries the log-probabilities under which it was sampled. One forward pass at the beginning of the step gives
the trainer's own. Their ratio weighs each token's term of the loss, so that its expectation under the sampler is the
trainer's, and the ratio of the clipped loss is then against the trainer's. A cap bounds the gradient's variance.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
import torch

from turnwise.batch import Row, chunks, on_sampled, pack
from turnwise.config import TrainConfig
from turnwise.cores import in_parallel
from turnwise.policy import Policy, token_logprobs

Correction = Literal["truncate", "mask"]


def sampler_weights(trainer: np.ndarray, sampler: np.ndarray, *, cap: float, kind: Correction) -> np.ndarray:
    """What each token weighs, from its log-probabilities under both.

        truncate:  min(ρ, C)        mask:  ρ where 1/C ≤ ρ ≤ C, else 0,        ρ = exp(trainer − sampler)

    Truncated importance sampling is Ionides 2008 (J. Comput. Graph. Stat. 17:2), per token as by Yao et al. 2025 ("Your
    efficient RL framework secretly brings you off-policy RL training"). The mask is IcePop's, arXiv 2510.18855, with
    one cap for both ends.
    """
    ratio = np.exp(trainer.astype(float) - sampler)
    if kind == "truncate":
        return np.minimum(ratio, cap)
    return np.where((ratio >= 1 / cap) & (ratio <= cap), ratio, 0.0)


def trainer_logprobs(
    policy: Policy, rows: Sequence[Row], *, max_tokens: int, temperature: float = 1.0, at_once: int = 1
) -> list[np.ndarray]:
    """The policy's own log-probabilities of each row's sampled tokens, (n,) per row; equal rows are computed once."""
    different = {(row.prompt_ids, row.ids): row for row in rows}
    found: dict[tuple[tuple[int, ...], tuple[int, ...]], np.ndarray] = {}

    def computed(chunk: Sequence[Row]) -> list[np.ndarray]:
        batch = pack(chunk, pad_id=policy.chat.pad_id).to(policy.model.device)
        with torch.no_grad():
            logprobs, _ = token_logprobs(policy.model, batch, batch.action, temperature=temperature)
        return np.split(logprobs.cpu().numpy(), np.cumsum([row.action.sum() for row in chunk])[:-1])

    parts = list(chunks(list(different.values()), max_tokens=max_tokens))
    for chunk, own in zip(parts, in_parallel(computed, parts, at_once=at_once), strict=True):
        found |= {(row.prompt_ids, row.ids): logprobs for row, logprobs in zip(chunk, own, strict=True)}
    return [found[row.prompt_ids, row.ids] for row in rows]


def corrected(
    policy: Policy, rows: Sequence[tuple[int, Row]], config: TrainConfig, *, at_once: int = 1
) -> tuple[list[tuple[int, Row]], dict[str, float]]:
    """A step's rows for the loss, and what is told of the mismatch.

    Advantages carry the weights: as these are not negative, a weight times the clipped term is the clipped term of the
    weighted advantage. The rows' sampling log-probabilities are the trainer's.
    """
    assert config.sampler_correction != "none", "there is a correction to make"
    own = trainer_logprobs(
        policy,
        [row for _, row in rows],
        max_tokens=config.micro_batch_budget,
        temperature=config.temperature,
        at_once=at_once,
    )
    made, weights = [], []
    for (group, row), trainer in zip(rows, own, strict=True):
        sampler = row.sampling_logprobs[row.action]
        weight = sampler_weights(trainer, sampler, cap=config.sampler_cap, kind=config.sampler_correction)
        advantages = row.advantages * on_sampled(row, weight)
        made.append((group, replace(row, advantages=advantages, sampling_logprobs=on_sampled(row, trainer))))
        weights.append(weight)
    before = np.concatenate([row.sampling_logprobs[row.action] for _, row in rows]).astype(float)
    delta = np.concatenate(own) - before
    ratio, cap = np.exp(delta), config.sampler_cap
    held = ratio > cap if config.sampler_correction == "truncate" else (ratio > cap) | (ratio < 1 / cap)
    return made, {
        "sampler_weight": float(np.concatenate(weights).mean()),
        "sampler_capped": float(held.mean()),
        "sampler_kl": float((ratio - delta - 1).mean()),
    }
