"""The checks of `turnwise doctor skyrl`: packages, SkyRL's trainer and ours, a batch with known credit."""

import importlib
from typing import Any

from turnwise.adapters.doctor import Finding, installed, of_release

RANGE = ("0.3", "0.4")
"""The releases of SkyRL that the adapter is for, the second one not included."""
NAME = "turnwise/mt-grpo"


def packages() -> Finding:
    """The packages are installed."""
    return installed(("torch", "ray", "skyrl"), install='pip install "skyrl[fsdp]>=0.3,<0.4"')


def releases() -> Finding:
    """The release of SkyRL is one that the adapter is for."""
    return of_release("skyrl", *RANGE)


def imports() -> Finding:
    """SkyRL's trainer and ours can be imported."""
    try:
        importlib.import_module("turnwise.adapters.skyrl_trainer")
    except ModuleNotFoundError as error:
        missing = (error.name or "").split(".")[0]
        return Finding(what=f"SkyRL needs {missing}, which is not installed", fix=f"pip install {missing}")
    return Finding(what="SkyRL's trainer and ours can be imported")


def a_batch() -> Finding:
    """A batch with known rewards gets known credit from SkyRL's own method."""
    import numpy as np
    import torch

    from turnwise.adapters.skyrl import register
    from turnwise.adapters.skyrl_trainer import TurnTrainer

    register()
    trainer: Any = TurnTrainer.__new__(TurnTrainer)
    trainer.cfg, trainer.all_metrics = _configuration(), {}
    # Four rollouts of two turns with three tokens of the environment between them; the first turn is paid 1, 0, 1, 0.
    loss = torch.tensor([[1, 1, 0, 0, 0, 1]] * 4)
    rewards = torch.zeros(4, 6)
    rewards[[0, 2], 1] = 1.0
    rewards[:, 5] = 0.5
    data = _Batch(
        sequences=torch.arange(28).view(4, 7),
        attention_mask=torch.ones(4, 7, dtype=torch.long),
        response_mask=torch.ones_like(loss),
        loss_mask=loss,
        rewards=rewards,
        values=None,
    )
    trainer.compute_advantages_and_returns(data)
    first, second = data["advantages"][:, 1].tolist(), data["advantages"][:, 5].tolist()
    # z = ±½ / (0.577 + 1e-4) on the first turns, 0 on the second ones, whose outcomes are equal.
    z = 0.5 / (np.std([1, 0, 1, 0], ddof=1) + 1e-4)
    if not np.allclose(first, [z, -z, z, -z], atol=1e-5) or not np.allclose(second, 0.0, atol=1e-6):
        return Finding(
            what=f"turns must get ±{z:.3f} and 0; the first got {first}, the second {second}",
            fix='pip install "skyrl==0.3.0"  # the trainer changed what it does with a batch',
        )
    return Finding(what=f"turn rewards arrive; advantages differ between turns ({first[0]:+.3f} and {second[0]:+.3f})")


class _Batch(dict):
    """As much of SkyRL's batch as its method uses."""

    def __init__(self, **tensors: Any) -> None:
        super().__init__(tensors)
        self.metadata: dict[str, Any] = {"uids": ["a"] * 4, "pad_size": 0, "avg_response_length": 6.0}

    def to(self, device: str) -> "_Batch":
        return self


def _configuration() -> Any:
    from skyrl.train.config import SkyRLTrainConfig  # pyright: ignore[reportMissingImports]

    return SkyRLTrainConfig.from_cli_overrides([f"trainer.algorithm.advantage_estimator={NAME}"])


CHECKS = (packages, releases, imports, a_batch)
