"""Rollouts of the next step while a step is learned from: by a copy of the policy, on a thread of its own.

    copy:      draws batch 1 with w₀ | draws batch 2 with w₁ | ...
    policy:    batch 0: w₀ → w₁      | batch 1: w₁ → w₂      | ...

The first batch is drawn with the weights that learn from it, every later one is one update old. Which weights draw
which batch follows from the step alone, so timing changes no number; and a run can go on from a checkpoint that holds
the copy's weights, with which the batch that was under way is drawn again.
"""

import copy
import dataclasses
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Generic, TypeVar

import torch
from transformers import PreTrainedModel

from turnwise.config import TrainConfig
from turnwise.devices import SMALL, num_parameters
from turnwise.engines.hf import HFEngine
from turnwise.errors import ConfigError
from turnwise.evaluation import make_engines
from turnwise.policy import Policy

T = TypeVar("T")


def halves(config: TrainConfig, model: PreTrainedModel) -> tuple[int, int]:
    """The cores of each half of a step that are computed at the same time, and torch's threads in an operation."""
    cores = max(1, (config.threads or torch.get_num_threads()) // 2)
    return cores, 1 if num_parameters(model) < SMALL else cores


class Sampler(Generic[T]):
    """A copy of a policy, whose engines draw on one thread, at most one batch ahead.

    What does not learn, such as LoRA's base model, is shared with the policy. Raises ConfigError for a device that two
    threads cannot use.
    """

    def __init__(self, policy: Policy, config: TrainConfig) -> None:
        device = policy.model.device.type
        if device == "mps":
            raise ConfigError(
                "ahead must go with device cpu or cuda; got mps, which is used from one thread; leave it out"
            )
        self.policy = dataclasses.replace(policy, model=_copied(policy.model))
        self.cores, self.threads = halves(config, policy.model)
        made = make_engines(self.policy, dataclasses.replace(config, threads=self.cores))
        self.engines = [engine for engine in made if isinstance(engine, HFEngine)]  # all: vLLM is refused before
        self._thread = ThreadPoolExecutor(1, "turnwise-ahead")
        self._under_way: Future[T] | None = None

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        """What of the copy is its own, by name."""
        return {name: p.detach() for name, p in self.policy.model.named_parameters() if p.requires_grad}

    def follow(self, weights: Mapping[str, torch.Tensor], version: int) -> None:
        """Takes the weights that the policy has, or had, after so many steps. Nothing may be under way."""
        assert self._under_way is None, "the batch that is under way has been taken"
        for name, own in self.weights.items():
            own.copy_(weights[name].detach())
        for engine in self.engines:
            engine.refresh(version)

    def begin(self, draw: Callable[[], T]) -> None:
        """Starts to draw the next batch; `take` gives it."""
        assert self._under_way is None, "at most one batch is under way"
        self._under_way = self._thread.submit(draw)

    def take(self, draw: Callable[[], T]) -> T:
        """The batch that is under way, or one that is drawn now; waits for it, and raises what drawing it raised."""
        batch, self._under_way = self._under_way or self._thread.submit(draw), None
        return batch.result()

    def rest(self) -> None:
        """Waits until nothing is drawn; what is under way stays to be taken."""
        wait([self._under_way] if self._under_way else [])

    def close(self) -> None:
        """Ends what is under way: none of its rollouts gets another token."""
        for engine in self.engines:
            engine.halt()
        self._thread.shutdown(cancel_futures=True)


def _copied(model: PreTrainedModel) -> PreTrainedModel:
    """A copy that shares what does not change."""
    unchanging = (*(p for p in model.parameters() if not p.requires_grad), *model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in unchanging})
