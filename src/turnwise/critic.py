"""The critic: values of the states that the policy's tokens are sampled in, from a trunk and a linear head.

With its *own* trunk the critic is a copy of the starting policy's decoder that learns for itself. On a *shared* trunk
it is a head on the policy's last hidden states, whose gradient stops there: neither kind of critic moves the policy.
Heads begin at zero, so that the first advantages are those of no critic.

A value belongs to the state *before* a token. Estimators with values of turns read them at the turns' first tokens.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from transformers import PreTrainedModel

from turnwise.batch import MicroBatch, Row, chunks, pack
from turnwise.cores import in_parallel
from turnwise.policy import Policy, token_states

Trunk = Literal["own", "shared"]


@dataclass(frozen=True, kw_only=True)
class Critic:
    """A trunk, a head on its last hidden states, and the optimiser of what the critic learns."""

    trunk: PreTrainedModel
    """Its decoder alone is used; the policy's own model where the trunk is shared."""
    head: torch.nn.Linear
    shared: bool
    optimizer: torch.optim.Optimizer

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """What the critic learns."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def state(self) -> dict[str, torch.Tensor]:
        """The learned tensors by name."""
        head = {f"head.{name}": tensor for name, tensor in self.head.state_dict().items()}
        if self.shared:
            return head
        return {**head, **{f"trunk.{name}": tensor for name, tensor in _decoder(self.trunk).state_dict().items()}}

    def load_state(self, tensors: dict[str, torch.Tensor]) -> None:
        """Takes over what `state` returned."""
        parts = {"head": self.head} if self.shared else {"head": self.head, "trunk": _decoder(self.trunk)}
        for part, module in parts.items():
            own = {name.removeprefix(f"{part}."): t for name, t in tensors.items() if name.startswith(f"{part}.")}
            module.load_state_dict(own)


def make_critic(
    policy: Policy, trunk: Trunk, *, heads: int = 1, learning_rate: float = 1e-3, adam_beta2: float = 0.99
) -> Critic:
    """A fresh critic beside a policy. Values are 0 until it learns."""
    model = policy.model if trunk == "shared" else copy.deepcopy(policy.model)
    head = torch.nn.Linear(model.config.hidden_size, heads, device=model.device)
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.zeros_(head.bias)
    learned = [*head.parameters(), *(() if trunk == "shared" else _decoder(model).parameters())]
    optimizer = torch.optim.AdamW(learned, lr=learning_rate, betas=(0.9, adam_beta2), weight_decay=0.0)
    return Critic(trunk=model, head=head, shared=trunk == "shared", optimizer=optimizer)


def _decoder(model: PreTrainedModel) -> torch.nn.Module:
    return model.get_decoder()


def token_values(critic: Critic, batch: MicroBatch, states: torch.Tensor | None = None) -> torch.Tensor:
    """Values of the states before the batch's tokens, (B, T, heads); of padding, any number.

    `states` are the policy's `token_states`, which a critic on the policy's trunk reads where they have been computed.
    """
    if critic.shared:
        with torch.no_grad():
            states = token_states(critic.trunk, batch) if states is None else states.detach()
    else:
        states = token_states(critic.trunk, batch)
    return critic.head(states.float())[batch.place]


def step_values(
    critic: Critic, rows: Sequence[Row], cut: Sequence[bool], *, max_tokens: int, pad_id: int, at_once: int = 1
) -> tuple[list[np.ndarray], np.ndarray]:
    """Values at each row's sampled tokens, (n, heads) per row, and of the state after it, (R, heads).

    Without gradient. The state after a row is computed where the row is `cut`; elsewhere its value is 0. `at_once`
    micro-batches are computed at a time.
    """
    asked = [_one_longer(row, pad_id) if is_cut else row for row, is_cut in zip(rows, cut, strict=True)]
    found: dict[tuple[tuple[int, ...], tuple[int, ...]], np.ndarray] = {}
    different = {(row.prompt_ids, row.ids): row for row in asked}

    def computed_values(chunk: Sequence[Row]) -> np.ndarray:
        with torch.no_grad():
            return token_values(critic, pack(chunk, pad_id=pad_id).to(critic.trunk.device)).cpu().numpy()

    parts = list(chunks(list(different.values()), max_tokens=max_tokens))
    for chunk, computed in zip(parts, in_parallel(computed_values, parts, at_once=at_once), strict=True):
        for row, own in zip(chunk, computed, strict=True):
            found[row.prompt_ids, row.ids] = own[: len(row.ids)]
    values = [found[row.prompt_ids, row.ids] for row in asked]
    after = [own[-1] if is_cut else np.zeros_like(own[-1]) for own, is_cut in zip(values, cut, strict=True)]
    return [own[row.action] for own, row in zip(values, asked, strict=True)], np.array(after)


def _one_longer(row: Row, pad_id: int) -> Row:
    """The row with one more token, whatever it is: the state before it is the one after the row."""
    return replace(
        row,
        ids=(*row.ids, pad_id),
        action=np.append(row.action, False),
        loss=np.append(row.loss, False),
        sampling_logprobs=np.append(row.sampling_logprobs, np.float32(0)),
        advantages=np.append(row.advantages, np.float32(0)),
    )
