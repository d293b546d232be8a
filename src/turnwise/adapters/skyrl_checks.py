"""The checks of `turnwise doctor skyrl`: packages, releases, the registry, a batch with known credit."""

import importlib
import importlib.metadata
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from turnwise.adapters.dense import PREFIX
from turnwise.adapters.doctor import Finding, installed, of_release

RANGE = ("0.3", "0.5")
"""The releases of SkyRL that the adapter is for, the second one not included."""
INSTALL = 'pip install "skyrl[skyrl-train]>=0.3,<0.5"'
PACKAGES = ("torch", "transformers", "omegaconf", "ray", "skyrl-gym", "skyrl")
NAME = PREFIX + "mt-grpo"


def packages() -> Finding:
    """The packages are installed."""
    return installed(PACKAGES, install=INSTALL)


def releases() -> Finding:
    """The release of SkyRL is one that the adapter is for."""
    return of_release("skyrl", *RANGE)


def imports() -> Finding:
    """SkyRL's trainer and ours can be imported."""
    try:
        importlib.import_module("turnwise.adapters.skyrl_trainer")
    except ModuleNotFoundError as error:
        missing = (error.name or "").split(".")[0]
        return Finding(what=f"SkyRL needs {missing}, which is not installed", fix=f"{INSTALL}  # or {missing} alone")
    except Exception as error:
        if type(error).__name__ != "PydanticUserError":
            raise
        return Finding(
            what="SkyRL's typed dictionaries and this pydantic do not go together before Python 3.12",
            fix="make SkyRL's environment with Python 3.12",
        )
    return Finding(what="SkyRL's trainer, its entry point and ours can be imported")


def registered() -> Finding:
    """The estimators are in SkyRL's registry."""
    from skyrl.backends.skyrl_train.utils.ppo_utils import AdvantageEstimatorRegistry

    names = AdvantageEstimatorRegistry.list_available()
    if NAME not in names:
        return Finding(what=f"{NAME} is not in SkyRL's registry", fix="from turnwise.adapters.skyrl import register")
    count = sum(str(name).startswith(PREFIX) for name in names)
    return Finding(what=f"{count} estimators are in SkyRL's registry, {NAME} among them")


def a_batch() -> Finding:
    """A batch with known rewards gets known credit from SkyRL's trainer."""
    import numpy as np
    from loguru import logger

    logger.disable("skyrl")
    try:
        found = credited([[1.0, 0.5], [0.0, 0.5], [1.0, 0.5], [0.0, 0.5]])
    finally:
        logger.enable("skyrl")
    # In the group of four: z = ±½ / (0.577 + 1e-4) on the first turns, 0 on the second ones, whose outcomes are equal.
    z = 0.5 / (np.std([1, 0, 1, 0], ddof=1) + 1e-4)
    first, second = found[:, 0].tolist(), found[:, 4].tolist()
    if not np.allclose(first, [z, -z, z, -z], atol=1e-5) or not np.allclose(second, 0.0, atol=1e-6):
        return Finding(
            what=f"turns must get ±{z:.3f} and 0; the first got {first}, the second {second}",
            fix='pip install "skyrl==0.3.0"  # the trainer changed what it does with a batch',
        )
    return Finding(what=f"turn rewards arrive; advantages differ between turns ({first[0]:+.3f} and {second[0]:+.3f})")


def credited(turn_rewards: list[list[float]]) -> Any:
    """SkyRL's advantages of one group of two-turn rollouts with these rewards."""
    count, mask = len(turn_rewards), [1, 1, 0, 0, 1, 1]
    output = {
        "prompt_token_ids": [[5, 6]] * count,
        "response_ids": [[7, 8, 9, 10, 11, 2] for _ in range(count)],
        "rewards": [[0.0, first, 0.0, 0.0, 0.0, last] for first, last in turn_rewards],
        "loss_masks": [list(mask) for _ in range(count)],
    }
    trainer = bare_trainer(
        [
            f"trainer.algorithm.advantage_estimator={NAME}",
            f"generator.n_samples_per_prompt={count}",
            "trainer.train_batch_size=1",
            "trainer.policy_mini_batch_size=1",
        ]
    )
    output, uids = trainer.postprocess_generator_output(output, ["a"] * count)
    data = trainer.convert_to_training_input(output, uids)
    data["values"] = None
    return trainer.compute_advantages_and_returns(data)["advantages"].numpy()


def bare_trainer(arguments: list[str]) -> Any:
    """Our trainer as configured, without what needs a GPU: models, engines, data."""
    ours: Any = importlib.import_module("turnwise.adapters.skyrl_trainer")
    trainer = object.__new__(ours.TurnPPOTrainer)
    trainer.cfg, trainer.all_metrics = ours.configured(arguments), {}
    trainer.tokenizer = SimpleNamespace(pad_token_id=0)
    trainer.dispatch = SimpleNamespace(get_lcm_dp_size=lambda: 1)
    return trainer


CHECKS: list[Callable[[], Finding]] = [packages, releases, imports, registered, a_batch]
"""In this order: each builds on those before."""
