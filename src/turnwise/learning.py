"""The update: a step's rows into the weights of the policy, and of the critic where there is one."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from turnwise.batch import MicroBatch, Row, distinct_rows, micro_batches, weighted
from turnwise.config import TrainConfig
from turnwise.cores import has_short_operations, in_parallel
from turnwise.critic import Critic, token_values
from turnwise.lora import without_adapter
from turnwise.loss import Ratio, policy_loss, value_loss
from turnwise.policy import Policy, token_logprobs, token_states
from turnwise.rollout import rollout_seed

MEANS = ("entropy", "clip_fraction", "policy_shift", "kl")
"""What is reported as a mean over the computed tokens, by their weights."""


@dataclass(frozen=True, kw_only=True)
class Skipped:
    """A minibatch whose optimiser step was not taken, as a number of it is NaN or infinite."""

    place: tuple[int, int]
    """Which pass over the step's rollouts, and which minibatch of it."""
    fault: str
    rows: Sequence[tuple[int, Row]]
    """Each rollout's group and its row."""
    found: Mapping[str, float]


class _NotFinite(ArithmeticError):
    """A loss or a gradient is NaN or infinite; `found` is what was computed by then."""

    def __init__(self, fault: str, found: Mapping[str, float]) -> None:
        super().__init__(fault)
        self.found = found


def update(
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    rows: Sequence[tuple[int, Row]],
    config: TrainConfig,
    step: int,
    reference: Policy | None = None,
    critic: Critic | None = None,
    *,
    at_once: int = 1,
    skipped: Callable[[Skipped | None], None] = lambda skipped: None,
) -> dict[str, float]:
    """`passes` times `minibatches` optimiser steps over a step's rollouts; means of what they saw, and how many
    positions they computed together.

    A minibatch whose loss or gradient is not finite, the policy's or the critic's, changes nothing and is counted;
    `skipped` is told of it, and with None of every step that is taken.

    `at_once` micro-batches are computed at a time; their gradients are added in order, so the number changes nothing.
    In the first `critic_warmup_steps` steps the critic learns alone.
    """
    groups = sorted({group for group, _ in rows})
    learned = step - (config.critic_warmup_steps if critic else 0)  # steps in which the policy has learned
    _set_rate(optimizer, config.learning_rate * _rise(learned, config.warmup_steps))
    if critic:
        _set_rate(critic.optimizer, config.critic_learning_rate * _rise(step, config.warmup_steps))
    seen: list[dict[str, float]] = []
    for repeat in range(config.passes):
        order = np.random.default_rng(rollout_seed(config.seed, step, repeat)).permutation(len(groups))
        for number, part in enumerate(np.array_split(order, config.minibatches)):
            chosen = {groups[i] for i in part}
            minibatch = [(group, row) for group, row in rows if group in chosen]
            if not minibatch:
                continue
            own = [row for _, row in minibatch]
            try:
                seen.append(_optimise(policy, optimizer, own, config, reference, critic, learned >= 0, at_once))
            except _NotFinite as error:
                place = (repeat, number)
                skipped(Skipped(place=place, fault=str(error), rows=minibatch, found=error.found))
                seen.append({"positions": error.found["positions"], "skipped_steps": 1.0})
            else:
                skipped(None)
    positions, num_skipped = sum(s.pop("positions") for s in seen), sum(s.pop("skipped_steps", 0.0) for s in seen)
    names = dict.fromkeys(name for s in seen for name in s)
    means = {name: float(np.mean([s[name] for s in seen if name in s])) for name in names}
    if seen and "policy_shift" in seen[0]:
        # before the first of the step's updates: the policy that sampled, computed anew
        means["sampler_gap"] = seen[0]["policy_shift"]
    return {**means, "skipped_steps": num_skipped, "positions": positions}


def _rise(step: int, steps: int) -> float:
    """The share of the peak learning rate, rising over the first `steps`."""
    return min(1.0, (step + 1) / max(1, steps))


def _set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for parameters in optimizer.param_groups:
        parameters["lr"] = rate


def _optimise(
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    rows: Sequence[Row],
    config: TrainConfig,
    reference: Policy | None,
    critic: Critic | None,
    policy_learns: bool,
    at_once: int,
) -> dict[str, float]:
    """One optimiser step of each that learns; of none, and _NotFinite, where a loss or a gradient is not finite.

    Rows without any credit have no gradient; without a KL term and a critic, for which every row has value targets,
    they are not computed. Entropy, clip fraction and shift are means over the computed rows, absent where there are
    none.
    """
    rows = weighted(rows, config.aggregation, length=config.max_turns * config.max_turn_tokens)
    live = distinct_rows(row for row in rows if reference or critic or np.any(row.advantages[row.loss]))
    targets = _num_targets(rows) if critic else None
    sums: dict[str, float] = {}
    learned = [*(policy.learned if policy_learns else ()), *(critic.parameters if critic else ())]

    def computed(
        item: tuple[MicroBatch, torch.Tensor | None],
    ) -> tuple[dict[str, float], Sequence[torch.Tensor | None]]:
        """A micro-batch's share of the sums, and its gradients where they are not added as they are found."""
        batch, ref_logprobs = item
        batch = batch.to(policy.model.device)
        states = token_states(policy.model, batch) if policy_learns else None
        found, losses = {}, []
        if states is not None:
            losses.append(_policy_loss(policy, states, batch, config, ref_logprobs, found))
        if critic and targets is not None:
            losses.append(_value_loss(critic, states, batch, targets, config, found))
        if at_once > 1:
            return found, torch.autograd.grad(losses, learned, allow_unused=True)
        torch.autograd.backward(losses)
        return found, ()

    even = config.micro_batch_tokens is None and has_short_operations(policy.model)
    budget = config.micro_batch_budget
    batches = list(micro_batches(live, max_tokens=budget, pad_id=policy.chat.pad_id, even=even))
    references = _reference_logprobs(reference if policy_learns else None, batches, config, at_once)
    for found, gradients in in_parallel(computed, zip(batches, references, strict=True), at_once=at_once):
        _add(learned, gradients)
        for name, value in found.items():
            sums[name] = sums.get(name, 0.0) + value
    positions = sum(int(level.lengths.sum()) for batch in batches for level in batch.levels)
    found = {"live_rollouts": sum(row.count for row in live) / len(rows), "computed_rows": len(live) / len(rows)}
    found["positions"] = float(positions)
    stepping: dict[str, torch.optim.Optimizer] = {"value_grad_norm": critic.optimizer} if critic else {}
    stepping |= {"grad_norm": optimizer} if policy_learns and live else {}
    losses = {name: sums[name] for name in ("loss", "value_loss") if name in sums}
    norms = _stepped(stepping, config.max_grad_norm, {**found, **losses})
    if critic:
        found |= {name: sums.pop(name) for name in ("value_loss", "value_clip_fraction")}
        found["value_grad_norm"] = norms["value_grad_norm"]
    if not policy_learns:
        return found
    weighed = sums.pop("weight", 0.0)
    found |= {name: sums[name] / weighed for name in MEANS if name in sums}
    return {"loss": sums.get("loss", 0.0), **found, "grad_norm": norms.get("grad_norm", 0.0)}


def _add(parameters: Sequence[torch.nn.Parameter], gradients: Sequence[torch.Tensor | None]) -> None:
    """Adds gradients, if there are any, to those of the parameters."""
    for parameter, gradient in zip(parameters, gradients, strict=False):
        if gradient is not None:
            parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)


def _num_targets(rows: Sequence[Row]) -> torch.Tensor:
    """How many value targets each head has, (heads,)."""
    counts = [np.sum(~np.isnan(row.returns), axis=0) for row in rows if row.returns is not None]
    return torch.from_numpy(np.sum(counts, axis=0))


def _stepped(
    optimizers: Mapping[str, torch.optim.Optimizer], max_norm: float, found: Mapping[str, float]
) -> dict[str, float]:
    """One step of each optimiser along its clipped gradient, which is cleared; the norms before clipping, by name.

    No step at all, and _NotFinite, where one of the norms is not finite, or a loss in `found`.
    """
    norms = {}
    for name, optimizer in optimizers.items():
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        norms[name] = float(torch.nn.utils.clip_grad_norm_(parameters, max_norm))
    broken = [f"its {name} is {x}" for name, x in {**found, **norms}.items() if not math.isfinite(x)]
    for optimizer in optimizers.values():
        if not broken:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    if broken:
        raise _NotFinite(", ".join(broken), {**found, **norms})
    return norms


def loss_segments(batch: MicroBatch, ratio: Ratio) -> torch.Tensor:
    """Which ratio each token takes part in, (B, T): one number per turn, or per rollout."""
    rows = torch.arange(batch.num_rows, device=batch.action.device)[:, None].expand_as(batch.action)
    if ratio == "sequence":
        return rows
    starts = batch.action & ~torch.nn.functional.pad(batch.action, (1, 0))[:, :-1]
    return rows * batch.action.shape[1] + starts.cumsum(1)


def _reference_logprobs(
    reference: Policy | None, batches: Sequence[MicroBatch], config: TrainConfig, at_once: int
) -> Sequence[torch.Tensor | None]:
    """Log-probabilities of each micro-batch's trained tokens under the start; None each without a reference.

    A reference with an adapter is the policy itself, and the start is what it is without the adapter.
    """
    if reference is None:
        return [None] * len(batches)

    @torch.no_grad()  # of this thread alone, so it stands here
    def computed(batch: MicroBatch) -> torch.Tensor:
        batch = batch.to(reference.model.device)
        return token_logprobs(reference.model, batch, batch.loss, temperature=config.temperature)[0]

    with without_adapter(reference.model):
        return list(in_parallel(computed, batches, at_once=at_once))


def _policy_loss(
    policy: Policy,
    states: torch.Tensor,
    batch: MicroBatch,
    config: TrainConfig,
    ref_logprobs: torch.Tensor | None,
    found: dict[str, float],
) -> torch.Tensor:
    """A micro-batch's share of the policy's loss; puts its share of the step's sums into `found`."""
    assert batch.weights is not None, "rows are weighed before they are packed"
    where, temperature = batch.loss, config.temperature
    logprobs, entropy = token_logprobs(policy.model, batch, where, temperature=temperature, states=states)
    weights = (batch.counts[:, None] * batch.weights)[where]
    segments = None if config.ratio == "token" else loss_segments(batch, config.ratio)[where]
    parts = policy_loss(
        logprobs,
        batch.sampling_logprobs[where],
        batch.advantages[where],
        weights,
        clip_low=config.clip_low,
        clip_high=config.clip_high,
        ref_logprobs=ref_logprobs,
        kl_coef=config.kl_coef,
        segments=segments,
    )
    found |= {
        "loss": float(parts.loss.detach()),
        "clip_fraction": float(parts.clipped),
        "policy_shift": float(parts.shift),
        "entropy": float((weights * entropy.detach()).sum()),
        "weight": float(weights.sum()),
    }
    if ref_logprobs is not None:
        found["kl"] = float(parts.kl)
    return parts.loss


def _value_loss(
    critic: Critic,
    states: torch.Tensor | None,
    batch: MicroBatch,
    targets: torch.Tensor,
    config: TrainConfig,
    found: dict[str, float],
) -> torch.Tensor:
    """A micro-batch's share of the value loss, a mean over all targets of the minibatch and over heads."""
    assert batch.values is not None, "with a critic, rows have values"
    assert batch.returns is not None, "with a critic, rows have value targets"
    there = ~batch.returns.isnan()
    weights = (batch.counts[:, None, None] / (targets * len(targets)).to(there.device)).expand_as(there)[there]
    values = token_values(critic, batch, states)[there]
    parts = value_loss(values, batch.values[there], batch.returns[there], weights, clip=config.value_clip)
    found |= {"value_loss": float(parts.loss.detach()), "value_clip_fraction": float(parts.clipped)}
    return parts.loss
