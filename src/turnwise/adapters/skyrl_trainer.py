"""SkyRL's trainer and entry point with turn credit: `trainer.override_entrypoint=turnwise.adapters.skyrl_trainer`.

For an entry point of one's own there are `TurnExp` in the place of `BasePPOExp`, and `TurnConfig`, SkyRL's
configuration with `trainer.algorithm.turnwise` for the estimator's options. Importing this registers the estimators.
Needs SkyRL.
"""

import sys
from dataclasses import dataclass, field
from typing import Any

import ray
from skyrl.train.config import AlgorithmConfig, make_config
from skyrl.train.entrypoints.main_base import BasePPOExp
from skyrl.train.trainer import RayPPOTrainer
from skyrl.train.utils import validate_cfg
from skyrl.train.utils.utils import initialize_ray

from turnwise.adapters.skyrl import TurnCredit, check, register

OVERRIDE = "trainer.override_entrypoint="
"""SkyRL's argument that leads here, which its configuration does not know."""

register()


@dataclass
class TurnAlgorithmConfig(AlgorithmConfig):
    """SkyRL's options of the algorithm, and the estimator's own."""

    turnwise: dict[str, Any] = field(default_factory=dict)
    """Options of the estimator, and `log`, a file that gets a line per step."""


TurnConfig = make_config(algorithm_cls=TurnAlgorithmConfig)


class TurnPPOTrainer(TurnCredit, RayPPOTrainer):
    """SkyRL's trainer with turn credit."""


class TurnExp(BasePPOExp):
    """SkyRL's experiment, with that trainer."""

    def get_trainer(self, *args: Any, **options: Any) -> TurnPPOTrainer:
        """The trainer, of the arguments that SkyRL gives it."""
        return TurnPPOTrainer(*args, **options)


def configured(arguments: list[str]) -> Any:
    """The configuration of a command line. ConfigError for what would delete or distort turn credit."""
    cfg = TurnConfig.from_cli_overrides([text for text in arguments if not text.startswith(OVERRIDE)])
    check(cfg)
    return cfg


@ray.remote(num_cpus=1)
def entrypoint(cfg: Any) -> None:
    """The training, away from the head node, as SkyRL does it."""
    TurnExp(cfg).run()


def main() -> None:
    """SkyRL's main, with turn credit."""
    cfg = configured(sys.argv[1:])
    validate_cfg(cfg)
    initialize_ray(cfg)
    ray.get(entrypoint.remote(cfg))


if __name__ == "__main__":
    main()
