"""An entry point for SkyRL whose trainer hands estimators the turns; it imports SkyRL.

    python -m skyrl.train.entrypoints.main_base trainer.override_entrypoint=turnwise.adapters.skyrl_trainer \\
        trainer.algorithm.advantage_estimator=turnwise/mt-grpo turnwise.alpha=1.0 ...
"""

import sys
from collections.abc import Mapping
from typing import Any

import ray  # pyright: ignore[reportMissingImports]
from skyrl.train.config import SkyRLTrainConfig  # pyright: ignore[reportMissingImports]
from skyrl.train.entrypoints.main_base import BasePPOExp  # pyright: ignore[reportMissingImports]
from skyrl.train.trainer import RayPPOTrainer  # pyright: ignore[reportMissingImports]
from skyrl.train.utils import validate_cfg  # pyright: ignore[reportMissingImports]
from skyrl.train.utils.utils import initialize_ray  # pyright: ignore[reportMissingImports]

from turnwise.adapters.skyrl import given_options, refusals, register, turns_of
from turnwise.errors import ConfigError


class TurnTrainer(RayPPOTrainer):
    """SkyRL's trainer, whose estimators see which tokens each turn sampled."""

    def compute_advantages_and_returns(self, data: Any) -> Any:
        for refusal in refusals(self.cfg):
            raise ConfigError(refusal)
        with turns_of(data):
            return super().compute_advantages_and_returns(data)


class TurnExperiment(BasePPOExp):
    """SkyRL's experiment with that trainer."""

    def get_trainer(self, *args: Any, **options: Any) -> TurnTrainer:
        trainer = super().get_trainer(*args, **options)
        trainer.__class__ = TurnTrainer
        return trainer


@ray.remote(num_cpus=1)
def entry(config: Any, options: Mapping[str, Any]) -> None:
    register(options)
    TurnExperiment(config).run()


def main() -> None:
    arguments, options = given_options(sys.argv[1:])
    config = SkyRLTrainConfig.from_cli_overrides(arguments)
    register(options)
    for refusal in refusals(config, options):
        raise ConfigError(refusal)
    validate_cfg(config)
    initialize_ray(config)
    register(options)  # in the registry that Ray's workers share
    ray.get(entry.remote(config, options))
